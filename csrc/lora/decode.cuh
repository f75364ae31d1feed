// What      LoRA's linear layer for at most 16 tokens, in one launch: the device body
// Equation  y = x W^T + bias + scale S B^T,  S = x A^T   (Hu et al. 2021, arXiv:2106.09685, section 4.1)
// Tensors   x (m, k), W (n, k), bias, y (m, n) bf16 or fp16; A (r, k), B (n, r) likewise or float32; S (m, r) float32
// Tiles     a unit is 64 rows of W or A and a split of k; a CTA takes units in order, see decode_config.h. Of its warps
//           two share the rows and four the split's chunks of k; a warp multiplies its rows on tensor cores, by kTokens
//           tokens, 8 or 16 (decode_products.cuh)
// Bound     one read of W: 2 n k bytes. From L2, beside W: x, m / 64 of W's bytes; S, B and partial sums, some percent
// Refused   k no multiple of 8, rows off 16-byte boundaries, m > 16
//
// Why nobody waits for ever. All CTAs are resident together (the launch is cooperative), so each makes progress. Of the
// units not yet finished take the one with the smallest number: its CTA has finished all its units before it and works
// on it; it waits for units of smaller numbers alone, and these are finished and published. So it finishes.
//
// Why two runs have the same bits. Which products a lane adds, and in which order, follows from the shape and the
// splits; warps and splits are added in the order of their numbers, whoever came first.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "core/flags.cuh"
#include "core/shared.cuh"
#include "lora/decode_config.h"
#include "lora/decode_products.cuh"
#include "lora/params.h"

namespace peft_kernels::lora::decode {

// A thread's outputs: the tokens warp and, of 16, warp + 8 of the tile's columns lane and lane + 32.
template <int kTokens>
constexpr int kOutputs = kTokens / kWarps * kRowGroups;
static_assert(kWarpRows == 32, "a lane has a column in each row group");

// The tile's sums over the warps that share its k, in the warps' order: a thread's are those of its outputs.
template <int kTokens>
__device__ __forceinline__ void reduce_over_warps(float (&sums)[kOutputs<kTokens>],
                                                  const Sums<kTokens>& partial,
                                                  const Thread& thread,
                                                  float* sSums) {
  constexpr int kPitch = sums_pitch(kTokens);
#pragma unroll
  for (int product = 0; product < Sums<kTokens>::kProducts; ++product) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int token = thread.warp * kTokens + Sums<kTokens>::token(thread, i);
      sSums[token * kPitch + Sums<kTokens>::row(thread, product, i)] = partial.acc[product][i];
    }
  }
  __syncthreads();
#pragma unroll
  for (int j = 0; j < kOutputs<kTokens>; ++j) {
    sums[j] = 0.0f;
#pragma unroll
    for (int i = 0; i < kWarpsOfK; ++i) {
      const int warp = i * kRowGroups + j % kRowGroups;
      sums[j] += sSums[(warp * kTokens + thread.token(j)) * kPitch + thread.lane];
    }
  }
}

// Leave the sums in memory for the last split of the tile.
template <int kTokens>
__device__ __forceinline__ void store_partial(const float (&sums)[kOutputs<kTokens>],
                                              const Thread& thread,
                                              const DecodeParams& params,
                                              const Unit& unit) {
  float* gPartial = params.partials + partial_of(params.shape, unit) * partial_floats(params.shape);
#pragma unroll
  for (int j = 0; j < kOutputs<kTokens>; ++j) {
    const int token = thread.token(j);
    if (token < params.shape.m) {
      gPartial[token * kTileRows + thread.column(j)] = sums[j];
    }
  }
}

