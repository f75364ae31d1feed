// What      gradients of LoRA's factors, which are sums over all tokens, in one launch: the device body
// Equation  dB = s dY^T S, dbias = sum of dY's rows, dA = c dS^T (D * x); where asked for, dS = s dY B in the same pass
//           over dY   (docs/design/lora.md; D: dropout.h)
// Tensors   dY (m, n), x (m, k) bf16 or fp16; S, dS (m, r) float32; B (n, r), dB, dA likewise or float32, any strides;
//           dS comes out in parts, (tiles of n, m, r) float32, for the caller to add up
// Tiles     a CTA takes a range of chunks of rows, see reduce_config.h; its warps share a chunk's 256 columns, each 32
// Bound     one read of dY and one of x: 2 m (n + k) bytes. From L2, beside them: S once for each 256 columns, r / 128
//           of dY's bytes; partial sums, some percent
// Refused   rows of dY or x that are strided or off 16-byte boundaries
//
// Rows go from memory to a ring of stages in shared memory by cp.async, and from there, transposed, to tensor cores. S
// comes along in float32; when a stage is there it is rounded once, as eager torch rounds it, or kept, where the
// adapters are float32. Elements of x that dropout drops are set to zero in the stage.
//
// Nobody waits for another CTA: the last to come to a unit's ticket adds up what the others have left.
//
// Why two runs have the same bits. Which rows a CTA adds, and in which order, follows from shape and grid; the CTAs of
// a unit are added in the order of their numbers, whoever does it.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "core/shared.cuh"
#include "core/sm80/async_copy.cuh"
#include "core/sm80/matrix.cuh"
#include "core/sm80/mma.cuh"
#include "core/tickets.cuh"
#include "lora/pieces.cuh"
#include "lora/reduce_chunk.cuh"
#include "lora/reduce_params.h"

namespace peft_kernels::lora::reduce {

// acc += a b over 16 of k, b of float32 elements: b[i] is that of the half-precision product, element by element.
template <typename T>
__device__ __forceinline__ void multiply_exact(float (&acc)[4], const uint32_t (&a)[4], const float (&b)[4]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float2 upper = floats_of<T>(a[2 * half]), lower = floats_of<T>(a[2 * half + 1]);
    const uint32_t wide[4] = {__float_as_uint(upper.x), __float_as_uint(lower.x), __float_as_uint(upper.y),
                              __float_as_uint(lower.y)};
    uint32_t first[3], second[3];
    cut(b[2 * half], first);
    cut(b[2 * half + 1], second);
#pragma unroll
    for (int i = 2; i >= 0; --i) {  // small ones first
      const uint32_t pieces[2] = {first[i], second[i]};
      mma_16x8x8_tf32(acc, wide, pieces);
    }
  }
}

// A thread's part of a unit's sums: columns group and group + 8 of each 16 of the warp's, ranks 2 quad and the next of
// each tile, as mma.cuh has them; of dbias the same with a column of ones for the ranks.
template <typename C>
struct Sums {
  float out[kWarpColumns / 16][C::kTiles][4];
  float bias[kWarpColumns / 16][4];
};

// Add a chunk's x^T S, and the sums of its columns.
template <typename C>
__device__ __forceinline__ void add_chunk(Sums<C>& sums,
                                          const unsigned char* stage,
                                          const typename C::T* sHalf,
                                          const Thread& thread,
                                          const ReduceParams& params,
                                          const Work& work) {
  using T = typename C::T;
  const ReduceJob& job = params.jobs[work.job];
  const T* sX = reinterpret_cast<const T*>(stage) + thread.warp * kWarpColumns;
  const int matrix = thread.lane / 8, matrix_row = thread.lane % 8;
  const int tiles = (clamped(params.r - work.rank, C::kRanks) + kTileRanks - 1) / kTileRanks;
  const uint32_t one = thread.group == 0 ? word_of<T>(1.0f, 1.0f) : 0u;
#pragma unroll
  for (int row = 0; row < C::kRows; row += kStepRows) {
    uint32_t a[kWarpColumns / 16][4];
#pragma unroll
    for (int i = 0; i < kWarpColumns / 16; ++i) {
      load_matrices_transposed(a[i], sX + (row + matrix / 2 * 8 + matrix_row) * C::kPitch + 16 * i + matrix % 2 * 8);
      if (adds_columns(job, work)) {
        const uint32_t b[2] = {one, one};
        mma_16x8x16<T>(sums.bias[i], a[i], b);
      }
    }
    if (job.out == nullptr) {
      continue;
    }
#pragma unroll
    for (int tile = 0; tile < C::kTiles; tile += 2) {
      if (tile >= tiles) {
        break;
      }
      if constexpr (C::kExact) {
        const float* sS = reinterpret_cast<const float*>(stage + C::kVariant.stage_s()) + row * C::kRanks;
#pragma unroll
        for (int j = tile; j < tile + 2; ++j) {
          const float* sPair = sS + 2 * thread.quad * C::kRanks + j * kTileRanks + thread.group;
          const float b[4] = {sPair[0], sPair[C::kRanks], sPair[8 * C::kRanks], sPair[9 * C::kRanks]};
#pragma unroll
          for (int i = 0; i < kWarpColumns / 16; ++i) {
            multiply_exact<T>(sums.out[i][j], a[i], b);
          }
        }
      } else {
        uint32_t b[4];
        load_matrices_transposed(
            b, sHalf + (row + matrix % 2 * 8 + matrix_row) * C::kHalfPitch + (tile + matrix / 2) * kTileRanks);
#pragma unroll
        for (int i = 0; i < kWarpColumns / 16; ++i) {
          mma_16x8x16<T>(sums.out[i][tile], a[i], {b[0], b[1]});
          mma_16x8x16<T>(sums.out[i][tile + 1], a[i], {b[2], b[3]});
        }
      }
    }
  }
}

