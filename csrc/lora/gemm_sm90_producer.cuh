// The copies of gemm_sm90: its arguments, the ring of stages, and the thread that fills it. Header and consumers:
// gemm_sm90.cuh.
#pragma once

#include <cstdint>

#include "core/flags.cuh"
#include "core/sm90/barrier.cuh"
#include "core/sm90/memory.cuh"
#include "core/sm90/tma.cuh"
#include "lora/gemm_sm90_config.h"
#include "lora/tile_order.h"

namespace peft_kernels::lora {

struct GemmArguments {
  // Boxes, (rows, columns) in elements; transposed operands in parentheses.
  sm90::TensorMap x;       // (128, 64)
  sm90::TensorMap w;       // (block n, 64)  (64, 64)
  sm90::TensorMap down;    // (rank, 64)  (64, rank chunk)
  sm90::TensorMap up;      // (block n, rank chunk)  (rank chunk, 64)
  sm90::TensorMap s_half;  // (128, rank chunk)
  sm90::TensorMap y;       // (16, 64)

  const uint16_t* bias;    // (n,) or null
  float* s;                // (m, r)
  uint16_t* s_half_data;   // (m, padded rank)
  uint64_t* flags;         // (row blocks, consumers)
  uint64_t nonce;          // what a raised flag holds
  const float* scale_ptr;  // f, or null
  float scale;             // f where scale_ptr is null
  int m;
  int n;
  int k;
  int r;
  TileOrder order;
};

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
  if constexpr (Config::kTransposed) {
    for (int block = 0; block < Config::kChunks; ++block) {
      sm90::tma_load(stage.w + block * Config::kBlockK * Config::kLineBytes, &arguments.w, full, k, col + 64 * block);
    }
  } else {
    sm90::tma_load(stage.w, &arguments.w, full, col, k);
  }
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
  if constexpr (Config::kTransposed) {
    for (int block = 0; block < Config::kChunks; ++block) {
      sm90::tma_load(stage.w + block * Config::kRankChunk * Config::kLineBytes, &arguments.up, full, rank,
                     col + 64 * block);
    }
  } else {
    sm90::tma_load(stage.w, &arguments.up, full, col, rank);
  }
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
  for (int64_t number = blockIdx.x; number < arguments.order.count(); number += gridDim.x) {
    const TileIndex tile = arguments.order.at(number);
    for (int step = 0; step < steps + Config::kRankSteps; ++step) {
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
