// What      the keep-mask of the low-rank branch's dropout, written out: the device body
// Equation  mask[i, col] = half(philox(seed; col / 8, first_row + i), col % 8) >= threshold   (recipe: dropout.h)
// Tensors   mask (rows, cols) uint8, contiguous, any alignment; seed 0-d int64
// Tiles     a thread owns 8 columns of a row; a block 256 columns of 8 rows, then walks down the rows
// Bound     one write of the mask: rows * cols bytes
// Refused   negative sizes, cols > 2^35 (the counter holds col / 8 in 32 bits), a threshold of more than 16 bits
#pragma once

#include <cstdint>

#include "lora/dropout.h"
#include "lora/params.h"

namespace peft_kernels::lora::mask {

constexpr int kBlockGroups = 32;  // one warp writes 256 bytes that follow each other
constexpr int kBlockRows = 8;
constexpr int kThreads = kBlockGroups * kBlockRows;
constexpr int64_t kMaxGridRows = 65535;  // of blocks

// Whether all of a thread's decisions lie in one aligned word.
inline bool is_aligned(const DropoutMaskParams& params) {
  return params.cols % kDecisionsPerCall == 0 && reinterpret_cast<uintptr_t>(params.mask) % sizeof(uint64_t) == 0;
}

template <bool kAligned>
__device__ __forceinline__ void mask_body(const DropoutMaskParams& params) {
  const int64_t group = static_cast<int64_t>(blockIdx.x) * kBlockGroups + threadIdx.x;
  const int64_t first_col = group * kDecisionsPerCall;
  if (first_col >= params.cols) {
    return;
  }
  const int64_t seed = *params.seed;
  const int64_t row_step = static_cast<int64_t>(gridDim.y) * kBlockRows;
  for (int64_t row = static_cast<int64_t>(blockIdx.y) * kBlockRows + threadIdx.y; row < params.rows; row += row_step) {
    const Words draws = draw(seed, params.first_row + row, static_cast<uint32_t>(group));
    uint8_t* gMask = params.mask + row * params.cols + first_col;
    if constexpr (kAligned) {
      uint64_t packed = 0;
#pragma unroll
      for (int j = 0; j < kDecisionsPerCall; ++j) {
        packed |= static_cast<uint64_t>(keep(draws, j, params.threshold)) << (8 * j);
      }
      *reinterpret_cast<uint64_t*>(gMask) = packed;
    } else {
#pragma unroll
      for (int j = 0; j < kDecisionsPerCall; ++j) {
        if (first_col + j < params.cols) {
          gMask[j] = keep(draws, j, params.threshold);
        }
      }
    }
  }
}

}  // namespace peft_kernels::lora::mask