// B as the products for dS take it: 16 of a unit's columns at a time, and the ranks of the warp.
template <typename C>
struct UpFactor {
  using Word = std::conditional_t<C::kExact, float, uint32_t>;
  static constexpr int kWords = C::kExact ? 4 : 2;
  Word words[kColumns / 16][C::kNarrowTiles][kWords];

  static __device__ __forceinline__ int first_rank(const Thread& thread) {
    return thread.warp % C::kNarrowWarps * C::kNarrowTiles * kTileRanks;
  }

  __device__ __forceinline__ void load(const Thread& thread, const ReduceParams& params, const Work& work) {
    using Out = typename C::Out;
#pragma unroll
    for (int step = 0; step < kColumns / 16; ++step) {
#pragma unroll
      for (int tile = 0; tile < C::kNarrowTiles; ++tile) {
        const int rank = work.rank + first_rank(thread) + tile * kTileRanks + thread.group;
        Out elements[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int column = 16 * step + 2 * thread.quad + i % 2 + i / 2 * 8;
          const bool inside = work.column + column < params.jobs[kUp].columns && rank < params.r;
          const Out* gB = static_cast<const Out*>(params.lora_b);
          elements[i] = inside ? gB[(work.column + column) * params.b_stride_n + rank * params.b_stride_r]
                               : static_cast<Out>(0.0f);
        }
        memcpy(words[step][tile], elements, sizeof(elements));
      }
    }
  }
};

// The part of dS that a chunk's columns make, for the unit's ranks.
template <typename C>
__device__ __forceinline__ void store_ds(const UpFactor<C>& up,
                                         const unsigned char* stage,
                                         const Thread& thread,
                                         const ReduceParams& params,
                                         const Work& work) {
  using T = typename C::T;
  const int row = thread.warp / C::kNarrowWarps * kStepRows;
  const T* sX = reinterpret_cast<const T*>(stage) + (row + thread.lane % 16) * C::kPitch + thread.lane / 16 * 8;
  float acc[C::kNarrowTiles][4] = {};
#pragma unroll
  for (int step = 0; step < kColumns / 16; ++step) {
    uint32_t a[4];
    load_matrices(a, sX + 16 * step);
#pragma unroll
    for (int tile = 0; tile < C::kNarrowTiles; ++tile) {
      if constexpr (C::kExact) {
        multiply_exact<T>(acc[tile], a, up.words[step][tile]);
      } else {
        mma_16x8x16<T>(acc[tile], a, up.words[step][tile]);
      }
    }
  }
  const float factor = factor_of(params.jobs[kUp]);
#pragma unroll
  for (int tile = 0; tile < C::kNarrowTiles; ++tile) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int token = work.chunk * C::kRows + row + thread.group + i / 2 * 8;
      const int rank = work.rank + UpFactor<C>::first_rank(thread) + tile * kTileRanks + 2 * thread.quad + i % 2;
      if (token < params.m && rank < params.r) {
        const int64_t part = work.column / kColumns;
        params.ds[(part * params.m + token) * params.r + rank] = factor * acc[tile][i];
      }
    }
  }
}

// Visit a thread's sums four at a time, with where they are in a slot; tiles beyond the last rank have none.
template <typename C, typename Visit>
__device__ __forceinline__ void for_each_four(Sums<C>& sums,
                                              const ReduceParams& params,
                                              const Work& work,
                                              const Visit& visit) {
  const ReduceJob& job = params.jobs[work.job];
#pragma unroll
  for (int i = 0; i < kWarpColumns / 16; ++i) {
    const int64_t first = i * (C::kTiles + 1);
#pragma unroll
    for (int tile = 0; tile < C::kTiles; ++tile) {
      if (job.out != nullptr && work.rank + tile * kTileRanks < params.r) {
        visit(sums.out[i][tile], (first + tile) * kThreads + threadIdx.x);
      }
    }
    if (adds_columns(job, work)) {
      visit(sums.bias[i], (first + C::kTiles) * kThreads + threadIdx.x);
    }
  }
}

