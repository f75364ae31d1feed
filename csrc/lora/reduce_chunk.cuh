// Part of reduce.cuh: what a CTA works on, and how a chunk of rows comes to shared memory and is made ready there.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "core/sm80/async_copy.cuh"
#include "lora/dropout.h"
#include "lora/reduce_params.h"

namespace peft_kernels::lora::reduce {

template <typename Half, int kRanksOf, bool kExactOf, bool kNarrowOf>
struct Config {
  using T = Half;
  using Out = std::conditional_t<kExactOf, float, T>;  // dtype of the adapters
  static constexpr Variant kVariant = {kRanksOf, kExactOf, kNarrowOf};
  static constexpr int kRanks = kRanksOf;
  static constexpr bool kExact = kExactOf;
  static constexpr bool kNarrow = kNarrowOf;
  static constexpr int kRows = kVariant.rows();
  static constexpr int kStages = kVariant.stages();
  static constexpr int kPitch = kVariant.pitch();
  static constexpr int kHalfPitch = kVariant.half_pitch();
  static constexpr int kTiles = kRanks / kTileRanks;
  // dS of a chunk: a warp takes 16 rows of it, and a part of the ranks.
  static constexpr int kNarrowWarps = kWarps / (kRows / kStepRows);
  static constexpr int kNarrowTiles = kTiles / kNarrowWarps;
};

struct Thread {
  int warp, lane;
  int group, quad;  // of the lane within a product's fragments
};

// What a CTA works on: a unit's columns and ranks, and how far it is.
struct Work {
  int unit, chunk;
  int job;
  int column, rank;  // the first
};

// The sums of a tile's columns belong to one of its units, or several would write them, each with bits of its own.
__device__ __forceinline__ bool adds_columns(const ReduceJob& job, const Work& work) {
  return job.sums != nullptr && work.rank == 0;
}

__device__ __forceinline__ Work work_at(const ReduceParams& params, int unit, int chunk, int ranks) {
  const Unit at = params.plan.unit_at(unit);
  return {unit, chunk, at.job, at.tile * kColumns, at.rank_block * ranks};
}

__device__ __forceinline__ void go_on(Work& work, const ReduceParams& params, int ranks) {
  if (++work.chunk == params.plan.chunks && work.unit + 1 < params.plan.units()) {
    work = work_at(params, work.unit + 1, 0, ranks);
  }
}

__device__ __forceinline__ float factor_of(const ReduceJob& job) {
  return job.factor == nullptr ? job.factor_value : *job.factor;
}

__device__ __forceinline__ int clamped(int value, int most) {
  return value < 0 ? 0 : value < most ? value : most;
}

template <typename T>
__device__ __forceinline__ uint32_t word_of(float low, float high) {
  const T pair[2] = {static_cast<T>(low), static_cast<T>(high)};
  uint32_t word;
  memcpy(&word, pair, sizeof(word));
  return word;
}

// Start the copies of a chunk: x's rows, a warp one at a time, and S's. What is beyond an edge becomes zero.
template <typename C>
__device__ __forceinline__ void copy_chunk(unsigned char* stage,
                                           const Thread& thread,
                                           const ReduceParams& params,
                                           const Work& work) {
  using T = typename C::T;
  const ReduceJob& job = params.jobs[work.job];
  const int first = work.chunk * C::kRows;
  T* sX = reinterpret_cast<T*>(stage);
  const T* gX = static_cast<const T*>(job.x);
  const int column = thread.lane * kVector;
  const int bytes = 2 * clamped(job.columns - work.column - column, kVector);
#pragma unroll
  for (int i = 0; i < C::kRows / kWarps; ++i) {
    const int row = thread.warp + kWarps * i;
    const bool inside = first + row < params.m && bytes > 0;
    const T* gVector = inside ? gX + (first + row) * job.x_stride + work.column + column : gX;
    copy_async_16(sX + row * C::kPitch + column, gVector, inside ? bytes : 0);
  }

  float* sS = reinterpret_cast<float*>(stage + C::kVariant.stage_s());
  const int width = job.s == nullptr ? 0 : clamped(params.r - work.rank, C::kRanks);
  const float* gS = job.s + static_cast<int64_t>(first) * params.r + work.rank;
  const int left = params.m - first;
  if (params.r % 4 == 0 && reinterpret_cast<uintptr_t>(job.s) % 16 == 0) {
#pragma unroll
    for (int i = threadIdx.x; i < C::kRows * C::kRanks / 4; i += kThreads) {
      const int row = i / (C::kRanks / 4), rank = i % (C::kRanks / 4) * 4;
      const bool inside = row < left && rank < width;
      copy_async_16(sS + row * C::kRanks + rank, inside ? gS + row * static_cast<int64_t>(params.r) + rank : job.x,
                    inside ? 16 : 0);
    }
  } else {
#pragma unroll 2
    for (int i = threadIdx.x; i < C::kRows * C::kRanks; i += kThreads) {
      const int row = i / C::kRanks, rank = i % C::kRanks;
      const bool inside = row < left && rank < width;
      copy_async_4(sS + row * C::kRanks + rank, inside ? gS + row * static_cast<int64_t>(params.r) + rank : job.x,
                   inside ? 4 : 0);
    }
  }
}

// Round S of a chunk, and drop elements of x.
template <typename C>
__device__ __forceinline__ void prepare_chunk(
    unsigned char* stage, typename C::T* sHalf, const Thread& thread, const ReduceParams& params, const Work& work) {
  using T = typename C::T;
  const ReduceJob& job = params.jobs[work.job];
  if constexpr (!C::kExact) {
    const float2* sS = reinterpret_cast<const float2*>(stage + C::kVariant.stage_s());
#pragma unroll
    for (int i = threadIdx.x; i < C::kRows * C::kRanks / 2; i += kThreads) {
      const int row = i / (C::kRanks / 2), rank = i % (C::kRanks / 2) * 2;
      const float2 pair = sS[i];
      *reinterpret_cast<uint32_t*>(sHalf + row * C::kHalfPitch + rank) = word_of<T>(pair.x, pair.y);
    }
  }
  if (job.threshold == 0) {
    return;
  }
  const int64_t seed = *job.seed;
  const auto draws_of = static_cast<uint32_t>(work.column / kDecisionsPerCall + thread.lane);
#pragma unroll 2
  for (int i = 0; i < C::kRows / kWarps; ++i) {
    const int row = thread.warp + kWarps * i;
    const Words draws = draw(seed, static_cast<int64_t>(work.chunk) * C::kRows + row, draws_of);
    T* sVector = reinterpret_cast<T*>(stage) + row * C::kPitch + thread.lane * kVector;
    uint4 vector = *reinterpret_cast<uint4*>(sVector);
    uint32_t* words[4] = {&vector.x, &vector.y, &vector.z, &vector.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      *words[j] &= (keep(draws, 2 * j, job.threshold) ? 0x0000FFFFu : 0u) |
                   (keep(draws, 2 * j + 1, job.threshold) ? 0xFFFF0000u : 0u);
    }
    *reinterpret_cast<uint4*>(sVector) = vector;
  }
}

}  // namespace peft_kernels::lora::reduce
