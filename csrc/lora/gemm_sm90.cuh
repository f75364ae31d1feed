// What      a linear layer and its low-rank update in one kernel, for Hopper; and the gradient of its input
// Equation  forward y = x W^T + bias + f S B^T, S = x A^T | backward dX = dY W + dS A, dS = f dY B  (Hu et al. 2021,
//           arXiv:2106.09685, section 4.1; docs/design/lora.md)
// Tensors   as GemmParams in params.h; here x, W, down (A or B), up (B or A), S and y stand for both directions
// Tiles     persistent blocks walk 128 x 256 tiles of y, 192 at rank 128 (tile_order.h); the tile n = 0 of a row block
// also makes S and
//           raises the row block's flags, the others take S as the last steps of their reduction
// Bound     2 M N (K + r) flops at the tensor cores' rate; one read of x and W, one write of y
// Refused   by the launcher (gemm_sm90.cu)
#pragma once

#include <cstdint>

#include "core/flags.cuh"
#include "core/sm90/barrier.cuh"
#include "core/sm90/memory.cuh"
#include "core/sm90/registers.cuh"
#include "core/sm90/swizzle.h"
#include "core/sm90/tma.cuh"
#include "core/sm90/wgmma.cuh"
#include "lora/gemm_sm90_config.h"
#include "lora/gemm_sm90_producer.cuh"
#include "lora/tile_order.h"

