// What      LoRA's linear layer for at most 16 tokens, in one launch: the device body
// Equation  y = x W^T + bias + scale S B^T,  S = x A^T   (Hu et al. 2021, arXiv:2106.09685, section 4.1)
// Tensors   x (m, k), W (n, k), bias, y (m, n) bf16 or fp16; A (r, k), B (n, r) likewise or float32; S (m, r) float32
// Tiles     a unit is 64 rows of W or A and a split of k; a CTA takes units in order, see decode_config.h. Of its warps
//           two share the rows and four the split's chunks of k; a warp multiplies its rows on tensor cores
// Bound     one read of W: 2 n k bytes. From L2, beside W: x, m / 64 of W's bytes; S, B and partial sums, some percent
// Refused   k no multiple of 8, rows off 16-byte boundaries, m > 16
//
// The lanes of a product are given k by whole vectors: lane t of a row's four loads k = 8t ... 8t + 7 in one access, of
// the row and of x alike, and calls them by the product's names (mma.cuh). Operands so go from memory to registers as
// they are: no shared memory, no shuffle, no barrier in the loop over k.
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
#include "core/sm80/copy.cuh"
#include "core/sm80/mma.cuh"
#include "lora/decode_config.h"
#include "lora/params.h"
#include "lora/pieces.cuh"

namespace peft_kernels::lora::decode {

constexpr uint4 kZero = {0, 0, 0, 0};
// A thread's outputs: the tokens warp and warp + 8 of the tile's columns lane and lane + 32.
constexpr int kOutputs = kMaxTokens / kWarps * kRowGroups;
static_assert(kWarpRows == 32, "a lane has a column in each row group");

__device__ __forceinline__ int at_most(int value, int limit) {
  return value < limit ? value : limit;
}

struct Thread {
  int warp, lane;
  int group, quad;  // of the lane within a product's fragments

  // What the warp multiplies.
  __device__ __forceinline__ int first_row() const { return warp % kRowGroups * kWarpRows; }
  __device__ __forceinline__ int warp_of_k() const { return warp / kRowGroups; }

  // Where its outputs are in the tile.
  __device__ __forceinline__ int token(int output) const { return warp + kWarps * (output / kRowGroups); }
  __device__ __forceinline__ int column(int output) const { return lane + kWarpRows * (output % kRowGroups); }
};

// A tile's rows of W or A, in memory.
template <typename TRow>
struct Rows {
  const TRow* gBase;
  int64_t stride;
  int first, end;
};

__device__ __forceinline__ uint32_t word_of(const uint4& vector, int index) {
  return index == 0 ? vector.x : index == 1 ? vector.y : index == 2 ? vector.z : vector.w;
}

// acc += x row^T over the 32 k that four lanes hold, 8 each: two products of 16 k.
template <typename T>
__device__ __forceinline__ void multiply(float (&acc)[4], const uint4 (&rX)[2], const uint4 (&rRow)[1]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint32_t a[4] = {word_of(rX[0], 2 * half), word_of(rX[1], 2 * half), word_of(rX[0], 2 * half + 1),
                           word_of(rX[1], 2 * half + 1)};
    const uint32_t b[2] = {word_of(rRow[0], 2 * half), word_of(rRow[0], 2 * half + 1)};
    mma_16x8x16<T>(acc, a, b);
  }
}

// A float32 row's elements are multiplied in pieces.
template <typename T>
__device__ __forceinline__ void multiply(float (&acc)[4], const uint4 (&rX)[2], const uint4 (&rRow)[2]) {
#pragma unroll
  for (int pair = 0; pair < 4; ++pair) {
    const float2 x_0 = floats_of<T>(word_of(rX[0], pair)), x_1 = floats_of<T>(word_of(rX[1], pair));
    const uint32_t a[4] = {__float_as_uint(x_0.x), __float_as_uint(x_1.x), __float_as_uint(x_0.y),
                           __float_as_uint(x_1.y)};
    uint32_t first[3], second[3];
    cut(__uint_as_float(word_of(rRow[pair / 2], 2 * (pair % 2))), first);
    cut(__uint_as_float(word_of(rRow[pair / 2], 2 * (pair % 2) + 1)), second);
#pragma unroll
    for (int i = 2; i >= 0; --i) {  // small ones first
      const uint32_t b[2] = {first[i], second[i]};
      mma_16x8x8_tf32(acc, a, b);
    }
  }
}

