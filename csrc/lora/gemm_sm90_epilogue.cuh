// What leaves the registers of gemm_sm90: S with its flags, and y. Header: gemm_sm90.cuh.
#pragma once

#include <cstdint>

#include "core/flags.cuh"
#include "core/sm90/barrier.cuh"
#include "core/sm90/memory.cuh"
#include "core/sm90/swizzle.h"
#include "core/sm90/tma.cuh"
#include "lora/gemm_sm90_config.h"
#include "lora/gemm_sm90_dropout.cuh"
#include "lora/gemm_sm90_producer.cuh"
#include "lora/gemm_sm90_products.cuh"

namespace peft_kernels::lora {

// Row and column, in a 64-row tile, of accumulator `i` of this thread.
PEFT_KERNELS_DEVICE int row_of(int i) {
  const int thread = threadIdx.x % 128;
  return 16 * (thread / 32) + thread % 32 / 4 + 8 * (i / 2 % 2);
}

PEFT_KERNELS_DEVICE int col_of(int i) {
  return 8 * (i / 4) + 2 * (threadIdx.x % 4) + i % 2;
}

// Where f and what makes up for dropped elements go: onto the S of the caller, onto S in half precision, or onto the
// rank product.
struct Factors {
  float s;
  float half;
  float product;
};

template <typename Config>
PEFT_KERNELS_DEVICE Factors factors_of(const GemmArguments& arguments) {
  const float f = arguments.scale_ptr != nullptr ? *arguments.scale_ptr : arguments.scale;
  const float c = Config::kDropout ? arguments.keep_scale : 1.0f;
  if (Config::kTransposed) {
    return {f, f, c};
  }
  return Config::kFolded ? Factors{c, c * f, 1.0f} : Factors{c, c, f};
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
                                   Factors factors,
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
      const float s_0 = col < arguments.r ? rS[i] : 0.0f;
      const float s_1 = col + 1 < arguments.r ? rS[i + 1] : 0.0f;
      const uint32_t halves = sm90::pack_halves<Config::kType>(s_0 * factors.half, s_1 * factors.half);
      const uint32_t sS = sm90::shared_address(shared.stage[slots[8 * (i / 4) / Config::kRankChunk]].x);
      sm90::store_shared(sm90::swizzled(sS + tile_row * kLine + 2 * (col % Config::kRankChunk), kLine), halves);
      if (row < arguments.m) {
        if (col < arguments.r) {
          gS[col] = s_0 * factors.s;
        }
        if (col + 1 < arguments.r) {
          gS[col + 1] = s_1 * factors.s;
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

// Two values of the bias, or zeros without one. n is a multiple of 8, so both columns of the pair are there.
PEFT_KERNELS_DEVICE uint32_t bias_pair(const GemmArguments& arguments, int col) {
  const bool there = arguments.bias != nullptr && col < arguments.n;
  return there ? *reinterpret_cast<const uint32_t*>(arguments.bias + col) : 0;
}

// The tile's bias, for the columns of this thread's accumulators. Beside a rank product of its own it would spill.
template <typename Config>
PEFT_KERNELS_DEVICE void load_bias(const GemmArguments& arguments, int tile_n, uint32_t (&rBias)[Config::kBiasWords]) {
  if constexpr (Config::kFolded) {
#pragma unroll
    for (int i = 0; i < Config::kBiasWords; ++i) {
      rBias[i] = bias_pair(arguments, tile_n * Config::kBlockN + col_of(4 * i));
    }
  }
}

// One chunk of y, 64 columns of each warp's 16 rows, through the warp's buffers to TMA. A buffer is written again once
// the store before the last has read it.
template <typename Config>
PEFT_KERNELS_DEVICE void store_chunk(const GemmArguments& arguments,
                                     GemmShared<Config>& shared,
                                     TileIndex tile,
                                     int consumer,
                                     int chunk,
                                     const float (&rP)[Config::kChunkN / 2]) {
  const int warp = threadIdx.x % Config::kWarpgroup / 32, lane = threadIdx.x % 32;
  const int row = tile.m * Config::kBlockM + consumer * Config::kConsumerRows + warp * Config::kWarpRows;
  const int col = tile.n * Config::kBlockN + chunk * Config::kChunkN;
  if (row >= arguments.m || col >= arguments.n) {
    return;
  }
  uint8_t* staging = shared.staging[consumer * Config::kWarpgroup / 32 + warp][chunk % Config::kBuffers];
  if (lane == 0) {
    sm90::tma_store_wait_read<Config::kBuffers - 1>();
  }
  __syncwarp();
  const uint32_t sY = sm90::shared_address(staging) + lane % 16 * Config::kLineBytes;
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
  // This lane's part of the chunk, for the TMA store that the warp's first lane starts once all are here.
  sm90::fence_async_shared();
  __syncwarp();
  if (lane == 0) {
    sm90::tma_store(&arguments.y, staging, row, col);
    sm90::tma_store_commit();
  }
}

// Drop elements of one chunk of the rank product: a selection, so that what is dropped may be inf.
template <typename Config>
PEFT_KERNELS_DEVICE void drop_product(const GemmArguments& arguments,
                                      int64_t seed,
                                      TileIndex tile,
                                      int consumer,
                                      int chunk,
                                      float (&rP)[Config::kChunkN / 2]) {
  const int row = tile.m * Config::kBlockM + consumer * Config::kConsumerRows + row_of(0);
  const Kept kept = draw_kept(seed, arguments.threshold, row, tile.n * Config::kBlockN + chunk * Config::kChunkN);
#pragma unroll
  for (int i = 0; i < Config::kChunkN / 2; ++i) {
    rP[i] = kept(i / 2 % 2, i / 4, i % 2) ? rP[i] : 0.0f;
  }
}

// The tile's end: the bias, and the rank product where it is one of its own, join the reduction, chunk after chunk.
template <typename Config>
PEFT_KERNELS_DEVICE void finish(const GemmArguments& arguments,
                                GemmShared<Config>& shared,
                                const int (&slots)[Config::kRankSteps],
                                TileIndex tile,
                                int consumer,
                                float factor,
                                const float (&rY)[Config::kBlockN / 2],
                                const uint32_t (&rBias)[Config::kBiasWords]) {
  const int64_t seed = Config::kDropsProduct ? *arguments.seed : 0;
#pragma unroll
  for (int chunk = 0; chunk < Config::kChunks; ++chunk) {
    float rP[Config::kChunkN / 2];
    if constexpr (!Config::kFolded) {
      rank_product<Config>(shared, slots, consumer, chunk, rP);
    }
    if constexpr (Config::kDropsProduct) {
      drop_product<Config>(arguments, seed, tile, consumer, chunk, rP);
    }
#pragma unroll
    for (int i = 0; i < Config::kChunkN / 2; i += 4) {
      const int at = chunk * Config::kChunkN / 2 + i;
      const uint32_t pair = Config::kFolded ? rBias[at / 4 % Config::kBiasWords]
                                            : bias_pair(arguments, tile.n * Config::kBlockN + col_of(at));
      const float2 bias = sm90::unpack_halves<Config::kType>(pair);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float product = Config::kFolded ? rY[at + j] : rY[at + j] + factor * rP[i + j];
        rP[i + j] = product + (j % 2 == 0 ? bias.x : bias.y);
      }
    }
    store_chunk<Config>(arguments, shared, tile, consumer, chunk, rP);
  }
}

}  // namespace peft_kernels::lora
