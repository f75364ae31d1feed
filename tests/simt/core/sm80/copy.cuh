// Twin of csrc/core/sm80/copy.cuh: counts what is streamed. That nobody writes what is loaded here is not checked.
#pragma once

namespace peft_kernels {
namespace twin {

// Of all launches of the program.
inline int64_t streamed_bytes = 0;

}  // namespace twin

inline uint4 load_streamed(const void* address) {
  twin::streamed_bytes += sizeof(uint4);
  return *static_cast<const uint4*>(address);
}

inline uint4 load_shared_by_warps(const void* address) {
  return *static_cast<const uint4*>(address);
}

}  // namespace peft_kernels
