// Launches of clusters of CTAs that take a Hopper multiprocessor's shared memory.
#pragma once

#include <cuda_runtime.h>

#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

#include "core/error.h"
#include "core/launch.h"

namespace peft_kernels {

// Bytes of shared memory that a block may take on sm_90.
constexpr int kHopperSharedLimit = 227 * 1024;

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

inline cudaLaunchAttribute cluster_attribute(unsigned cluster) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = cluster;
  attribute.val.clusterDim.y = 1;
  attribute.val.clusterDim.z = 1;
  return attribute;
}

inline cudaLaunchConfig_t cluster_config(const LaunchShape& shape,
                                         cudaStream_t stream,
                                         cudaLaunchAttribute* attribute) {
  cudaLaunchConfig_t config = {};
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = stream;
  config.attrs = attribute;
  config.numAttrs = 1;
  return config;
}

// Make a kernel ready for launches of this shape on the current device, an sm_90. The device is asked once for each
// kernel and shape whether it can hold such a cluster at all: multiprocessors that are switched off, or shared out
// among processes, may leave none with room.
template <typename... Params>
void prepare_clusters(const char* name, void (*kernel)(Params...), const LaunchShape& shape, unsigned cluster) {
  const int device = require_hopper(name);
  static std::mutex mutex;
  static std::set<std::tuple<int, void (*)(Params...), size_t, unsigned>> known;
  const std::lock_guard<std::mutex> lock(mutex);
  if (known.count({device, kernel, shape.shared_bytes, cluster}) > 0) {
    return;
  }
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kHopperSharedLimit), name);
  // All of the multiprocessor's memory as shared memory, so that a second block finds room beside the first.
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared),
        name);
  cudaLaunchAttribute attribute = cluster_attribute(cluster);
  const cudaLaunchConfig_t config = cluster_config(shape, nullptr, &attribute);
  int clusters = 0;
  check(cudaOccupancyMaxActiveClusters(&clusters, kernel, &config), name);
  if (clusters == 0) {
    throw std::runtime_error(std::string(name) + ": device " + std::to_string(device) + " cannot hold a cluster of " +
                             std::to_string(cluster) + " blocks with " + std::to_string(shape.shared_bytes) +
                             " bytes of shared memory each");
  }
  known.insert({device, kernel, shape.shared_bytes, cluster});
}

// Launch clusters of `cluster` blocks, for which prepare_clusters was called, on the current device, which must be the
// stream's.
template <typename... Params, typename... Args>
void launch_clusters(const char* name,
                     void (*kernel)(Params...),
                     const LaunchShape& shape,
                     unsigned cluster,
                     cudaStream_t stream,
                     Args&&... args) {
  cudaLaunchAttribute attribute = cluster_attribute(cluster);
  const cudaLaunchConfig_t config = cluster_config(shape, stream, &attribute);
  check(cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...), name);
}

}  // namespace peft_kernels
