// What a kernel needs before launches of clusters of CTAs that take a Hopper multiprocessor's shared memory.
#pragma once

#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>

#include "core/error.h"
#include "core/launch.h"

namespace peft_kernels {

// Bytes of shared memory that a block may take on sm_90.
constexpr int kHopperSharedLimit = 227 * 1024;

// Make a kernel ready for launches of this shape on the current device, an sm_90, and return how many such clusters it
// can hold at a time, whatever the shape's grid. The device is asked once for each kernel and shape: multiprocessors
// that are switched off, or shared out among processes, may leave none with room, which is an error.
template <typename... Params>
int prepare_clusters(const char* name, void (*kernel)(Params...), const LaunchShape& shape) {
  const int device = require_hopper(name);
  static std::mutex mutex;
  static std::map<std::tuple<int, void (*)(Params...), size_t, unsigned>, int> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find({device, kernel, shape.shared_bytes, shape.cluster});
  if (found != known.end()) {
    return found->second;
  }
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kHopperSharedLimit), name);
  // All of the multiprocessor's memory as shared memory, so that a second block finds room beside the first.
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared),
        name);
  cudaLaunchAttribute attributes[2] = {};
  const cudaLaunchConfig_t config = launch_config(shape, nullptr, attributes);
  int clusters = 0;
  check(cudaOccupancyMaxActiveClusters(&clusters, kernel, &config), name);
  if (clusters == 0) {
    throw std::runtime_error(std::string(name) + ": device " + std::to_string(device) + " cannot hold a cluster of " +
                             std::to_string(shape.cluster) + " blocks with " + std::to_string(shape.shared_bytes) +
                             " bytes of shared memory each");
  }
  known[{device, kernel, shape.shared_bytes, shape.cluster}] = clusters;
  return clusters;
}

}  // namespace peft_kernels
