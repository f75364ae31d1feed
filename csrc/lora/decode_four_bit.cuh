// What      LoRA's linear layer for at most 16 tokens on a weight of four bits, in one launch: device body
// Equation  decode.cuh's, with W[i] = values[nibble i] scale[i / block] in float32, rounded once (NF4: Dettmers et al.
//           2023, arXiv:2305.14314)
// Tensors   codes (n, k / 2) uint8, scales (n k / block) float32 or, with a second level, uint8 (params.h); the others
//           are decode.cuh's
// Tiles     decode.cuh's. W is decoded in registers, next to the products
// Bound     one read of the codes, n k / 2 bytes, and of the scales; then the table, a load from shared memory an
// element Refused   as there; blocks shorter than a chunk of k; k no multiple of a block
//
// A turn is the four steps of a warp's next two chunks. Of a row's four lanes lane t loads what is one access of 16
// bytes, the codes of step t, and the scale of their block. Then the four exchange words until each has of every step
// the 8 elements that decode_products.cuh's lanes load. So operands, products and their order are those of the weight
// in T, and so are the bits.
#pragma once

#include "lora/decode.cuh"

namespace peft_kernels::lora::decode {

constexpr int kTurnSteps = 4;  // one for each lane of a row
constexpr int kTurnChunks = kTurnSteps / kSteps;
constexpr int kByteValues = 256;
constexpr int kChunkShift = 6;
static_assert(kChunkK == 1 << kChunkShift && kStepK / 2 == sizeof(uint4),
              "a step is an access, and a chunk has one scale");

// Offsets in shared memory, in floats: a table's 16 values lie in 16 banks, so that no two lanes wait for each other.
constexpr int kTable = kSharedBytes / static_cast<int>(sizeof(float));  // (kNibbles,)
constexpr int kCode = kTable + kNibbles;                                // (kByteValues,) of the second level
constexpr int kFourBitSharedBytes = (kCode + kByteValues) * static_cast<int>(sizeof(float));
static_assert(kFourBitSharedBytes <= 48 * 1024, "more would have to be asked for");
static_assert(kThreads == kByteValues, "a thread stages a value");

__device__ __forceinline__ const float* shared_floats(int offset) {
  return static_cast<const float*>(shared_memory()) + offset;
}

// The CTA's next barrier hands them to all of its threads.
__device__ __forceinline__ void stage_tables(const DecodeFourBitParams& params) {
  float* sFloats = static_cast<float*>(shared_memory());
  const int i = static_cast<int>(threadIdx.x);
  if (i < kNibbles) {
    sFloats[kTable + i] = params.values[i];
  }
  if (params.code != nullptr) {
    sFloats[kCode + i] = __ldg(params.code + i);
  }
}

// A lane's part of a turn, as it comes from memory: of each of its rows the codes of a step, and what their scale is.
struct Turn {
  uint4 codes[kSubtiles];
  uint32_t scale[kSubtiles];  // the bits of a float32, or a byte
  float second[kSubtiles];

  // chunk: of the weight, of which a row has whole ones.
  __device__ __forceinline__ void load(const DecodeFourBitParams& params,
                                       const Thread& thread,
                                       const int (&chunk)[kSubtiles],
                                       bool is_there) {
    const int offset = thread.quad % kSteps * static_cast<int>(sizeof(uint4));
#pragma unroll
    for (int i = 0; i < kSubtiles; ++i) {
      codes[i] =
          is_there ? load_streamed(params.codes + static_cast<int64_t>(chunk[i]) * (kChunkK / 2) + offset) : kZero;
    }
    const int shift = params.block_shift - kChunkShift;
    if (params.code == nullptr) {
#pragma unroll
      for (int i = 0; i < kSubtiles; ++i) {
        scale[i] = is_there ? __ldg(static_cast<const uint32_t*>(params.scales) + (chunk[i] >> shift)) : 0;
      }
    } else {
#pragma unroll
      for (int i = 0; i < kSubtiles; ++i) {
        const int block = chunk[i] >> shift;
        scale[i] = is_there ? __ldg(static_cast<const uint8_t*>(params.scales) + block) : 0;
        second[i] = is_there ? __ldg(params.second + (block >> params.second_shift)) : 0.0f;
      }
    }
  }