// sums = the earlier splits' sums, in order, then this one's.
template <int kTokens>
__device__ __forceinline__ void add_partials(float (&sums)[kOutputs<kTokens>],
                                             const Thread& thread,
                                             const DecodeParams& params,
                                             const Unit& unit) {
  const int64_t size = partial_floats(params.shape);
  const Unit first = {unit.is_down, unit.tile, 0, unit.splits};
  const float* gPartial = params.partials + partial_of(params.shape, first) * size;
  float total[kOutputs<kTokens>] = {};
#pragma unroll 4
  for (int split = 0; split < unit.split; ++split) {
#pragma unroll
    for (int j = 0; j < kOutputs<kTokens>; ++j) {
      const int token = thread.token(j);
      if (token < params.shape.m) {
        total[j] += gPartial[split * size + token * kTileRows + thread.column(j)];
      }
    }
  }
#pragma unroll
  for (int j = 0; j < kOutputs<kTokens>; ++j) {
    sums[j] += total[j];
  }
}

// Wait until the units first, first + step, ..., `count` of them, have published. The CTA's next barrier hands what
// they have published to all of its threads.
__device__ __forceinline__ void wait_for(const DecodeParams& params, int first, int step, int count) {
  for (int i = threadIdx.x; i < count; i += kThreads) {
    wait_until_published(params.flags + first + i * step, params.nonce);
  }
}

// Publish what every thread of the CTA has written before.
__device__ __forceinline__ void publish_unit(const DecodeParams& params, int index) {
  __syncthreads();
  if (threadIdx.x == 0) {
    publish(params.flags + index, params.nonce);
  }
}

template <typename TAdapter>
__device__ __forceinline__ void stage_up(
    float* sUp, const Thread& thread, const DecodeParams& params, int tile, int rank) {
  for (int row = thread.warp; row < kTileRows; row += kWarps) {
    const int n = tile * kTileRows + row;
    if (n < params.shape.n) {
      const TAdapter* gRow = static_cast<const TAdapter*>(params.lora_b) + n * params.b_stride_n;
      for (int i = thread.lane; i < kRankBlock && rank + i < params.shape.r; i += 32) {
        sUp[row * kUpPitch + i] = static_cast<float>(gRow[(rank + i) * params.b_stride_r]);
      }
    }
  }
}

__device__ __forceinline__ void stage_s(float* sS, const Thread& thread, const DecodeParams& params, int rank) {
  for (int token = thread.warp; token < params.shape.m; token += kWarps) {
    // Other CTAs of this launch wrote S: an ordinary load, which the acquired flag orders.
    const float* gRow = params.s + static_cast<int64_t>(token) * params.shape.r;
    for (int i = thread.lane; i < kRankBlock && rank + i < params.shape.r; i += 32) {
      sS[token * kRankBlock + i] = gRow[rank + i];
    }
  }
}

// y of a tile: the base product's sums, bias, and the low-rank term of the S that A's units publish meanwhile.
template <typename T, typename TAdapter, int kTokens>
__device__ __forceinline__ void finish_tile(
    float (&sums)[kOutputs<kTokens>], const Thread& thread, const DecodeParams& params, const Unit& unit, int index) {
  float* sUp = static_cast<float*>(shared_memory()) + kUp;
  float* sS = static_cast<float*>(shared_memory()) + kS;
  const Shape& shape = params.shape;

  stage_up<TAdapter>(sUp, thread, params, unit.tile, 0);
  wait_for(params, index - unit.split, 1, unit.split);
  wait_for(params, unit_of_s(shape, 0), shape.down_splits, tiles(shape.r));
  __syncthreads();
  add_partials<kTokens>(sums, thread, params, unit);

  float update[kOutputs<kTokens>] = {};
  for (int rank = 0; rank < shape.r; rank += kRankBlock) {
    if (rank > 0) {
      __syncthreads();  // all have read the block before
      stage_up<TAdapter>(sUp, thread, params, unit.tile, rank);
    }
    stage_s(sS, thread, params, rank);
    __syncthreads();
    const int width = shape.r - rank < kRankBlock ? shape.r - rank : kRankBlock;
#pragma unroll
    for (int j = 0; j < kOutputs<kTokens>; ++j) {
      if (thread.token(j) < shape.m && unit.tile * kTileRows + thread.column(j) < shape.n) {
        for (int i = 0; i < width; ++i) {
          update[j] += sS[thread.token(j) * kRankBlock + i] * sUp[thread.column(j) * kUpPitch + i];
        }
      }
    }
  }

  const float scale = params.scale == nullptr ? params.scale_value : *params.scale;
#pragma unroll
  for (int j = 0; j < kOutputs<kTokens>; ++j) {
    const int token = thread.token(j), n = unit.tile * kTileRows + thread.column(j);
    if (token < shape.m && n < shape.n) {
      const T* gBias = static_cast<const T*>(params.bias);
      const float bias = gBias == nullptr ? 0.0f : static_cast<float>(gBias[n * params.bias_stride]);
      const float value = sums[j] + bias + scale * update[j];
      static_cast<T*>(params.y)[static_cast<int64_t>(token) * shape.n + n] = static_cast<T>(value);
    }
  }
}

