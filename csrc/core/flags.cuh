// Flags in global memory by which CTAs of one launch hand results to each other without a second launch.
//
// A flag is 64 bits. It is published when it equals the launch's nonce, a number that no earlier launch had, so flags
// need no reset: memory may hold anything else before. peft_kernels/lora/kernels/cuda_workspace.py draws the nonces,
// and says what is different under a CUDA graph, whose replays repeat theirs.
//
// Order: a thread that publishes after __syncthreads() publishes what every thread of its CTA has written before
// (release at device scope is cumulative); a thread that has seen the flag and then passes __syncthreads() hands on
// what it has acquired. What was published is read with ordinary loads: the non-coherent ones (ld.global.nc, __ldg) may
// see older bytes.
#pragma once

#include <cstdint>

namespace peft_kernels {

__device__ __forceinline__ void publish(uint64_t* flag, uint64_t nonce) {
  asm volatile("st.release.gpu.global.u64 [%0], %1;" ::"l"(flag), "l"(nonce) : "memory");
}

__device__ __forceinline__ bool is_published(const uint64_t* flag, uint64_t nonce) {
  uint64_t value;
  asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(flag) : "memory");
  return value == nonce;
}

// The publisher must be resident or have finished: see the deadlock argument of each kernel that waits.
__device__ __forceinline__ void wait_until_published(const uint64_t* flag, uint64_t nonce) {
  while (!is_published(flag, nonce)) {
    __nanosleep(32);
  }
}

}  // namespace peft_kernels
