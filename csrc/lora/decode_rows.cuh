// What      LoRA's linear layer for at most 16 tokens, each with an adapter of its own choice, in one launch: device
// body Equation  y[m] = x[m] W^T + bias + scale_t S[m] B_t^T,  S[m] = x[m] A_t^T,  t = slot[m]   (Hu et al. 2021,
//           arXiv:2106.09685, section 4.1); y[m] = x[m] W^T + bias where slot[m] is no slot
// Tensors   as decode.cuh's; A (sum of ranks, k) has the slots' factors under each other, B (n, sum of ranks) side by
// side Tiles     decode.cuh's. The rows of A of all slots that tokens have stand one after the other, the *chosen*
// rows, and
//           are cut into tiles; of a tile's products with all tokens those with a token's own rows are S
// Bound     one read of W, as decode.cuh's, and of the chosen A and B: 2 r (n + k) bytes for r chosen rows
// Refused   as there
//
// The host does not know the slots, so units are numbered for the most rows that can be chosen, shape.r of them. The
// units of tiles beyond those that are chosen do nothing and publish nothing, and nobody waits for them. So which unit
// is whose, and with it the argument that nobody waits for ever, are decode.cuh's; so is the order of sums: a token's
// y has the bits that decode.cuh gives to the token's adapter with the same splits.
#pragma once

#include "lora/decode.cuh"

namespace peft_kernels::lora::decode {

// Of each token: what of the chosen rows is its slot's, and where its slot's factors and its S are.
struct Plan {
  int chosen;             // rows, of all slots that tokens have
  int begin[kMaxTokens];  // its slot's among the chosen
  int rank[kMaxTokens];   // 0 where it has no adapter
  int row[kMaxTokens];    // of A, and column of B
  int place[kMaxTokens];  // row of S
  float scale[kMaxTokens];
};

constexpr int kPlan = kSharedBytes / static_cast<int>(sizeof(float));  // its offset in shared memory, in floats
constexpr int kRowsSharedBytes = kSharedBytes + static_cast<int>(sizeof(Plan));
static_assert(kRowsSharedBytes <= 48 * 1024, "more would have to be asked for");

__device__ __forceinline__ Plan& shared_plan() {
  return *reinterpret_cast<Plan*>(static_cast<float*>(shared_memory()) + kPlan);
}

// By one warp. Its other threads are handed the plan by the CTA's next barrier.
__device__ __forceinline__ void make_plan(const DecodeRowsParams& params, int lane) {
  Plan& sPlan = shared_plan();
  const int m = params.layer.shape.m;
  int slot = -1, rank = 0;
  if (lane < m) {
    slot = params.slot[lane * params.slot_stride];
    sPlan.place[params.order[lane * params.order_stride]] = lane;
    const bool is_slot = slot >= 0 && slot < params.slots;
    rank = is_slot ? params.table[kRank * params.table_stride + slot] : 0;
    sPlan.row[lane] = is_slot ? params.table[kFirst * params.table_stride + slot] : 0;
    sPlan.scale[lane] = is_slot ? params.layer.scale[slot * params.scale_stride] : 0.0f;
    sPlan.rank[lane] = rank;
  }

  // A slot is counted with the first of its tokens; chosen rows are in the order of the slots.
  int counted = rank;
#pragma unroll
  for (int token = 0; token < kMaxTokens; ++token) {
    if (__shfl_sync(0xffffffffu, slot, token) == slot && token < lane) {
      counted = 0;
    }
  }
  int begin = 0, chosen = 0;
#pragma unroll
  for (int token = 0; token < kMaxTokens; ++token) {
    const int other = __shfl_sync(0xffffffffu, slot, token), rows = __shfl_sync(0xffffffffu, counted, token);
    begin += other < slot ? rows : 0;
    chosen += rows;
  }
  if (lane < m) {
    sPlan.begin[lane] = begin;
  }
  if (lane == 0) {
    sPlan.chosen = chosen;
  }
}

// Where a chosen row is in A: that of a token, no matter which, whose slot has it.
__device__ __forceinline__ int row_of_a(int chosen, int m) {
  const Plan& sPlan = shared_plan();
  int row = 0;
  for (int token = 0; token < m; ++token) {
    const int i = chosen - sPlan.begin[token];
    if (i >= 0 && i < sPlan.rank[token]) {
      row = sPlan.row[token] + i;
    }
  }
  return row;
}

// A tile's rows of W, or its chosen rows of A.
template <typename TRow>
struct ChosenRows {
  using Element = TRow;