namespace peft_kernels::lora {

// Tell the producer that this warp has read a stage: after wgmma_wait, which speaks for the warp alone.
template <typename Config>
PEFT_KERNELS_DEVICE void free_stage(GemmShared<Config>& shared, int slot) {
  if (threadIdx.x % 32 == 0) {
    sm90::barrier_arrive(&shared.free[slot]);
  }
}

// The products of one stage: 64 rows of x by W, and by down where S is made.
template <typename Config, bool kMakesS>
PEFT_KERNELS_DEVICE void multiply_stage(typename GemmShared<Config>::Stage& stage,
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
  const uint32_t sX = sm90::shared_address(stage.x) + consumer * Config::kConsumerRows * kLine;
  const uint32_t sW = sm90::shared_address(stage.w);
  const uint32_t sDown = sm90::shared_address(stage.down);
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

// The reduction over k. A stage is freed one step late, so that the tensor cores always have the next step's products.
template <typename Config, bool kMakesS>
PEFT_KERNELS_DEVICE void reduce(GemmShared<Config>& shared,
                                Ring<Config>& ring,
                                int steps,
                                int consumer,
                                float (&rY)[Config::kBlockN / 2],
                                float (&rS)[Config::kRank / 2]) {
  int previous = 0;
  for (int step = 0; step < steps; ++step) {
    sm90::barrier_wait(&shared.full[ring.slot], ring.parity);
    sm90::wgmma_fence();
    multiply_stage<Config, kMakesS>(shared.stage[ring.slot], consumer, step > 0, rY, rS);
    sm90::wgmma_commit();
    if (step > 0) {
      sm90::wgmma_wait<1>();
      free_stage(shared, previous);
    }
    previous = ring.slot;
    ring.advance();
  }
  sm90::wgmma_wait<0>();
  sm90::wgmma_results(rY);
  if constexpr (kMakesS) {
    sm90::wgmma_results(rS);
  }
  free_stage(shared, previous);
}

// Row and column, in a 64-row tile, of accumulator `i` of this thread.
PEFT_KERNELS_DEVICE int row_of(int i) {
  const int thread = threadIdx.x % 128;
  return 16 * (thread / 32) + thread % 32 / 4 + 8 * (i / 2 % 2);
}

PEFT_KERNELS_DEVICE int col_of(int i) {
  return 8 * (i / 4) + 2 * (threadIdx.x % 4) + i % 2;
}

// S out of the registers: float32 for the caller, half precision for the row block's other tiles with the flag that
// says so, and half precision to the stages of this tile's rank steps, laid out as TMA would.
// Columns past the rank become zeros, whatever x holds: 0 * inf in the padding must not reach y.
template <typename Config>
PEFT_KERNELS_DEVICE void publish_s(const GemmArguments& arguments,
                                   GemmShared<Config>& shared,
                                   const int (&slots)[Config::kRankSteps],
                                   int tile_m,
                                   int consumer,
                                   float factor,
                                   const float (&rS)[Config::kRank / 2]) {
  constexpr int kLine = Config::kRankLineBytes;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int tile_row = consumer * Config::kConsumerRows + row_of(2 * half);
    const int row = tile_m * Config::kBlockM + tile_row;
    float* gS = arguments.s + static_cast<int64_t>(row) * arguments.r;
    uint16_t* gHalf = arguments.s_half_data + static_cast<int64_t>(row) * Config::kRank;
#pragma unroll
    for (int i = 2 * half; i < Config::kRank / 2; i += 4) {
      const int col = col_of(i);
      const float s_0 = col < arguments.r ? rS[i] * factor : 0.0f;
      const float s_1 = col + 1 < arguments.r ? rS[i + 1] * factor : 0.0f;
      const uint32_t halves = sm90::pack_halves<Config::kType>(s_0, s_1);
      const uint32_t sS = sm90::shared_address(shared.stage[slots[8 * (i / 4) / Config::kRankChunk]].x);
      sm90::store_shared(sm90::swizzled(sS + tile_row * kLine + 2 * (col % Config::kRankChunk), kLine), halves);
      if (row < arguments.m) {
        if (col < arguments.r) {
          gS[col] = s_0;
        }
        if (col + 1 < arguments.r) {
          gS[col + 1] = s_1;
        }
        sm90::store_global(gHalf + col, halves);
      }
    }
  }
  // This thread's half-precision S: in global memory for the TMA loads of the blocks that acquire the flag, in
  // shared memory for the tensor cores, whose products the warpgroup starts after the barrier.
  sm90::fence_async_global();
  sm90::fence_async_shared();
  sm90::named_barrier_sync(kConsumerBarrier + consumer, Config::kWarpgroup);
  if (threadIdx.x % Config::kWarpgroup == 0) {
    publish(&arguments.flags[Config::kConsumers * tile_m + consumer], arguments.nonce);
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

// One chunk of y, 64 rows by 64 columns, through shared memory to TMA. `rP` holds its elements.
template <typename Config>
PEFT_KERNELS_DEVICE void store_chunk(const GemmArguments& arguments,
                                     GemmShared<Config>& shared,
                                     int consumer,
                                     int row,
                                     int col,
                                     const float (&rP)[Config::kChunkN / 2]) {
  const int thread = threadIdx.x % Config::kWarpgroup, lane = threadIdx.x % 32;
  const uint32_t barrier = kConsumerBarrier + consumer;
  uint8_t* staging = shared.staging[consumer];
  if (thread == 0) {
    sm90::tma_store_wait_read<0>();
  }
  sm90::named_barrier_sync(barrier, Config::kWarpgroup);

  const int staged_row = 16 * (thread / 32) + lane % 16;
  const uint32_t sY = sm90::shared_address(staging) + staged_row * Config::kLineBytes;
#pragma unroll
  for (int i = 0; i < Config::kChunkN / 2; i += 8) {
    uint32_t words[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      words[j] = sm90::pack_halves<Config::kType>(rP[i + 2 * j], rP[i + 2 * j + 1]);
    }
    sm90::store_matrices(sm90::swizzled(sY + 16 * (i / 4 + lane / 16), Config::kLineBytes), words[0], words[1],
                         words[2], words[3]);
  }
  // This thread's part of the chunk, for the TMA store that the warpgroup's first thread starts after the barrier.
  sm90::fence_async_shared();
  sm90::named_barrier_sync(barrier, Config::kWarpgroup);
  if (thread == 0) {
    sm90::tma_store(&arguments.y, staging, row, col);
    sm90::tma_store_commit();
  }
}

// The tile's end: the rank product and the bias join the reduction, chunk after chunk.
template <typename Config>
PEFT_KERNELS_DEVICE void finish(const GemmArguments& arguments,
                                GemmShared<Config>& shared,
                                const int (&slots)[Config::kRankSteps],
                                TileIndex tile,
                                int consumer,
                                float factor,
                                const float (&rY)[Config::kBlockN / 2]) {
  const int row = tile.m * Config::kBlockM + consumer * Config::kConsumerRows;
#pragma unroll
  for (int chunk = 0; chunk < Config::kChunks; ++chunk) {
    const int col = tile.n * Config::kBlockN + chunk * Config::kChunkN;
    float rP[Config::kChunkN / 2];
    rank_product<Config>(shared, slots, consumer, chunk, rP);
#pragma unroll
    for (int i = 0; i < Config::kChunkN / 2; i += 4) {
      const int bias_col = col + col_of(i);
      float2 bias = {0.0f, 0.0f};
      if (arguments.bias != nullptr && bias_col < arguments.n) {
        // n is a multiple of 8, so both columns of the pair are there.
        bias = sm90::unpack_halves<Config::kType>(*reinterpret_cast<const uint32_t*>(arguments.bias + bias_col));
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        rP[i + j] = rY[chunk * Config::kChunkN / 2 + i + j] + factor * rP[i + j] + (j % 2 == 0 ? bias.x : bias.y);
      }
    }
    if (row < arguments.m && col < arguments.n) {
      store_chunk<Config>(arguments, shared, consumer, row, col, rP);
    }
  }
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

// A consumer warpgroup: 64 rows of every tile of the block.
template <typename Config>
PEFT_KERNELS_DEVICE void consume(const GemmArguments& arguments, GemmShared<Config>& shared, int consumer) {
  const float scale = arguments.scale_ptr != nullptr ? *arguments.scale_ptr : arguments.scale;
  const float s_factor = Config::kDirection == Direction::kBackward ? scale : 1.0f;
  const float up_factor = Config::kDirection == Direction::kBackward ? 1.0f : scale;
  const int steps = steps_of<Config>(arguments);
  Ring<Config> ring;
  for (int64_t number = blockIdx.x; number < arguments.order.count(); number += gridDim.x) {
    const TileIndex tile = arguments.order.at(number);
    float rY[Config::kBlockN / 2];
    int slots[Config::kRankSteps];
    if (tile.n == 0) {
      float rS[Config::kRank / 2];
      reduce<Config, true>(shared, ring, steps, consumer, rY, rS);
      wait_rank_steps(shared, ring, slots);
      publish_s<Config>(arguments, shared, slots, tile.m, consumer, s_factor, rS);
    } else {
      float rUnused[Config::kRank / 2];
      reduce<Config, false>(shared, ring, steps, consumer, rY, rUnused);
      wait_rank_steps(shared, ring, slots);
    }
    finish<Config>(arguments, shared, slots, tile, consumer, up_factor, rY);
#pragma unroll
    for (int step = 0; step < Config::kRankSteps; ++step) {
      free_stage(shared, slots[step]);
    }
  }
  if (threadIdx.x % Config::kWarpgroup == 0) {
    // The staging buffer must outlive the last store that reads it.
    sm90::tma_store_wait<0>();
  }
}

template <typename Config>
PEFT_KERNELS_DEVICE void gemm(const GemmArguments& arguments, GemmShared<Config>& shared) {
  if (threadIdx.x == 0) {
    for (int slot = 0; slot < Config::kStages; ++slot) {
      sm90::barrier_init(&shared.full[slot], 1);
      sm90::barrier_init(&shared.free[slot], Config::kConsumerWarps);
    }
    // The barriers, for TMA and, after the barrier below, for the other threads.
    sm90::fence_barrier_init();
    sm90::fence_async_shared();
  }
  __syncthreads();

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
}

}  // namespace peft_kernels::lora
