// Dynamic shared memory, which a launch sizes. Static shared memory is not used: the host emulator of the tests
// (tests/simt) has a CTA's dynamic memory alone, and so can poison and guard it.
#pragma once

namespace peft_kernels {

// The CTA's dynamic shared memory, on a boundary of 1024 bytes, which every swizzle of TMA asks for.
__device__ __forceinline__ void* shared_memory() {
  extern __shared__ __align__(1024) unsigned char dynamic_shared_memory[];
  return dynamic_shared_memory;
}

}  // namespace peft_kernels
