// Copies from global to shared memory that go on while the thread does (PTX ISA, "cp.async").
//
// A thread waits for its own copies alone: what others have copied is there after each has waited for its copies and
// passed a barrier.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace peft_kernels {

// Copy `bytes` of 16, 0 to 16, and fill up with zeros. Both addresses are multiples of 16; L1 keeps no line of it.
__device__ __forceinline__ void copy_async_16(void* shared, const void* global, int bytes) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global), "r"(bytes) : "memory");
}

// The same with 0 or 4 bytes of 4.
__device__ __forceinline__ void copy_async_4(void* shared, const void* global, int bytes) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(address), "l"(global), "r"(bytes) : "memory");
}

// End a group of this thread's copies, which may be empty.
__device__ __forceinline__ void end_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Wait until all of this thread's groups are there, but for the kLeft youngest.
template <int kLeft>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

}  // namespace peft_kernels
