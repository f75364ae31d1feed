// The copies of gemm_sm90: its arguments, the ring of stages, and the thread that fills it. Header and consumers:
// gemm_sm90.cuh.
#pragma once

#include <cstdint>

#include "core/flags.cuh"
#include "core/sm90/barrier.cuh"
#include "core/sm90/cluster.cuh"
#include "core/sm90/memory.cuh"
#include "core/sm90/tma.cuh"
#include "lora/gemm_sm90_config.h"
#include "lora/tile_order.h"

namespace peft_kernels::lora {

struct GemmArguments {
  // Boxes, (rows, columns) in elements; transposed operands in parentheses.
  sm90::TensorMap x;       // (128, 64)
  sm90::TensorMap w;       // (block n / 2, 64)  (32, 64)
  sm90::TensorMap down;    // (rank, 64)  (64, rank chunk)
  sm90::TensorMap up;      // (block n / 2, rank chunk)  (rank chunk / 2, 64)
  sm90::TensorMap s_half;  // (128, rank chunk)
  sm90::TensorMap y;       // (16, 64)

  const uint16_t* bias;    // (n,) or null
  float* s;                // (m, r)
  uint16_t* s_half_data;   // (m, padded rank)
  uint64_t* flags;         // (row blocks, consumers)
  uint64_t nonce;          // what a raised flag holds
  const float* scale_ptr;  // f, or null
  const int64_t* seed;     // of the mask
  float scale;             // f where scale_ptr is null
  float keep_scale;        // of what is not dropped
  uint32_t threshold;
  int m;
  int n;
  int k;
  int r;
  int cluster;   // 1 or 2 blocks
  int clusters;  // in the grid
  TileOrder order;
};

// This block's tile of the unit `number` of the order, of which its cluster takes one in arguments.clusters.
PEFT_KERNELS_DEVICE TileIndex tile_of(const GemmArguments& arguments, int64_t number) {
  const TileIndex unit = arguments.order.at(number);
  return {unit.m * arguments.cluster + static_cast<int>(sm90::cluster_rank()), unit.n};
}

// Where the ring of stages stands. Producer and consumers walk it in the same steps.
template <typename Config>
struct Ring {
  int slot = 0;
  uint32_t parity = 0;

