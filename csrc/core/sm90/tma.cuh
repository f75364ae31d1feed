// The tensor memory accelerator: boxes of two-dimensional tensors, copied by one thread between global and shared
// memory. A box beyond the tensor's edge reads zeros and is not written; its bytes count in full.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "core/sm90/arch.cuh"
#include "core/sm90/memory.cuh"

namespace peft_kernels::sm90 {

// Lives in a __grid_constant__ kernel parameter; made by core/sm90/tensor_map.h.
using TensorMap = CUtensorMap;

PEFT_KERNELS_DEVICE void prefetch_tensor_map(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(reinterpret_cast<uint64_t>(map)) : "memory");
}

// Load the box whose first element is (row, col) to `destination`; its bytes complete at `barrier`.
PEFT_KERNELS_DEVICE void tma_load(void* destination, const TensorMap* map, uint64_t* barrier, int row, int col) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::
          "r"(shared_address(destination)),
      "l"(reinterpret_cast<uint64_t>(map)), "r"(shared_address(barrier)), "r"(col), "r"(row)
      : "memory");
}

// The same, to `destination` and `barrier` of every block of the cluster whose bit is set in `ranks`.
PEFT_KERNELS_DEVICE void tma_load_multicast(
    void* destination, const TensorMap* map, uint64_t* barrier, int row, int col, uint16_t ranks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%3, %4}], [%2], %5;" ::"r"(shared_address(destination)),
      "l"(reinterpret_cast<uint64_t>(map)), "r"(shared_address(barrier)), "r"(col), "r"(row), "h"(ranks)
      : "memory");
}

// Store the box at `source` to (row, col); belongs to the thread's next tma_store_commit.
PEFT_KERNELS_DEVICE void tma_store(const TensorMap* map, const void* source, int row, int col) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];" ::"l"(
                   reinterpret_cast<uint64_t>(map)),
               "r"(shared_address(source)), "r"(col), "r"(row)
               : "memory");
}

PEFT_KERNELS_DEVICE void tma_store_commit() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Wait until at most `kPending` of this thread's groups may still read shared memory.
template <int kPending>
PEFT_KERNELS_DEVICE void tma_store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

// Wait until at most `kPending` of this thread's groups are not yet written to global memory.
template <int kPending>
PEFT_KERNELS_DEVICE void tma_store_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace peft_kernels::sm90
