// Twin of csrc/core/sm80/copy.cuh. That nobody writes what is loaded here is not checked.
#pragma once

namespace peft_kernels {

inline uint4 load_streamed(const void* address) {
  return *static_cast<const uint4*>(address);
}

inline uint4 load_shared_by_warps(const void* address) {
  return *static_cast<const uint4*>(address);
}

}  // namespace peft_kernels
