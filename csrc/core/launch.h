// Kernel launches whose errors name the kernel.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <utility>

#include "core/error.h"

namespace peft_kernels {

// Number of blocks that cover `size` elements.
inline int64_t ceil_div(int64_t size, int64_t block) {
  return (size + block - 1) / block;
}

struct LaunchShape {
  dim3 grid;
  dim3 block;
  size_t shared_bytes = 0;
  bool cooperative = false;  // all blocks resident together, or the launch fails
};

// Launch on the current device, which must be the stream's. The <<<>>> syntax drops the status, and cudaGetLastError
// also reports what an earlier call left behind; cudaLaunchKernelEx returns the status of this launch alone.
template <typename... Params, typename... Args>
void launch(const char* name, void (*kernel)(Params...), LaunchShape shape, cudaStream_t stream, Args&&... args) {
  cudaLaunchConfig_t config = {};
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = stream;
  cudaLaunchAttribute cooperative = {};
  cooperative.id = cudaLaunchAttributeCooperative;
  cooperative.val.cooperative = 1;
  config.attrs = &cooperative;
  config.numAttrs = shape.cooperative ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...), name);
}

}  // namespace peft_kernels
