// Shared-memory addresses, stores whose reader is the asynchronous proxy, and the conversions that feed them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "core/sm90/arch.cuh"
#include "core/sm90/dtype.h"

namespace peft_kernels::sm90 {

// The address that PTX takes for a pointer into this block's shared memory.
PEFT_KERNELS_DEVICE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Two floats rounded to the nearest half-precision values, `low` in the low half of the word.
template <HalfType kType>
PEFT_KERNELS_DEVICE uint32_t pack_halves(float low, float high) {
  uint32_t word;
  if constexpr (kType == HalfType::kBf16) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    static_assert(sizeof(pair) == sizeof(word), "two bf16 are a word");
    memcpy(&word, &pair, sizeof(word));
  } else {
    const __half2 pair = __floats2half2_rn(low, high);
    static_assert(sizeof(pair) == sizeof(word), "two fp16 are a word");
    memcpy(&word, &pair, sizeof(word));
  }
  return word;
}

// The two floats of a word of half-precision values.
template <HalfType kType>
PEFT_KERNELS_DEVICE float2 unpack_halves(uint32_t word) {
  if constexpr (kType == HalfType::kBf16) {
    __nv_bfloat162 pair;
    memcpy(&pair, &word, sizeof(word));
    return __bfloat1622float2(pair);
  } else {
    __half2 pair;
    memcpy(&pair, &word, sizeof(word));
    return __half22float2(pair);
  }
}

// Store a word to shared memory at a byte address; whoever reads it through the asynchronous proxy needs the fence.
PEFT_KERNELS_DEVICE void store_shared(uint32_t address, uint32_t word) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(word) : "memory");
}

// Store four 8x8 matrices of half-precision values, as mma fragments hold them, to shared memory: lane i gives the byte
// address of row i % 8 of matrix i / 8, 16 bytes, and holds columns 2 (i % 4) and the next of row i / 4 of each matrix.
PEFT_KERNELS_DEVICE void store_matrices(uint32_t address, uint32_t m0, uint32_t m1, uint32_t m2, uint32_t m3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(m0), "r"(m1),
               "r"(m2), "r"(m3)
               : "memory");
}

// Store a word to global memory that the asynchronous proxy will read.
PEFT_KERNELS_DEVICE void store_global(void* address, uint32_t word) {
  *static_cast<uint32_t*>(address) = word;
}

// Order this thread's ordinary accesses to shared memory before later ones of TMA and the tensor cores, by
// this thread or by those that it synchronises with after the fence.
PEFT_KERNELS_DEVICE void fence_async_shared() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// The same for global memory.
PEFT_KERNELS_DEVICE void fence_async_global() {
  asm volatile("fence.proxy.async.global;" ::: "memory");
}

}  // namespace peft_kernels::sm90
