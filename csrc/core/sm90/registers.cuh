// Registers handed from one warpgroup to another. Every warp of the warpgroup calls it, once, at the head of its role;
// kCount is a multiple of 8 from 24 to 256.
#pragma once

#include "core/sm90/arch.cuh"

namespace peft_kernels::sm90 {

// Keep `kCount` registers a thread and give the rest back to the block.
template <int kCount>
PEFT_KERNELS_DEVICE void release_registers() {
  static_assert(kCount >= 24 && kCount <= 256 && kCount % 8 == 0, "a register count that setmaxnreg takes");
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}

// Wait until the block can give `kCount` registers a thread.
template <int kCount>
PEFT_KERNELS_DEVICE void acquire_registers() {
  static_assert(kCount >= 24 && kCount <= 256 && kCount % 8 == 0, "a register count that setmaxnreg takes");
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}

}  // namespace peft_kernels::sm90
