// What      a linear layer and its low-rank update in one kernel, for Hopper; and the gradient of its input
// Equation  forward y = x W^T + bias + f S B^T, S = x A^T | backward dX = dY W + dS A, dS = f dY B  (Hu et al. 2021,
//           arXiv:2106.09685, section 4.1; docs/design/lora.md); dropout: S = drop(x) A^T, dX = dY W + drop(dS A)
// Tensors   as GemmParams in params.h; here x, W, down (A or B), up (B or A), S and y stand for both directions
// Tiles     persistent clusters of one block or two walk tiles of y, 128 x 256, 192 at rank 128, or 128 (tile_order.h,
//           gemm_sm90_shape.h), two blocks one below the other; the tile n = 0 of a row block also makes S and raises
//           the row block's flags, the others take S as the last steps of their reduction
// Bound     2 M N (K + r) flops at the tensor cores' rate; one read of x and W, one write of y
// Refused   by the launcher (gemm_sm90.cu)
#pragma once

#include <cstdint>

#include "core/sm90/barrier.cuh"
#include "core/sm90/cluster.cuh"
#include "core/sm90/memory.cuh"
#include "core/sm90/registers.cuh"
#include "core/sm90/tma.cuh"
#include "lora/gemm_sm90_config.h"
#include "lora/gemm_sm90_epilogue.cuh"
#include "lora/gemm_sm90_producer.cuh"
#include "lora/gemm_sm90_products.cuh"

namespace peft_kernels::lora {

// A consumer warpgroup: 64 rows of every tile of the block.
template <typename Config>
PEFT_KERNELS_DEVICE void consume(const GemmArguments& arguments, GemmShared<Config>& shared, int consumer) {
  const Factors factors = factors_of<Config>(arguments);
  const int steps = steps_of<Config>(arguments), lane = threadIdx.x % 32;
  Ring<Config> ring;
  for (int64_t number = blockIdx.x / arguments.cluster; number < arguments.order.count();
       number += arguments.clusters) {
    const TileIndex tile = tile_of(arguments, number);
    float rY[Config::kBlockN / 2];
    uint32_t rBias[Config::kBiasWords];
    int slots[Config::kRankSteps];
    if (tile.n == 0) {
      if (lane == 0) {
        // Down is about to come where the last tile's y leaves from.
        sm90::tma_store_wait_read<0>();
        sm90::barrier_arrive(&shared.drained);
      }
      float rS[Config::kRank / 2];
      if constexpr (Config::kDropsX) {
        reduce_dropped<Config>(arguments, shared, ring, steps, tile.m, consumer, rY, rS);
      } else {
        reduce<Config, true>(shared, ring, steps, arguments.cluster, consumer, rY, rS, [] {});
      }
      wait_rank_steps(shared, ring, slots);
      publish_s<Config>(arguments, shared, slots, tile.m, consumer, factors, rS);
      load_bias<Config>(arguments, tile.n, rBias);
      if constexpr (Config::kFolded) {
        add_rank_steps<Config>(shared, slots, arguments.cluster, consumer, rY);
      }
      // Both have multiplied by down, before y is staged where it was.
      sm90::named_barrier_sync(kBothConsumersBarrier, Config::kConsumers * Config::kWarpgroup);
    } else {
      float rUnused[Config::kRank / 2];
      reduce<Config, false>(shared, ring, steps, arguments.cluster, consumer, rY, rUnused,
                            [&] { load_bias<Config>(arguments, tile.n, rBias); });
      if constexpr (!Config::kFolded) {
        wait_rank_steps(shared, ring, slots);
      }
    }
    finish<Config>(arguments, shared, slots, tile, consumer, factors.product, rY, rBias);
    if constexpr (!Config::kFolded) {
      free_rank_steps(shared, slots, arguments.cluster);
    }
  }
  if (lane == 0) {
    // The staging buffers must outlive the last stores that read them.
    sm90::tma_store_wait<0>();
  }
}

template <typename Config>
PEFT_KERNELS_DEVICE void gemm(const GemmArguments& arguments, GemmShared<Config>& shared) {
  if (threadIdx.x == 0) {
    for (int slot = 0; slot < Config::kStages; ++slot) {
      sm90::barrier_init(&shared.full[slot], 1);
      sm90::barrier_init(&shared.free[slot], Config::kConsumerWarps * arguments.cluster);
    }
    sm90::barrier_init(&shared.drained, Config::kConsumerWarps);
    // The barriers, for TMA and, after the barrier below, for the other threads of the cluster.
    sm90::fence_barrier_init();
    sm90::fence_async_shared();
  }
  sm90::cluster_sync();

  const int warpgroup = threadIdx.x / Config::kWarpgroup;
  if (warpgroup == 0) {
    sm90::release_registers<Config::kProducerRegisters>();
    if (threadIdx.x == 0) {
      produce<Config>(arguments, shared);
    }
  } else {
    sm90::acquire_registers<Config::kConsumerRegisters>();
    consume<Config>(arguments, shared, warpgroup - 1);
  }
  // The other block may still arrive at this one's barriers, or copy to its last stages.
  __syncwarp();
  sm90::cluster_sync();
}

}  // namespace peft_kernels::lora
