// Loads of 16 bytes from global memory that no thread of the launch writes.
#pragma once

#include <cuda_runtime.h>

namespace peft_kernels {

// For what is read once: it takes no line of L1 from what is read again.
__device__ __forceinline__ uint4 load_streamed(const void* address) {
  uint4 value;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(address));
  return value;
}

// For what other warps of the CTA read too: they find it in L1.
__device__ __forceinline__ uint4 load_shared_by_warps(const void* address) {
  return __ldg(static_cast<const uint4*>(address));
}

}  // namespace peft_kernels
