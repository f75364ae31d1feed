// Loads of 8x8 matrices of 16-bit elements from shared memory into the fragments that products take (PTX ISA,
// "ldmatrix").
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace peft_kernels {

// Four matrices: lane i gives the address of row i % 8 of matrix i / 8, 16 bytes on a 16-byte boundary. With g = lane /
// 4 and t = lane % 4, word j holds elements 2t and 2t + 1 of row g of matrix j.
__device__ __forceinline__ void load_matrices(uint32_t (&words)[4], const void* shared) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(address)
               : "memory");
}

// The same of the matrices transposed: word j holds element g of rows 2t and 2t + 1.
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&words)[4], const void* shared) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(address)
               : "memory");
}

}  // namespace peft_kernels