// acc[i] = x (16, k) times rows 8i ... 8i + 7 of the warp's, over its chunks. Rows and tokens beyond the last one
// are the last one again, which costs no bytes and no predicates; what comes of them is stored nowhere.
template <typename T, typename TRow>
__device__ __forceinline__ void accumulate(float (&acc)[kSubtiles][4],
                                           const Thread& thread,
                                           const DecodeParams& params,
                                           const Rows<TRow>& rows,
                                           const Range& range) {
  constexpr int kVectors = sizeof(TRow) / sizeof(T);
  constexpr int kAtOnce = kSteps / kVectors;  // float32 rows take twice the registers
  const int first = (range.begin + thread.warp_of_k()) * kChunkK + thread.quad * kVector;
  const T* gX[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int token = at_most(thread.group + 8 * i, params.shape.m - 1);
    gX[i] = static_cast<const T*>(params.x) + token * params.x_stride + first;
  }
  const TRow* gRow[kSubtiles];
#pragma unroll
  for (int i = 0; i < kSubtiles; ++i) {
    const int row = at_most(rows.first + thread.first_row() + thread.group + 8 * i, rows.end - 1);
    gRow[i] = rows.gBase + row * rows.stride + first;
  }
  // Up to the end of k or of the range; k is a multiple of a vector.
  int left = at_most(params.shape.k, range.end * kChunkK) - first;

  for (; left + thread.quad * kVector > 0; left -= kWarpsOfK * kChunkK) {
#pragma unroll 1
    for (int at = 0; at < kChunkK; at += kAtOnce * kStepK) {
      uint4 rRow[kAtOnce][kSubtiles][kVectors], rX[kAtOnce][2];
#pragma unroll
      for (int step = 0; step < kAtOnce; ++step) {
        const int offset = at + step * kStepK;
#pragma unroll
        for (int i = 0; i < kSubtiles; ++i) {
#pragma unroll
          for (int part = 0; part < kVectors; ++part) {
            const TRow* gVector = gRow[i] + offset + part * (kVector / kVectors);
            rRow[step][i][part] = offset < left ? load_streamed(gVector) : kZero;
          }
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          rX[step][i] = offset < left ? load_shared_by_warps(gX[i] + offset) : kZero;
        }
      }
#pragma unroll
      for (int step = 0; step < kAtOnce; ++step) {
#pragma unroll
        for (int i = 0; i < kSubtiles; ++i) {
          multiply<T>(acc[i], rX[step], rRow[step][i]);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kSubtiles; ++i) {
      gRow[i] += kWarpsOfK * kChunkK;
    }
    gX[0] += kWarpsOfK * kChunkK;
    gX[1] += kWarpsOfK * kChunkK;
  }
}

// The tile's sums over the warps that share its k, in the warps' order: a thread's are those of its outputs.
__device__ __forceinline__ void reduce_over_warps(float (&sums)[kOutputs],
                                                  const float (&acc)[kSubtiles][4],
                                                  const Thread& thread,
                                                  float* sSums) {
#pragma unroll
  for (int i = 0; i < kSubtiles; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = thread.warp * kMaxTokens + thread.group + 8 * half;
      float2* sPair = reinterpret_cast<float2*>(sSums + row * kSumsPitch + 8 * i + 2 * thread.quad);
      *sPair = make_float2(acc[i][2 * half], acc[i][2 * half + 1]);
    }
  }
  __syncthreads();
#pragma unroll
  for (int j = 0; j < kOutputs; ++j) {
    sums[j] = 0.0f;
#pragma unroll
    for (int i = 0; i < kWarpsOfK; ++i) {
      const int warp = i * kRowGroups + j % kRowGroups;
      sums[j] += sSums[(warp * kMaxTokens + thread.token(j)) * kSumsPitch + thread.lane];
    }
  }
}

// Leave the sums in memory for the last split of the tile.
__device__ __forceinline__ void store_partial(const float (&sums)[kOutputs],
                                              const Thread& thread,
                                              const DecodeParams& params,
                                              const Unit& unit) {
  float* gPartial = params.partials + partial_of(params.shape, unit) * partial_floats(params.shape);
#pragma unroll
  for (int j = 0; j < kOutputs; ++j) {
    const int token = thread.token(j);
    if (token < params.shape.m) {
      gPartial[token * kTileRows + thread.column(j)] = sums[j];
    }
  }
}

// sums = the earlier splits' sums, in order, then this one's.
__device__ __forceinline__ void add_partials(float (&sums)[kOutputs],
                                             const Thread& thread,
                                             const DecodeParams& params,
                                             const Unit& unit) {
  const int64_t size = partial_floats(params.shape);
  const Unit first = {unit.is_down, unit.tile, 0, unit.splits};
  const float* gPartial = params.partials + partial_of(params.shape, first) * size;
  float total[kOutputs] = {};
#pragma unroll 4
  for (int split = 0; split < unit.split; ++split) {
#pragma unroll
    for (int j = 0; j < kOutputs; ++j) {
      const int token = thread.token(j);
      if (token < params.shape.m) {
        total[j] += gPartial[split * size + token * kTileRows + thread.column(j)];
      }
    }
  }
#pragma unroll
  for (int j = 0; j < kOutputs; ++j) {
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
template <typename T, typename TAdapter>
__device__ __forceinline__ void finish_tile(
    float (&sums)[kOutputs], const Thread& thread, const DecodeParams& params, const Unit& unit, int index) {
  float* sUp = static_cast<float*>(shared_memory()) + kUp;
  float* sS = static_cast<float*>(shared_memory()) + kS;
  const Shape& shape = params.shape;

  stage_up<TAdapter>(sUp, thread, params, unit.tile, 0);
  wait_for(params, index - unit.split, 1, unit.split);
  wait_for(params, unit_of_s(shape, 0), shape.down_splits, tiles(shape.r));
  __syncthreads();
  add_partials(sums, thread, params, unit);

  float update[kOutputs] = {};
  for (int rank = 0; rank < shape.r; rank += kRankBlock) {
    if (rank > 0) {
      __syncthreads();  // all have read the block before
      stage_up<TAdapter>(sUp, thread, params, unit.tile, rank);
    }
    stage_s(sS, thread, params, rank);
    __syncthreads();
    const int width = shape.r - rank < kRankBlock ? shape.r - rank : kRankBlock;
#pragma unroll
    for (int j = 0; j < kOutputs; ++j) {
      if (thread.token(j) < shape.m && unit.tile * kTileRows + thread.column(j) < shape.n) {
        for (int i = 0; i < width; ++i) {
          update[j] += sS[thread.token(j) * kRankBlock + i] * sUp[thread.column(j) * kUpPitch + i];
        }
      }
    }
  }

  const float scale = params.scale == nullptr ? params.scale_value : *params.scale;
#pragma unroll
  for (int j = 0; j < kOutputs; ++j) {
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
__device__ __forceinline__ void finish_down(
    float (&sums)[kOutputs], const Thread& thread, const DecodeParams& params, const Unit& unit, int index) {
  wait_for(params, index - unit.split, 1, unit.split);
  __syncthreads();
  add_partials(sums, thread, params, unit);
#pragma unroll
  for (int j = 0; j < kOutputs; ++j) {
    const int token = thread.token(j), rank = unit.tile * kTileRows + thread.column(j);
    if (token < params.shape.m && rank < params.shape.r) {
      params.s[static_cast<int64_t>(token) * params.shape.r + rank] = sums[j];
    }
  }
  publish_unit(params, index);
}

template <typename T, typename TAdapter>
__device__ __forceinline__ void decode_body(const DecodeParams& params) {
  float* sSums = static_cast<float*>(shared_memory()) + kSums;
  const Shape& shape = params.shape;
  const int lane = threadIdx.x % 32;
  const Thread thread = {static_cast<int>(threadIdx.x) / 32, lane, lane / 4, lane % 4};
  const int all = units(shape);

  for (int index = blockIdx.x; index < all; index += gridDim.x) {
    const Unit unit = unit_at(shape, index);
    const Range range = chunks_of(shape, unit);
    const int first = unit.tile * kTileRows;
    float acc[kSubtiles][4] = {};
    const Rows<TAdapter> down = {static_cast<const TAdapter*>(params.lora_a), params.a_stride, first, shape.r};
    const Rows<T> base = {static_cast<const T*>(params.weight), params.weight_stride, first, shape.n};
    if constexpr (std::is_same_v<T, TAdapter>) {
      accumulate<T>(acc, thread, params, unit.is_down ? down : base, range);
    } else if (unit.is_down) {
      accumulate<T>(acc, thread, params, down, range);
    } else {
      accumulate<T>(acc, thread, params, base, range);
    }

    // Each branch passes a barrier after these sums are read and before the next unit's are written.
    float sums[kOutputs];
    reduce_over_warps(sums, acc, thread, sSums);
    if (!unit.is_last()) {
      store_partial(sums, thread, params, unit);
      publish_unit(params, index);
    } else if (unit.is_down) {
      finish_down(sums, thread, params, unit, index);
    } else {
      finish_tile<T, TAdapter>(sums, thread, params, unit, index);
    }
  }
}

}  // namespace peft_kernels::lora::decode
