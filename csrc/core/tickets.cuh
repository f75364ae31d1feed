// Tickets by which the last of several CTAs to finish knows that it is the last: it goes on with what all have left in
// memory, and nobody waits.
//
// A ticket is 64 bits: the launch's nonce, but for its highest 16 bits, and how many have come. One with another nonce
// counts as nobody's, so that tickets need no reset: see flags.cuh, and cuda_workspace.py for CUDA graphs.
#pragma once

#include <cstdint>

#include "core/atomic.cuh"

namespace peft_kernels {

constexpr int kTicketCountBits = 16;

// Called by one thread of each of `count` CTAs, fewer than 2^16, after the __syncthreads() behind what its CTA has
// written. True for the last: what all of them have written is then seen by this thread, and by those that pass a
// __syncthreads() after it, with ordinary loads.
__device__ __forceinline__ bool is_last_to_come(uint64_t* ticket, uint64_t nonce, uint32_t count) {
  constexpr uint64_t kCount = (uint64_t{1} << kTicketCountBits) - 1;
  const uint64_t none = nonce << kTicketCountBits;
  for (uint64_t expected = none;;) {
    const uint64_t came = (expected & ~kCount) == none ? expected & kCount : 0;
    const uint64_t found = compare_and_swap(ticket, expected, none | (came + 1));
    if (found == expected) {
      return came + 1 == count;
    }
    expected = found;
  }
}

}  // namespace peft_kernels
