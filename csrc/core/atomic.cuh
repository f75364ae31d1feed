// Atomic operations in global memory that order what is written and read around them.
#pragma once

#include <cstdint>

namespace peft_kernels {

// Put `desired` where `expected` stands, and return what stood there. Acquires and releases at device scope: what this
// thread has written or seen before (by __syncthreads, what its CTA has) is seen by whoever finds its value here.
__device__ __forceinline__ uint64_t compare_and_swap(uint64_t* address, uint64_t expected, uint64_t desired) {
  uint64_t found;
  asm volatile("atom.acq_rel.gpu.global.cas.b64 %0, [%1], %2, %3;"
               : "=l"(found)
               : "l"(address), "l"(expected), "l"(desired)
               : "memory");
  return found;
}

}  // namespace peft_kernels
