// The products of gemm_sm90: one consumer warpgroup's tensor cores, and the stages that they read. Header:
// gemm_sm90.cuh.
#pragma once

#include <cstdint>

#include "core/sm80/matrix.cuh"
#include "core/sm90/barrier.cuh"
#include "core/sm90/memory.cuh"
#include "core/sm90/wgmma.cuh"
#include "core/sm90/wgmma_registers.cuh"
#include "lora/gemm_sm90_config.h"
#include "lora/gemm_sm90_dropout.cuh"
#include "lora/gemm_sm90_producer.cuh"

namespace peft_kernels::lora {

// Tell the producers of the cluster that this warp has read a stage: after wgmma_wait, which speaks for the warp alone.
template <typename Config>
PEFT_KERNELS_DEVICE void free_stage(GemmShared<Config>& shared, int slot, int cluster) {
  if (static_cast<int>(threadIdx.x % 32) < cluster) {
    sm90::barrier_hand_back(&shared.free[slot], threadIdx.x % 32);
  }
}

// The products of one stage: 64 rows of x by W, and by down where S is made.
template <typename Config, bool kMakesS>
PEFT_KERNELS_DEVICE void multiply_stage(GemmShared<Config>& shared,
                                        int slot,
                                        int consumer,
                                        bool accumulate,
                                        float (&rY)[Config::kBlockN / 2],
                                        float (&rS)[Config::kRank / 2]) {
  constexpr int kLine = Config::kLineBytes;
  // How far 16 steps along the reduction are: within a line, or 16 lines on where lines are of other columns.
  constexpr uint32_t kAlongW = Config::kTransposed ? 16 * kLine : 32;
  constexpr uint32_t kAlongDown = Config::kTransposed ? 16 * Config::kRankLineBytes : 32;
  constexpr uint32_t kDownWidth = Config::kTransposed ? Config::kRankLineBytes : kLine;
  constexpr uint32_t kWBlock = Config::kTransposed ? Config::kBlockK * kLine : 16;
  constexpr uint32_t kDownBlock = Config::kTransposed ? Config::kBlockK * kDownWidth : 16;
  auto& stage = shared.stage[slot];
  const uint32_t sX = sm90::shared_address(stage.x) + consumer * Config::kConsumerRows * kLine;
  const uint32_t sW = sm90::shared_address(stage.w);
  const uint32_t sDown = sm90::shared_address(shared.down[slot]);
#pragma unroll
  for (int i = 0; i < Config::kBlockK / 16; ++i) {
    const bool add = accumulate || i > 0;
    const uint64_t x = sm90::operand_descriptor(sX + 32 * i, kLine);
    sm90::wgmma<Config::kType, Config::kBlockN, Config::kTransposed>(
        rY, x, sm90::operand_descriptor(sW + kAlongW * i, kLine, kWBlock), add);
    if constexpr (kMakesS) {
      sm90::wgmma<Config::kType, Config::kRank, Config::kTransposed>(
          rS, x, sm90::operand_descriptor(sDown + kAlongDown * i, kDownWidth, kDownBlock), add);
    }
  }
}

// The 64 rows of x of one stage with elements dropped, as the first operands of four products. `row` and `col` are the
// stage's first of x.
template <typename Config>
PEFT_KERNELS_DEVICE void load_dropped(GemmShared<Config>& shared,
                                      int slot,
                                      int consumer,
                                      int64_t seed,
                                      uint32_t threshold,
                                      int row,
                                      int col,
                                      uint32_t (&rX)[Config::kBlockK / 16][4]) {
  constexpr int kLine = Config::kLineBytes;
  const int warp = threadIdx.x % Config::kWarpgroup / 32, lane = threadIdx.x % 32;
  const int warp_row = consumer * Config::kConsumerRows + warp * Config::kWarpRows;
  const uint8_t* sX = shared.stage[slot].x;
#pragma unroll
  for (int i = 0; i < Config::kBlockK / 16; ++i) {
    load_matrices(rX[i], sX + sm90::swizzled((warp_row + lane % 16) * kLine + 32 * i + 16 * (lane / 16), kLine));
  }
  const Kept kept = draw_kept(seed, threshold, row + warp_row + lane / 4, col);
#pragma unroll
  for (int i = 0; i < Config::kBlockK / 16; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      rX[i][j] &= kept.pair(j % 2, 2 * i + j / 2);
    }
  }
}