  PEFT_KERNELS_DEVICE void advance() {
    if (++slot == Config::kStages) {
      slot = 0;
      parity ^= 1;
    }
  }
};

template <typename Config>
PEFT_KERNELS_DEVICE int steps_of(const GemmArguments& arguments) {
  return (arguments.k + Config::kBlockK - 1) / Config::kBlockK;
}

// Load a tile's columns from `col` on of an operand that the cluster shares, W or up, from `depth` on in what is summed
// over: the whole of it, half by half, where the block is alone, else this block's half to both.
template <typename Config, int kDepth>
PEFT_KERNELS_DEVICE void load_shared_operand(
    int cluster, uint8_t* destination, const sm90::TensorMap* map, uint64_t* full, int col, int depth) {
  constexpr int kBlocks = Config::kTransposed ? Config::kChunks : 1;
  constexpr int kLine = Config::kTransposed ? Config::kLineBytes : 2 * kDepth;
  constexpr int kHalf = (Config::kTransposed ? kDepth : Config::kBlockN) / Config::kHalves;
  for (int half = cluster > 1 ? static_cast<int>(sm90::cluster_rank()) : 0; half < Config::kHalves; half += cluster) {
    for (int block = 0; block < kBlocks; ++block) {
      uint8_t* to = destination + (block * Config::kHalves + half) * kHalf * kLine;
      const int box_row = Config::kTransposed ? depth + half * kHalf : col + half * kHalf;
      const int box_col = Config::kTransposed ? col + 64 * block : depth;
      if (cluster > 1) {
        sm90::tma_load_multicast(to, map, full, box_row, box_col, (1 << Config::kHalves) - 1);
      } else {
        sm90::tma_load(to, map, full, box_row, box_col);
      }
    }
  }
}

// One step of the reduction: x, W and, for the tiles that make S, down.
template <typename Config>
PEFT_KERNELS_DEVICE void load_step(const GemmArguments& arguments,
                                   GemmShared<Config>& shared,
                                   uint32_t& drained_parity,
                                   int slot,
                                   TileIndex tile,
                                   int step) {
  auto& stage = shared.stage[slot];
  uint64_t* full = &shared.full[slot];
  const int row = tile.m * Config::kBlockM, col = tile.n * Config::kBlockN, k = step * Config::kBlockK;
  const bool makes_s = tile.n == 0;
  sm90::barrier_expect(full, Config::kXBytes + Config::kWBytes + (makes_s ? Config::kDownBytes : 0));
  sm90::tma_load(stage.x, &arguments.x, full, row, k);
  load_shared_operand<Config, Config::kBlockK>(arguments.cluster, stage.w, &arguments.w, full, col, k);
  if (makes_s) {
    if (step == 0) {
      sm90::barrier_wait(&shared.drained, drained_parity);
      drained_parity ^= 1;
    }
    uint8_t* down = shared.down[slot];
    if constexpr (Config::kTransposed) {
      for (int block = 0; block < Config::kRankSteps; ++block) {
        sm90::tma_load(down + block * Config::kBlockK * Config::kRankLineBytes, &arguments.down, full, k,
                       block * Config::kRankChunk);
      }
    } else {
      sm90::tma_load(down, &arguments.down, full, 0, k);
    }
  }
}

// One step of the rank product: up, and S where another tile made it; the tile n = 0 puts its own S there.
template <typename Config>
PEFT_KERNELS_DEVICE void load_rank_step(
    const GemmArguments& arguments, GemmShared<Config>& shared, int slot, TileIndex tile, int step) {
  auto& stage = shared.stage[slot];
  uint64_t* full = &shared.full[slot];
  const int row = tile.m * Config::kBlockM, col = tile.n * Config::kBlockN, rank = step * Config::kRankChunk;
  const bool takes_s = tile.n != 0;
  sm90::barrier_expect(full, Config::kUpBytes + (takes_s ? Config::kSBytes : 0));
  load_shared_operand<Config, Config::kRankChunk>(arguments.cluster, stage.w, &arguments.up, full, col, rank);
  if (takes_s) {
    if (step == 0) {
      for (int consumer = 0; consumer < Config::kConsumers; ++consumer) {
        wait_until_published(&arguments.flags[Config::kConsumers * tile.m + consumer], arguments.nonce);
      }
      // The other block's stores of S, acquired with the flags, before this thread's copies of S.
      sm90::fence_async_global();
    }
    sm90::tma_load(stage.x, &arguments.s_half, full, row, rank);
  }
}

// The producer: one thread that starts the copies of all tiles, as far ahead as there are free stages.
template <typename Config>
PEFT_KERNELS_DEVICE void produce(const GemmArguments& arguments, GemmShared<Config>& shared) {
  const int steps = steps_of<Config>(arguments);
  Ring<Config> ring;
  uint32_t drained_parity = 0;
  for (int64_t number = blockIdx.x / arguments.cluster; number < arguments.order.count();
       number += arguments.clusters) {
    const TileIndex tile = tile_of(arguments, number);
    for (int step = 0; step < steps + Config::kRankSteps; ++step) {
      // By the consumers of all blocks that this one's copies reach.
      sm90::barrier_wait(&shared.free[ring.slot], ring.parity ^ 1);
      if (step < steps) {
        load_step(arguments, shared, drained_parity, ring.slot, tile, step);
      } else {
        load_rank_step(arguments, shared, ring.slot, tile, step - steps);
      }
      ring.advance();
    }
  }
}

}  // namespace peft_kernels::lora
