// mbarriers in shared memory: a phase ends when its arrivals and its announced bytes have all come in.
//
// A barrier starts in phase 0. `barrier_wait(barrier, parity)` returns once the phase of that parity has ended: the
// first wait for an event takes parity 0, the next 1, and so on. A barrier that announces "free" starts free when its
// first wait takes parity 1, the parity of the phase before the first.
#pragma once

#include <cstdint>

#include "core/sm90/arch.cuh"
#include "core/sm90/memory.cuh"

namespace peft_kernels::sm90 {

// `arrivals` end a phase. Called by one thread; the others may use the barrier after fence_barrier_init and a barrier
// of the block (of the cluster, where its other blocks use it).
PEFT_KERNELS_DEVICE void barrier_init(uint64_t* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

// Publish this thread's barrier_init to the cluster and to the asynchronous proxy.
PEFT_KERNELS_DEVICE void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Arrive once; releases this thread's earlier accesses to those who wait.
PEFT_KERNELS_DEVICE void barrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Arrive once at the same barrier of another block of the cluster.
PEFT_KERNELS_DEVICE void barrier_arrive_remote(uint64_t* barrier, uint32_t rank) {
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [remote];\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
}

// Arrive once at the same barrier of any block of the cluster, this one's too, to hand back memory that engines have
// read: none of this thread's own accesses is ordered for another block, which would cost a fence.
PEFT_KERNELS_DEVICE void barrier_hand_back(uint64_t* barrier, uint32_t rank) {
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
}

// Arrive once and announce bytes that copies will bring before the phase can end.
PEFT_KERNELS_DEVICE void barrier_expect(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

// Wait until the phase of this parity has ended; acquires what was released to it and what copies wrote.
PEFT_KERNELS_DEVICE void barrier_wait(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// As barrier_wait, where blocks of the cluster arrive with barrier_arrive_remote.
PEFT_KERNELS_DEVICE void barrier_wait_cluster(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// Barrier `id` (1 to 15; 0 is __syncthreads') among `threads` threads of the block, whole warps. Orders their accesses.
PEFT_KERNELS_DEVICE void named_barrier_sync(uint32_t id, uint32_t threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Arrive at barrier `id` without waiting; `threads` counts those who arrive and those who sync.
PEFT_KERNELS_DEVICE void named_barrier_arrive(uint32_t id, uint32_t threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

}  // namespace peft_kernels::sm90