// The reduction over k of a tile that makes S of x with elements dropped: while the tensor cores multiply a stage by W,
// the registers get its x, and then down follows.
template <typename Config>
PEFT_KERNELS_DEVICE void reduce_dropped(const GemmArguments& arguments,
                                        GemmShared<Config>& shared,
                                        Ring<Config>& ring,
                                        int steps,
                                        int tile_m,
                                        int consumer,
                                        float (&rY)[Config::kBlockN / 2],
                                        float (&rS)[Config::kRank / 2]) {
  const int64_t seed = *arguments.seed;
  uint32_t rX[Config::kBlockK / 16][4] = {};
  int previous = 0;
  for (int step = 0; step < steps; ++step) {
    sm90::barrier_wait(&shared.full[ring.slot], ring.parity);
    sm90::wgmma_fence();
    multiply_stage<Config, false>(shared, ring.slot, consumer, step > 0, rY, rS);
    sm90::wgmma_commit();
    if (step > 0) {
      // For the last stage's products by down, and so for all that read it.
      sm90::wgmma_wait<1>();
      sm90::wgmma_operands(rX);
      free_stage(shared, previous, arguments.cluster);
    }
    load_dropped(shared, ring.slot, consumer, seed, arguments.threshold, tile_m * Config::kBlockM,
                 step * Config::kBlockK, rX);
    sm90::wgmma_fence();
    const uint32_t sDown = sm90::shared_address(shared.down[ring.slot]);
#pragma unroll
    for (int i = 0; i < Config::kBlockK / 16; ++i) {
      sm90::wgmma_registers<Config::kType>(rS, rX[i], sm90::operand_descriptor(sDown + 32 * i, Config::kLineBytes),
                                           step > 0 || i > 0);
    }
    sm90::wgmma_commit();
    previous = ring.slot;
    ring.advance();
  }
  sm90::wgmma_wait<0>();
  sm90::wgmma_operands(rX);
  sm90::wgmma_results(rY);
  sm90::wgmma_results(rS);
  free_stage(shared, previous, arguments.cluster);
}

// The products of one rank step: 64 rows of S by up, for all columns of the tile.
template <typename Config>
PEFT_KERNELS_DEVICE void multiply_rank_step(typename GemmShared<Config>::Stage& stage,
                                            int consumer,
                                            float (&rY)[Config::kBlockN / 2]) {
  constexpr int kLine = Config::kRankLineBytes;
  constexpr uint32_t kUpWidth = Config::kTransposed ? Config::kLineBytes : kLine;
  constexpr uint32_t kAlongUp = Config::kTransposed ? 16 * kUpWidth : 32;
  constexpr uint32_t kUpBlock = Config::kTransposed ? Config::kRankChunk * kUpWidth : 16;
  const uint32_t sS = sm90::shared_address(stage.x) + consumer * Config::kConsumerRows * kLine;
  const uint32_t sUp = sm90::shared_address(stage.w);
#pragma unroll
  for (int i = 0; i < Config::kRankChunk / 16; ++i) {
    sm90::wgmma<Config::kType, Config::kBlockN, Config::kTransposed>(
        rY, sm90::operand_descriptor(sS + 32 * i, kLine),
        sm90::operand_descriptor(sUp + kAlongUp * i, kUpWidth, kUpBlock), true);
  }
}

