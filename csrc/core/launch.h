// Kernel launches whose errors name the kernel.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

#include "core/error.h"

namespace peft_kernels {

// Number of blocks that cover `size` elements.
inline int64_t ceil_div(int64_t size, int64_t block) {
  return (size + block - 1) / block;
}

// Throw unless the current device is of the one architecture that wgmma and setmaxnreg exist on.
inline int require_hopper(const char* name) {
  int device = 0, major = 0, minor = 0;
  check(cudaGetDevice(&device), name);
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), name);
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), name);
  if (major != 9 || minor != 0) {
    throw std::runtime_error(std::string(name) + " needs an sm_90 device, device " + std::to_string(device) +
                             " is sm_" + std::to_string(major) + std::to_string(minor));
  }
  return device;
}

struct LaunchShape {
  dim3 grid;
  dim3 block;
  size_t shared_bytes = 0;
  bool cooperative = false;  // all blocks resident together, or the launch fails
  unsigned cluster = 0;      // blocks of a cluster, where the kernel has clusters
};

inline cudaLaunchConfig_t launch_config(const LaunchShape& shape,
                                        cudaStream_t stream,
                                        cudaLaunchAttribute (&attributes)[2]) {
  cudaLaunchConfig_t config = {};
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  if (shape.cooperative) {
    attributes[config.numAttrs].id = cudaLaunchAttributeCooperative;
    attributes[config.numAttrs++].val.cooperative = 1;
  }
  if (shape.cluster > 0) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs++].val.clusterDim = {shape.cluster, 1, 1};
  }
  return config;
}

// Launch on the current device, which must be the stream's. The <<<>>> syntax drops the status, and cudaGetLastError
// also reports what an earlier call left behind; cudaLaunchKernelEx returns the status of this launch alone.
template <typename... Params, typename... Args>
void launch(const char* name, void (*kernel)(Params...), LaunchShape shape, cudaStream_t stream, Args&&... args) {
  cudaLaunchAttribute attributes[2] = {};
  const cudaLaunchConfig_t config = launch_config(shape, stream, attributes);
  check(cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...), name);
}

}  // namespace peft_kernels
