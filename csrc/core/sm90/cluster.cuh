// Thread block clusters: ranks, their barrier, and each other's shared memory.
#pragma once

#include <cstdint>

#include "core/sm90/arch.cuh"

namespace peft_kernels::sm90 {

PEFT_KERNELS_DEVICE uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

PEFT_KERNELS_DEVICE uint32_t cluster_size() {
  uint32_t size;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}

// Arrive at the cluster's barrier; releases this thread's earlier accesses. Every thread arrives, then waits.
PEFT_KERNELS_DEVICE void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}

PEFT_KERNELS_DEVICE void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Barrier of all threads of the cluster. A block must not exit while another may still touch its shared memory.
PEFT_KERNELS_DEVICE void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}

// Where block `rank` of the cluster has what `pointer` points to in this block's shared memory.
template <typename T>
PEFT_KERNELS_DEVICE T* map_shared_rank(T* pointer, uint32_t rank) {
  uint64_t mapped;
  asm volatile("mapa.u64 %0, %1, %2;" : "=l"(mapped) : "l"(reinterpret_cast<uint64_t>(pointer)), "r"(rank));
  return reinterpret_cast<T*>(mapped);
}

}  // namespace peft_kernels::sm90
