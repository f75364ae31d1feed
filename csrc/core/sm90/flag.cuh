// Flags in global memory between blocks of one launch.
#pragma once

#include <cstdint>

#include "core/sm90/arch.cuh"

namespace peft_kernels::sm90 {

// Set a flag after everything this thread has done and has synchronised with, as every thread of the GPU sees it.
PEFT_KERNELS_DEVICE void flag_release(uint64_t* flag, uint64_t value) {
  asm volatile("st.release.gpu.global.u64 [%0], %1;" ::"l"(flag), "l"(value) : "memory");
}

// Wait until a flag has this value; acquires what its writer released.
PEFT_KERNELS_DEVICE void flag_acquire(const uint64_t* flag, uint64_t value) {
  uint64_t seen;
  do {
    asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(seen) : "l"(flag) : "memory");
  } while (seen != value);
}

}  // namespace peft_kernels::sm90