// Leave the sums of this CTA in memory; for the last CTA of the unit, make them those of all. False for the others.
template <typename C>
__device__ __forceinline__ bool add_up(Sums<C>& sums, int* sIsLast, const ReduceParams& params, const Work& work) {
  const int cta = blockIdx.x, first = params.plan.first_cta(work.unit), last = params.plan.last_cta(work.unit);
  if (first == last) {
    return true;
  }
  constexpr int64_t kFours = C::kVariant.slot_floats() / 4;
  float4* gSlots = reinterpret_cast<float4*>(params.partials);
  float4* gOwn = gSlots + params.plan.slot(cta, work.unit) * kFours;
  for_each_four(sums, params, work, [&](float (&four)[4], int64_t place) {
    gOwn[place] = make_float4(four[0], four[1], four[2], four[3]);
  });
  __syncthreads();
  if (threadIdx.x == 0) {
    *sIsLast = is_last_to_come(params.tickets + work.unit, params.nonce, static_cast<uint32_t>(last - first + 1));
  }
  __syncthreads();
  if (*sIsLast == 0) {
    return false;
  }
  sums = {};
#pragma unroll 1
  for (int other = first; other <= last; ++other) {
    // Other CTAs of this launch wrote these: ordinary loads, which the ticket orders.
    const float4* gSlot = gSlots + params.plan.slot(other, work.unit) * kFours;
    for_each_four(sums, params, work, [&](float (&four)[4], int64_t place) {
      const float4 value = gSlot[place];
      four[0] += value.x;
      four[1] += value.y;
      four[2] += value.z;
      four[3] += value.w;
    });
  }
  return true;
}

template <typename C>
__device__ __forceinline__ void store_sums(const Sums<C>& sums,
                                           const Thread& thread,
                                           const ReduceParams& params,
                                           const Work& work) {
  const ReduceJob& job = params.jobs[work.job];
  const float factor = factor_of(job);
#pragma unroll
  for (int i = 0; i < kWarpColumns / 16; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int column = thread.warp * kWarpColumns + 16 * i + 8 * half + thread.group;
      if (work.column + column >= job.columns) {
        continue;
      }
      if (adds_columns(job, work) && thread.quad == 0) {
        using T = typename C::T;
        static_cast<T*>(job.sums)[work.column + column] = static_cast<T>(sums.bias[i][2 * half]);
      }
#pragma unroll
      for (int tile = 0; tile < C::kTiles; ++tile) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          using Out = typename C::Out;
          const int rank = work.rank + tile * kTileRanks + 2 * thread.quad + j;
          if (job.out != nullptr && rank < params.r) {
            static_cast<Out*>(job.out)[(work.column + column) * job.out_column + rank * job.out_rank] =
                static_cast<Out>(factor * sums.out[i][tile][2 * half + j]);
          }
        }
      }
    }
  }
}

template <typename C>
__device__ __forceinline__ void reduce_body(const ReduceParams& params) {
  unsigned char* shared = static_cast<unsigned char*>(shared_memory());
  auto* sHalf = reinterpret_cast<typename C::T*>(shared + C::kVariant.half_s());
  int* sIsLast = reinterpret_cast<int*>(shared + C::kVariant.last_word());
  const int lane = threadIdx.x % 32;
  const Thread thread = {static_cast<int>(threadIdx.x) / 32, lane, lane / 4, lane % 4};

  const Plan& plan = params.plan;
  const int64_t begin = plan.first_chunk(blockIdx.x);
  const int count = static_cast<int>(plan.first_chunk(blockIdx.x + 1) - begin);
  const int unit = static_cast<int>(begin / plan.chunks), chunk = static_cast<int>(begin % plan.chunks);
  Work work = work_at(params, unit, chunk, C::kRanks), ahead = work;
  int copied = 0;
  // Copies of nothing are a group too: what is waited for is always the oldest of kStages - 1.
  const auto copy_next = [&] {
    if (copied < count) {
      copy_chunk<C>(shared + copied % C::kStages * C::kVariant.stage_bytes(), thread, params, ahead);
      go_on(ahead, params, C::kRanks);
      ++copied;
    }
    end_copies();
  };
  for (int i = 0; i < C::kStages - 1; ++i) {
    copy_next();
  }

  Sums<C> sums = {};
  [[maybe_unused]] UpFactor<C> up;
  bool is_new = true;
  for (int i = 0; i < count; ++i) {
    unsigned char* stage = shared + i % C::kStages * C::kVariant.stage_bytes();
    wait_for_copies<C::kStages - 2>();
    __syncthreads();  // this chunk is there for all, and all are done with the one before, whose stage is next
    copy_next();
    if constexpr (C::kNarrow) {
      if (is_new && params.ds != nullptr && work.job == kUp) {
        up.load(thread, params, work);
      }
    }
    prepare_chunk<C>(stage, sHalf, thread, params, work);
    __syncthreads();
    add_chunk(sums, stage, sHalf, thread, params, work);
    if constexpr (C::kNarrow) {
      if (params.ds != nullptr && work.job == kUp) {
        store_ds(up, stage, thread, params, work);
      }
    }

    is_new = work.chunk + 1 == plan.chunks;
    if (is_new || i + 1 == count) {
      if (add_up(sums, sIsLast, params, work)) {
        store_sums(sums, thread, params, work);
      }
      sums = {};
    }
    go_on(work, params, C::kRanks);
  }
  wait_for_copies<0>();
}

}  // namespace peft_kernels::lora::reduce