  Rows<TRow> rows;
  bool is_down;
  int m;

  __device__ __forceinline__ const TRow* row(int index) const {
    if (!is_down) {
      return rows.row(index);
    }
    return rows.gBase + row_of_a(at_most(rows.first + index, rows.end - 1), m) * rows.stride;
  }
};

// B's columns of the chosen rows `chosen` and after it, for a tile's rows of B.
template <typename TAdapter>
__device__ __forceinline__ void stage_chosen_up(
    float* sUp, const Thread& thread, const DecodeParams& params, int tile, int chosen) {
  const int end = shared_plan().chosen;
  for (int i = thread.lane; i < kRankBlock && chosen + i < end; i += 32) {
    const TAdapter* gColumn =
        static_cast<const TAdapter*>(params.lora_b) + row_of_a(chosen + i, params.shape.m) * params.b_stride_r;
#pragma unroll
    for (int row = thread.warp; row < kTileRows; row += kWarps) {
      const int n = tile * kTileRows + row;
      if (n < params.shape.n) {
        sUp[row * kUpPitch + i] = static_cast<float>(gColumn[n * params.b_stride_n]);
      }
    }
  }
}

// What of the chosen rows `chosen` and after it is a token's own: begin and end among kRankBlock of them.
__device__ __forceinline__ Range own_of(int token, int chosen) {
  const Plan& sPlan = shared_plan();
  const int begin = sPlan.begin[token] - chosen, end = begin + sPlan.rank[token];
  return {begin > 0 ? begin : 0, at_most(end, kRankBlock)};
}

__device__ __forceinline__ void stage_own_s(float* sS,
                                            const Thread& thread,
                                            const DecodeRowsParams& params,
                                            int chosen) {
  const Plan& sPlan = shared_plan();
  for (int token = thread.warp; token < params.layer.shape.m; token += kWarps) {
    // Other CTAs of this launch wrote S: an ordinary load, which the acquired flag orders.
    const float* gRow = params.layer.s + sPlan.place[token] * params.s_stride;
    const Range own = own_of(token, chosen);
    for (int i = own.begin + thread.lane; i < own.end; i += 32) {
      sS[token * kRankBlock + i] = gRow[chosen + i - sPlan.begin[token]];
    }
  }
}

// y of a tile: the base product's sums, bias, and each token's low-rank term of the S that A's units publish meanwhile.
template <typename T, typename TAdapter, int kTokens>
__device__ __forceinline__ void finish_rows_tile(float (&sums)[kOutputs<kTokens>],
                                                 const Thread& thread,
                                                 const DecodeRowsParams& params,
                                                 const Unit& unit,
                                                 int index) {
  float* sUp = static_cast<float*>(shared_memory()) + kUp;
  float* sS = static_cast<float*>(shared_memory()) + kS;
  const Plan& sPlan = shared_plan();
  const DecodeParams& layer = params.layer;
  const Shape& shape = layer.shape;

  stage_chosen_up<TAdapter>(sUp, thread, layer, unit.tile, 0);
  wait_for(layer, index - unit.split, 1, unit.split);
  if (sPlan.chosen > 0) {
    wait_for(layer, unit_of_s(shape, 0), shape.down_splits, tiles(sPlan.chosen));
  }
  __syncthreads();
  add_partials<kTokens>(sums, thread, layer, unit);

  float update[kOutputs<kTokens>] = {};
  for (int chosen = 0; chosen < sPlan.chosen; chosen += kRankBlock) {
    if (chosen > 0) {
      __syncthreads();  // all have read the block before
      stage_chosen_up<TAdapter>(sUp, thread, layer, unit.tile, chosen);
    }
    stage_own_s(sS, thread, params, chosen);
    __syncthreads();
#pragma unroll
    for (int j = 0; j < kOutputs<kTokens>; ++j) {
      if (thread.token(j) < shape.m && unit.tile * kTileRows + thread.column(j) < shape.n) {
        const Range own = own_of(thread.token(j), chosen);
        for (int i = own.begin; i < own.end; ++i) {
          update[j] += sS[thread.token(j) * kRankBlock + i] * sUp[thread.column(j) * kUpPitch + i];
        }
      }
    }
  }

#pragma unroll
  for (int j = 0; j < kOutputs<kTokens>; ++j) {
    const int token = thread.token(j), n = unit.tile * kTileRows + thread.column(j);
    if (token < shape.m && n < shape.n) {
      const T* gBias = static_cast<const T*>(layer.bias);
      const float bias = gBias == nullptr ? 0.0f : static_cast<float>(gBias[n * layer.bias_stride]);
      float value = sums[j] + bias;
      if (sPlan.rank[token] > 0) {
        value += sPlan.scale[token] * update[j];
      }
      static_cast<T*>(layer.y)[static_cast<int64_t>(token) * shape.n + n] = static_cast<T>(value);
    }
  }
}

// S of a tile of chosen rows: of each token what its own slot has of them.
template <int kTokens>
__device__ __forceinline__ void finish_chosen(float (&sums)[kOutputs<kTokens>],
                                              const Thread& thread,
                                              const DecodeRowsParams& params,
                                              const Unit& unit,
                                              int index) {
  const Plan& sPlan = shared_plan();
  wait_for(params.layer, index - unit.split, 1, unit.split);
  __syncthreads();
  add_partials<kTokens>(sums, thread, params.layer, unit);
#pragma unroll
  for (int j = 0; j < kOutputs<kTokens>; ++j) {
    const int token = thread.token(j);
    if (token < params.layer.shape.m) {
      const int rank = unit.tile * kTileRows + thread.column(j) - sPlan.begin[token];
      if (rank >= 0 && rank < sPlan.rank[token]) {
        params.layer.s[sPlan.place[token] * params.s_stride + rank] = sums[j];
      }
    }
  }
  publish_unit(params.layer, index);
}

// For at most kTokens tokens.
template <typename T, typename TAdapter, int kTokens>
__device__ __forceinline__ void decode_rows_body(const DecodeRowsParams& params) {
  float* sSums = static_cast<float*>(shared_memory()) + kSums;
  const DecodeParams& layer = params.layer;
  const Shape& shape = layer.shape;
  const int lane = threadIdx.x % 32;
  const Thread thread = {static_cast<int>(threadIdx.x) / 32, lane, lane / 4, lane % 4};

  // A block that begins with W waits for it at its first sums, when it has long come.
  if (thread.warp == 0) {
    make_plan(params, lane);
  }
  for (int index = blockIdx.x; index < units(shape); index += gridDim.x) {
    const Unit unit = unit_at(shape, index);
    const Range range = chunks_of(shape, unit);
    const int first = unit.tile * kTileRows;
    int chosen = 0;
    if (unit.is_down) {
      __syncthreads();  // the plan
      chosen = shared_plan().chosen;
      if (first >= chosen) {
        continue;
      }
    }
    Sums<kTokens> partial = {};
    const Rows<TAdapter> down = {static_cast<const TAdapter*>(layer.lora_a), layer.a_stride, first, chosen};
    const Rows<T> base = {static_cast<const T*>(layer.weight), layer.weight_stride, first, shape.n};
    if constexpr (std::is_same_v<T, TAdapter>) {
      const ChosenRows<T> rows = {unit.is_down ? down : base, unit.is_down, shape.m};
      accumulate<T>(partial, thread, layer, rows, range);
    } else if (unit.is_down) {
      accumulate<T>(partial, thread, layer, ChosenRows<TAdapter>{down, true, shape.m}, range);
    } else {
      accumulate<T>(partial, thread, layer, base, range);
    }

    // Each branch passes a barrier after these sums are read and before the next unit's are written.
    float sums[kOutputs<kTokens>];
    reduce_over_warps(sums, partial, thread, sSums);
    if (!unit.is_last()) {
      store_partial<kTokens>(sums, thread, layer, unit);
      publish_unit(layer, index);
    } else if (unit.is_down) {
      finish_chosen<kTokens>(sums, thread, params, unit, index);
    } else {
      finish_rows_tile<T, TAdapter, kTokens>(sums, thread, params, unit, index);
    }
  }
}

}  // namespace peft_kernels::lora::decode