// S of a tile of A.
template <int kTokens>
__device__ __forceinline__ void finish_down(
    float (&sums)[kOutputs<kTokens>], const Thread& thread, const DecodeParams& params, const Unit& unit, int index) {
  wait_for(params, index - unit.split, 1, unit.split);
  __syncthreads();
  add_partials<kTokens>(sums, thread, params, unit);
#pragma unroll
  for (int j = 0; j < kOutputs<kTokens>; ++j) {
    const int token = thread.token(j), rank = unit.tile * kTileRows + thread.column(j);
    if (token < params.shape.m && rank < params.shape.r) {
      params.s[static_cast<int64_t>(token) * params.shape.r + rank] = sums[j];
    }
  }
  publish_unit(params, index);
}

// Adds the products of a unit's rows of W or A to the sums, W as it is in memory; decode_four_bit.cuh has another.
template <typename T, typename TAdapter>
struct Products {
  template <int kTokens>
  __device__ __forceinline__ void operator()(Sums<kTokens>& sums,
                                             const Thread& thread,
                                             const DecodeParams& params,
                                             const Unit& unit,
                                             const Range& range) const {
    const int first = unit.tile * kTileRows;
    const Rows<TAdapter> down = {static_cast<const TAdapter*>(params.lora_a), params.a_stride, first, params.shape.r};
    const Rows<T> base = {static_cast<const T*>(params.weight), params.weight_stride, first, params.shape.n};
    if constexpr (std::is_same_v<T, TAdapter>) {
      accumulate<T>(sums, thread, params, unit.is_down ? down : base, range);
    } else if (unit.is_down) {
      accumulate<T>(sums, thread, params, down, range);
    } else {
      accumulate<T>(sums, thread, params, base, range);
    }
  }
};

// For at most kTokens tokens; TProducts is Products or does what it does.
template <typename T, typename TAdapter, int kTokens, typename TProducts>
__device__ __forceinline__ void decode_body(const DecodeParams& params, const TProducts& add_products) {
  float* sSums = static_cast<float*>(shared_memory()) + kSums;
  const Shape& shape = params.shape;
  const int lane = threadIdx.x % 32;
  const Thread thread = {static_cast<int>(threadIdx.x) / 32, lane, lane / 4, lane % 4};
  const int all = units(shape);

  for (int index = blockIdx.x; index < all; index += gridDim.x) {
    const Unit unit = unit_at(shape, index);
    const Range range = chunks_of(shape, unit);
    Sums<kTokens> partial = {};
    add_products(partial, thread, params, unit, range);

    // Each branch passes a barrier after these sums are read and before the next unit's are written.
    float sums[kOutputs<kTokens>];
    reduce_over_warps(sums, partial, thread, sSums);
    if (!unit.is_last()) {
      store_partial<kTokens>(sums, thread, params, unit);
      publish_unit(params, index);
    } else if (unit.is_down) {
      finish_down<kTokens>(sums, thread, params, unit, index);
    } else {
      finish_tile<T, TAdapter, kTokens>(sums, thread, params, unit, index);
    }
  }
}

}  // namespace peft_kernels::lora::decode
