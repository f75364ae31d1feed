// The products of the decode kernel: a warp's rows of W or A by the tokens, over its chunks of k. Header and the rest
// of the body: decode.cuh.
//
// The lanes of a product are given k by whole vectors: lane t of a row's four loads k = 8t ... 8t + 7 in one access, of
// the row and of x alike, and calls them by the product's names (mma.cuh). Operands so go from memory to registers as
// they are: no shared memory, no shuffle, no barrier in the loop over k.
//
// A product is 16 by 8. Up to 8 tokens are its columns, and 16 rows of W its rows; up to 16 tokens are its rows, and 8
// rows of W its columns, so that no more accumulators and words of x are held than there are tokens to fill them.
#pragma once

#include <cstdint>

#include "core/sm80/copy.cuh"
#include "core/sm80/mma.cuh"
#include "lora/decode_config.h"
#include "lora/params.h"
#include "lora/pieces.cuh"

namespace peft_kernels::lora::decode {

constexpr uint4 kZero = {0, 0, 0, 0};

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

// A tile's rows of W or A, in memory. Beyond the last one it is the last one again.
template <typename TRow>
struct Rows {
  using Element = TRow;

  const TRow* gBase;
  int64_t stride;
  int first, end;

  __device__ __forceinline__ const TRow* row(int index) const {
    const int row = at_most(first + index, end - 1);
    return gBase + row * stride;
  }
};

// What a lane holds of the warp's sums over k, for up to kTokens tokens.
template <int kTokens>
struct Sums {
  static constexpr int kProducts = kWarpRows * kTokens / (16 * 8);
  float acc[kProducts][4];

  // Of acc[product][i]: the token, and the row among the warp's.
  __device__ __forceinline__ static int token(const Thread& thread, int i) {
    return kTokens == 8 ? 2 * thread.quad + i % 2 : thread.group + 8 * (i / 2);
  }
  __device__ __forceinline__ static int row(const Thread& thread, int product, int i) {
    return kTokens == 8 ? 16 * product + thread.group + 8 * (i / 2) : 8 * product + 2 * thread.quad + i % 2;
  }
};

__device__ __forceinline__ uint32_t word_of(const uint4& vector, int index) {
  return index == 0 ? vector.x : index == 1 ? vector.y : index == 2 ? vector.z : vector.w;
}

// sums += x rows^T over the 32 k that four lanes hold, 8 each: two products of 16 k.
template <typename T, int kTokens>
__device__ __forceinline__ void multiply(Sums<kTokens>& sums,
                                         const uint4 (&rX)[kTokens / 8],
                                         const uint4 (&rRow)[kSubtiles][1]) {
#pragma unroll
  for (int product = 0; product < Sums<kTokens>::kProducts; ++product) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int low = 2 * half, high = 2 * half + 1;
      if constexpr (kTokens == 8) {
        const uint4 &upper = rRow[2 * product][0], &lower = rRow[2 * product + 1][0];
        const uint32_t a[4] = {word_of(upper, low), word_of(lower, low), word_of(upper, high), word_of(lower, high)};
        const uint32_t b[2] = {word_of(rX[0], low), word_of(rX[0], high)};
        mma_16x8x16<T>(sums.acc[product], a, b);
      } else {
        const uint32_t a[4] = {word_of(rX[0], low), word_of(rX[1], low), word_of(rX[0], high), word_of(rX[1], high)};
        const uint32_t b[2] = {word_of(rRow[product][0], low), word_of(rRow[product][0], high)};
        mma_16x8x16<T>(sums.acc[product], a, b);
      }
    }
  }
}

// The pieces of a float32 row's elements 2 * pair and the next.
__device__ __forceinline__ void cut_pair(const uint4 (&rRow)[2],
                                         int pair,
                                         uint32_t (&first)[3],
                                         uint32_t (&second)[3]) {
  cut(__uint_as_float(word_of(rRow[pair / 2], 2 * (pair % 2))), first);
  cut(__uint_as_float(word_of(rRow[pair / 2], 2 * (pair % 2) + 1)), second);
}

