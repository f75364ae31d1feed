// Halves as floats, floats as halves, and floats in pieces that TF32 holds.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace peft_kernels::lora {

template <typename T>
__device__ __forceinline__ float2 floats_of(uint32_t word) {
  if constexpr (std::is_same_v<T, __half>) {
    __half2 pair;
    memcpy(&pair, &word, sizeof(word));
    return __half22float2(pair);
  } else {
    __nv_bfloat162 pair;
    memcpy(&pair, &word, sizeof(word));
    return __bfloat1622float2(pair);
  }
}

// Each rounded to T, the first in the lower half.
template <typename T>
__device__ __forceinline__ uint32_t halves_of(float first, float second) {
  uint32_t word;
  if constexpr (std::is_same_v<T, __half>) {
    const __half2 pair = __floats2half2_rn(first, second);
    memcpy(&word, &pair, sizeof(word));
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
    memcpy(&word, &pair, sizeof(word));
  }
  return word;
}

// A float32 element is cut into three pieces of 11 bits, which add up to it and which TF32 holds, as it does
// half-precision elements: every product is exact, as in docs/design/lora.md.
__device__ __forceinline__ void cut(float value, uint32_t (&pieces)[3]) {
  constexpr uint32_t kUpperBits = 0xFFFFE000u;
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    pieces[i] = __float_as_uint(value) & kUpperBits;
    const float rest = value - __uint_as_float(pieces[i]);
    value = rest == rest ? rest : 0.0f;  // inf - inf: an infinite element has no rest
  }
}

}  // namespace peft_kernels::lora