  __device__ __forceinline__ float scale_of(const DecodeFourBitParams& params, int i, float offset) const {
    if (params.code == nullptr) {
      return __uint_as_float(scale[i]);
    }
    return __fadd_rn(__fmul_rn(shared_floats(kCode)[scale[i]], second[i]), offset);
  }
};

// Word t of lane s and word s of lane t change places, in each four lanes.
__device__ __forceinline__ void exchange(uint32_t (&words)[kTurnSteps], int quad) {
#pragma unroll
  for (int bit = 1; bit < kTurnSteps; bit *= 2) {
    const bool is_upper = (quad & bit) != 0;
#pragma unroll
    for (int low = 0; low < kTurnSteps; ++low) {
      if ((low & bit) == 0) {
        const int high = low | bit;
        const uint32_t got = __shfl_xor_sync(0xffffffffu, is_upper ? words[low] : words[high], bit);
        words[low] = is_upper ? got : words[low];
        words[high] = is_upper ? words[high] : got;
      }
    }
  }
}

__device__ __forceinline__ float value_at(const float* sTable, uint32_t bytes) {
  return *reinterpret_cast<const float*>(reinterpret_cast<const char*>(sTable) + bytes);
}

// 8 elements: of a byte the high nibble is the first. Nibbles are four times themselves, so that a byte is a place in
// the table.
template <typename T>
__device__ __forceinline__ uint4 decoded(uint32_t codes, float scale, const float* sTable) {
  constexpr uint32_t kPlaces = 0x3C3C3C3Cu;
  const uint32_t first = codes >> 2 & kPlaces, second = codes << 2 & kPlaces;
  uint32_t words[4];
#pragma unroll
  for (uint32_t i = 0; i < 4; ++i) {
    const float one = value_at(sTable, __byte_perm(first, 0, 0x4440 + i));
    const float other = value_at(sTable, __byte_perm(second, 0, 0x4440 + i));
    words[i] = halves_of<T>(one * scale, other * scale);
  }
  return {words[0], words[1], words[2], words[3]};
}

// sums += x times the warp's rows of W, as decode_products.cuh's accumulate has it. What is next of codes and scales is
// under way during a whole turn: of 16 warps 32 KiB of codes to a multiprocessor.
template <typename T, int kTokens>
__device__ __forceinline__ void accumulate_four_bit(
    Sums<kTokens>& sums, const Thread& thread, const DecodeFourBitParams& params, int tile, const Range& range) {
  const Shape& shape = params.layer.shape;
  const float* sTable = shared_floats(kTable);
  const int first = range.begin + thread.warp_of_k();
  const T* gX[kTokens / 8];
#pragma unroll
  for (int i = 0; i < kTokens / 8; ++i) {
    const int token = at_most(thread.group + 8 * i, shape.m - 1);
    gX[i] =
        static_cast<const T*>(params.layer.x) + token * params.layer.x_stride + first * kChunkK + thread.quad * kVector;
  }
  int chunk[kSubtiles];
#pragma unroll
  for (int i = 0; i < kSubtiles; ++i) {
    const int row = at_most(tile * kTileRows + thread.first_row() + thread.group + 8 * i, shape.n - 1);
    chunk[i] = row * (shape.k / kChunkK) + first + thread.quad / kSteps * kWarpsOfK;
  }
  float offset = 0.0f;
  if (params.code != nullptr) {
    offset = params.offset == nullptr ? params.offset_value : __ldg(params.offset);
  }
  int left = (range.end - first) * kChunkK;  // the same for the whole warp

  uint4 rX[kTokens / 8];
  const auto load_x = [&](int at) {
#pragma unroll
    for (int i = 0; i < kTokens / 8; ++i) {
      rX[i] = at < left ? load_shared_by_warps(gX[i] + at) : kZero;
    }
  };

  Turn next;
  load_x(0);
  next.load(params, thread, chunk, offset_of(thread.quad) < left);
  while (left > 0) {
    uint32_t words[kSubtiles][kTurnSteps];
    float scale[kSubtiles][kTurnChunks];
#pragma unroll
    for (int i = 0; i < kSubtiles; ++i) {
#pragma unroll
      for (int word = 0; word < kTurnSteps; ++word) {
        words[i][word] = word_of(next.codes[i], word);
      }
      exchange(words[i], thread.quad);
      const float own = next.scale_of(params, i, offset);
#pragma unroll
      for (int j = 0; j < kTurnChunks; ++j) {
        scale[i][j] = __shfl_sync(0xffffffffu, own, j * kSteps, kTurnSteps);
      }
      chunk[i] += kTurnChunks * kWarpsOfK;
    }
    constexpr int kFurther = offset_of(kTurnSteps);
    next.load(params, thread, chunk, kFurther + offset_of(thread.quad) < left);

#pragma unroll
    for (int step = 0; step < kTurnSteps; ++step) {
      if (step % kSteps == 0 && left <= offset_of(step)) {
        break;
      }
      uint4 rRow[kSubtiles][1];
#pragma unroll
      for (int i = 0; i < kSubtiles; ++i) {
        rRow[i][0] = decoded<T>(words[i][step], scale[i][step / kSteps], sTable);
      }
      multiply<T>(sums, rX, rRow);
      load_x(offset_of(step + 1));
    }
#pragma unroll
    for (int i = 0; i < kTokens / 8; ++i) {
      gX[i] += kFurther;
    }
    left -= kFurther;
  }
}

// Products of W's codes, and of A as it is.
template <typename T, typename TAdapter>
struct FourBitProducts {
  const DecodeFourBitParams& four_bit;

  template <int kTokens>
  __device__ __forceinline__ void operator()(Sums<kTokens>& sums,
                                             const Thread& thread,
                                             const DecodeParams& params,
                                             const Unit& unit,
                                             const Range& range) const {
    if (unit.is_down) {
      const int first = unit.tile * kTileRows;
      const Rows<TAdapter> down = {static_cast<const TAdapter*>(params.lora_a), params.a_stride, first, params.shape.r};
      accumulate<T>(sums, thread, params, down, range);
    } else {
      accumulate_four_bit<T>(sums, thread, four_bit, unit.tile, range);
    }
  }
};

// For at most kTokens tokens.
template <typename T, typename TAdapter, int kTokens>
__device__ __forceinline__ void decode_four_bit_body(const DecodeFourBitParams& params) {
  stage_tables(params);
  __syncthreads();
  decode_body<T, TAdapter, kTokens>(params.layer, FourBitProducts<T, TAdapter>{params});
}

}  // namespace peft_kernels::lora::decode