template <typename T, int kTokens>
__device__ __forceinline__ void multiply(Sums<kTokens>& sums,
                                         const uint4 (&rX)[kTokens / 8],
                                         const uint4 (&rRow)[kSubtiles][2]) {
#pragma unroll
  for (int product = 0; product < Sums<kTokens>::kProducts; ++product) {
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
      const float2 x_0 = floats_of<T>(word_of(rX[0], pair));
      uint32_t first[3], second[3];
      if constexpr (kTokens == 8) {
        const uint32_t b[2] = {__float_as_uint(x_0.x), __float_as_uint(x_0.y)};
        uint32_t lower_first[3], lower_second[3];
        cut_pair(rRow[2 * product], pair, first, second);
        cut_pair(rRow[2 * product + 1], pair, lower_first, lower_second);
#pragma unroll
        for (int i = 2; i >= 0; --i) {  // small ones first
          const uint32_t a[4] = {first[i], lower_first[i], second[i], lower_second[i]};
          mma_16x8x8_tf32(sums.acc[product], a, b);
        }
      } else {
        const float2 x_1 = floats_of<T>(word_of(rX[1], pair));
        const uint32_t a[4] = {__float_as_uint(x_0.x), __float_as_uint(x_1.x), __float_as_uint(x_0.y),
                               __float_as_uint(x_1.y)};
        cut_pair(rRow[product], pair, first, second);
#pragma unroll
        for (int i = 2; i >= 0; --i) {
          const uint32_t b[2] = {first[i], second[i]};
          mma_16x8x8_tf32(sums.acc[product], a, b);
        }
      }
    }
  }
}

// How far the step of this number is from a warp's first, in elements: kSteps of a chunk, then those of its next one.
PEFT_KERNELS_HOST_DEVICE constexpr int offset_of(int step) {
  return step / kSteps * (kWarpsOfK * kChunkK) + step % kSteps * kStepK;
}

// sums += x times the warp's rows, over its chunks; TRows is Rows or has what it has. Rows and tokens beyond the last
// one are the last one again, which costs no bytes and no predicates; what comes of them is stored nowhere.
//
// Registers are a ring of kAhead steps of rows: while one step is multiplied, the others are on their way, and what is
// free is loaded anew at once. x is loaded one step before its use, as it comes from L1 and L2. Loads beyond the end
// are zeros.
template <typename T, int kTokens, typename TRows>
__device__ __forceinline__ void accumulate(
    Sums<kTokens>& sums, const Thread& thread, const DecodeParams& params, const TRows& rows, const Range& range) {
  using TRow = typename TRows::Element;
  constexpr int kVectors = sizeof(TRow) / sizeof(T);
  // Float32 rows, which are A's, take twice the registers, and W's are a hundred times as many.
  constexpr int kAhead = kVectors == 1 ? steps_ahead(kTokens) : 1;
  constexpr int kTurn = kAhead % kSteps == 0 ? kAhead : kAhead * kSteps;  // after which ring and chunks are in step
  const int first = (range.begin + thread.warp_of_k()) * kChunkK + thread.quad * kVector;
  const T* gX[kTokens / 8];
#pragma unroll
  for (int i = 0; i < kTokens / 8; ++i) {
    const int token = at_most(thread.group + 8 * i, params.shape.m - 1);
    gX[i] = static_cast<const T*>(params.x) + token * params.x_stride + first;
  }
  const TRow* gRow[kSubtiles];
#pragma unroll
  for (int i = 0; i < kSubtiles; ++i) {
    gRow[i] = rows.row(thread.first_row() + thread.group + 8 * i) + first;
  }
  // Up to the end of k or of the range; k is a multiple of a vector.
  int left = at_most(params.shape.k, range.end * kChunkK) - first;

  uint4 rRow[kAhead][kSubtiles][kVectors], rX[kTokens / 8];
  const auto load_rows = [&](uint4(&rStep)[kSubtiles][kVectors], int offset) {
#pragma unroll
    for (int i = 0; i < kSubtiles; ++i) {
#pragma unroll
      for (int part = 0; part < kVectors; ++part) {
        rStep[i][part] = offset < left ? load_streamed(gRow[i] + offset + part * (kVector / kVectors)) : kZero;
      }
    }
  };
  const auto load_x = [&](int offset) {
#pragma unroll
    for (int i = 0; i < kTokens / 8; ++i) {
      rX[i] = offset < left ? load_shared_by_warps(gX[i] + offset) : kZero;
    }
  };

  load_x(0);
#pragma unroll
  for (int i = 0; i < kAhead; ++i) {
    load_rows(rRow[i], offset_of(i));
  }
  // The four lanes of a row leave together: products are of the whole warp.
  while (left + thread.quad * kVector > 0) {
#pragma unroll
    for (int i = 0; i < kTurn; ++i) {
      if (i % kSteps == 0 && left + thread.quad * kVector <= offset_of(i)) {
        break;
      }
      multiply<T>(sums, rX, rRow[i % kAhead]);
      load_x(offset_of(i + 1));
      load_rows(rRow[i % kAhead], offset_of(i + kAhead));
    }
    constexpr int kFurther = offset_of(kTurn);
#pragma unroll
    for (int i = 0; i < kSubtiles; ++i) {
      gRow[i] += kFurther;
    }
#pragma unroll
    for (int i = 0; i < kTokens / 8; ++i) {
      gX[i] += kFurther;
    }
    left -= kFurther;
  }
}

}  // namespace peft_kernels::lora::decode