// The reduction over k, and over the ranks where another tile made S and it needs no product of its own. A stage is
// freed one step late, so that the tensor cores always have the next step's products. `before_the_end` is done while
// they have the last ones.
template <typename Config, bool kMakesS, typename BeforeTheEnd>
PEFT_KERNELS_DEVICE void reduce(GemmShared<Config>& shared,
                                Ring<Config>& ring,
                                int steps,
                                int cluster,
                                int consumer,
                                float (&rY)[Config::kBlockN / 2],
                                float (&rS)[Config::kRank / 2],
                                BeforeTheEnd before_the_end) {
  int previous = 0;
  for (int step = 0; step < steps; ++step) {
    sm90::barrier_wait(&shared.full[ring.slot], ring.parity);
    sm90::wgmma_fence();
    multiply_stage<Config, kMakesS>(shared, ring.slot, consumer, step > 0, rY, rS);
    sm90::wgmma_commit();
    if (step > 0) {
      sm90::wgmma_wait<1>();
      free_stage(shared, previous, cluster);
    }
    previous = ring.slot;
    ring.advance();
  }
  if constexpr (Config::kFolded && !kMakesS) {
#pragma unroll
    for (int step = 0; step < Config::kRankSteps; ++step) {
      sm90::barrier_wait(&shared.full[ring.slot], ring.parity);
      sm90::wgmma_fence();
      multiply_rank_step<Config>(shared.stage[ring.slot], consumer, rY);
      sm90::wgmma_commit();
      sm90::wgmma_wait<1>();
      free_stage(shared, previous, cluster);
      previous = ring.slot;
      ring.advance();
    }
  }
  before_the_end();
  sm90::wgmma_wait<0>();
  sm90::wgmma_results(rY);
  if constexpr (kMakesS) {
    sm90::wgmma_results(rS);
  }
  free_stage(shared, previous, cluster);
}

// Wait for the stages of the tile's rank steps, and name them.
template <typename Config>
PEFT_KERNELS_DEVICE void wait_rank_steps(GemmShared<Config>& shared,
                                         Ring<Config>& ring,
                                         int (&slots)[Config::kRankSteps]) {
#pragma unroll
  for (int step = 0; step < Config::kRankSteps; ++step) {
    sm90::barrier_wait(&shared.full[ring.slot], ring.parity);
    slots[step] = ring.slot;
    ring.advance();
  }
}

// S up^T for 64 rows and one chunk of columns.
template <typename Config>
PEFT_KERNELS_DEVICE void rank_product(GemmShared<Config>& shared,
                                      const int (&slots)[Config::kRankSteps],
                                      int consumer,
                                      int chunk,
                                      float (&rP)[Config::kChunkN / 2]) {
  constexpr int kLine = Config::kRankLineBytes;
  constexpr uint32_t kUpWidth = Config::kTransposed ? Config::kLineBytes : kLine;
  constexpr uint32_t kAlongUp = Config::kTransposed ? 16 * kUpWidth : 32;
  constexpr uint32_t kUpChunk = Config::kTransposed ? Config::kRankChunk * kUpWidth : Config::kChunkN * kUpWidth;
  sm90::wgmma_fence();
#pragma unroll
  for (int step = 0; step < Config::kRankSteps; ++step) {
    auto& stage = shared.stage[slots[step]];
    const uint32_t sS = sm90::shared_address(stage.x) + consumer * Config::kConsumerRows * kLine;
    const uint32_t sUp = sm90::shared_address(stage.w) + chunk * kUpChunk;
#pragma unroll
    for (int i = 0; i < Config::kRankChunk / 16; ++i) {
      sm90::wgmma<Config::kType, Config::kChunkN, Config::kTransposed>(
          rP, sm90::operand_descriptor(sS + 32 * i, kLine), sm90::operand_descriptor(sUp + kAlongUp * i, kUpWidth),
          step > 0 || i > 0);
    }
  }
  sm90::wgmma_commit();
  sm90::wgmma_wait<0>();
  sm90::wgmma_results(rP);
}

// Free the stages of the rank steps that wait_rank_steps has named.
template <typename Config>
PEFT_KERNELS_DEVICE void free_rank_steps(GemmShared<Config>& shared,
                                         const int (&slots)[Config::kRankSteps],
                                         int cluster) {
#pragma unroll
  for (int step = 0; step < Config::kRankSteps; ++step) {
    free_stage(shared, slots[step], cluster);
  }
}

// The rank steps that reduce leaves out where the tile makes S itself.
template <typename Config>
PEFT_KERNELS_DEVICE void add_rank_steps(GemmShared<Config>& shared,
                                        const int (&slots)[Config::kRankSteps],
                                        int cluster,
                                        int consumer,
                                        float (&rY)[Config::kBlockN / 2]) {
  sm90::wgmma_fence();
#pragma unroll
  for (int step = 0; step < Config::kRankSteps; ++step) {
    multiply_rank_step<Config>(shared.stage[slots[step]], consumer, rY);
  }
  sm90::wgmma_commit();
  sm90::wgmma_wait<0>();
  sm90::wgmma_results(rY);
  free_rank_steps(shared, slots, cluster);
}

}  // namespace peft_kernels::lora
