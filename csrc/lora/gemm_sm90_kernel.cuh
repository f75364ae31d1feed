// The kernel of gemm_sm90 and its launches, for one dtype and direction, with dropout or without: each has a source of
// its own that instantiates them, so that compilers can work side by side.
#pragma once

#include <algorithm>

#include "core/cluster_launch.h"
#include "core/launch.h"
#include "core/shared.cuh"
#include "lora/gemm_sm90_arguments.h"
#include "lora/gemm_sm90_launch.h"
#include "lora/gemm_sm90_shape.h"

namespace peft_kernels::lora {
namespace {

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    gemm_sm90_kernel(const __grid_constant__ GemmArguments arguments) {
#ifdef PEFT_KERNELS_SM90A
  constexpr uintptr_t kAlignment = Config::kAlignment;
  const uintptr_t start = (reinterpret_cast<uintptr_t>(shared_memory()) + kAlignment - 1) / kAlignment * kAlignment;
  gemm<Config>(arguments, *reinterpret_cast<GemmShared<Config>*>(start));
#else
  __trap();
#endif
}

template <typename Config>
void launch_gemm(const GemmParams& params, const GemmShape& tiles, cudaStream_t stream) {
  const auto kernel = gemm_sm90_kernel<Config>;
  const auto cluster = static_cast<unsigned>(tiles.cluster);
  LaunchShape shape{dim3(cluster), dim3(Config::kThreads), gemm_shared_bytes<Config>()};
  shape.cluster = cluster;
  const int resident = std::min(prepare_clusters(kGemmName, kernel, shape), params.multiprocessors / tiles.cluster);
  const auto arguments = gemm_arguments<Config>(params, tiles.cluster, tiles.group_rows, std::max(1, resident));
  shape.cooperative = true;
  shape.grid.x = cluster * static_cast<unsigned>(arguments.clusters);
  launch(kGemmName, kernel, shape, stream, arguments);
}

template <HalfType kType, Direction kDirection, bool kDropout, int kRank>
void launch_tiles(const GemmParams& params, cudaStream_t stream) {
  constexpr int kWide = gemm_wide(kRank, gemm_folds(kType, kDirection, kDropout), kDropout);
  constexpr int kNarrow = gemm_narrow(kWide, kDropout);
  const GemmShape tiles = gemm_shape(params.m, params.n, params.k, kWide, kNarrow, params.multiprocessors);
  if (tiles.block_n == kWide) {
    return launch_gemm<GemmConfig<kType, kRank, kDirection, kWide, kDropout>>(params, tiles, stream);
  }
  launch_gemm<GemmConfig<kType, kRank, kDirection, kNarrow, kDropout>>(params, tiles, stream);
}

}  // namespace

template <HalfType kType, Direction kDirection, bool kDropout>
void launch_gemm_sm90(const GemmParams& params, cudaStream_t stream) {
  switch (gemm_padded_rank(params.r)) {
    case 16:
      return launch_tiles<kType, kDirection, kDropout, 16>(params, stream);
    case 32:
      return launch_tiles<kType, kDirection, kDropout, 32>(params, stream);
    case 64:
      return launch_tiles<kType, kDirection, kDropout, 64>(params, stream);
    default:
      return launch_tiles<kType, kDirection, kDropout, 128>(params, stream);
  }
}

}  // namespace peft_kernels::lora
