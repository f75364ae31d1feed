// Twin of csrc/core/sm90/cluster.cuh.
#pragma once

#include <cstdint>

#include "core/sm90/arch.cuh"

namespace peft_kernels::sm90 {

inline uint32_t cluster_rank() {
  return simt::cluster_rank();
}
inline uint32_t cluster_size() {
  return simt::cluster_size();
}
inline void cluster_arrive(SIMT_CALLER) {
  simt::cluster_arrive(file, line);
}
inline void cluster_wait(SIMT_CALLER) {
  simt::cluster_wait(file, line);
}
inline void cluster_sync(SIMT_CALLER) {
  simt::cluster_arrive(file, line);
  simt::cluster_wait(file, line);
}

template <typename T>
T* map_shared_rank(T* pointer, uint32_t rank) {
  return static_cast<T*>(simt::shared_pointer((simt::shared_address(pointer) & 0xFFFFFFu) | rank << 24));
}

}  // namespace peft_kernels::sm90
