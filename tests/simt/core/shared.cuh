// Twin of csrc/core/shared.cuh.
#pragma once

namespace peft_kernels {

inline void* shared_memory() {
  return simt::shared_memory();
}

}  // namespace peft_kernels
