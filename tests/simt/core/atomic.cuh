// Twin of csrc/core/atomic.cuh: before and after the operation, any other thread may go first.
#pragma once

namespace peft_kernels {

inline uint64_t compare_and_swap(uint64_t* address, uint64_t expected, uint64_t desired) {
  simt::preempt("compare_and_swap");
  const uint64_t found = *address;
  if (found == expected) {
    *address = desired;
  }
  simt::preempt("compare_and_swap");
  return found;
}

}  // namespace peft_kernels
