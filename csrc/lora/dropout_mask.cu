// What      the keep-mask of the low-rank branch's dropout, written out
// Equation  mask[i, col] = half(philox(seed; col / 8, first_row + i, lane), col % 8) >= threshold   (recipe: dropout.h)
// Tensors   mask (rows, cols) uint8, contiguous, any alignment; seed 0-d int64
// Tiles     a thread owns 8 columns of a row; a block 256 columns of 8 rows, then walks down the rows
// Bound     one write of the mask: rows * cols bytes
// Refused   negative sizes, cols > 2^35 (the counter holds col / 8 in 32 bits), a threshold of more than 16 bits
#include <algorithm>
#include <stdexcept>
#include <string>

#include "core/launch.h"
#include "lora/dropout.h"
#include "lora/params.h"

namespace peft_kernels::lora {
namespace {

constexpr int kBlockGroups = 32;  // one warp writes 256 bytes that follow each other
constexpr int kBlockRows = 8;
constexpr int kThreads = kBlockGroups * kBlockRows;
constexpr int64_t kMaxGridRows = 65535;

template <bool kAligned>
__global__ void __launch_bounds__(kThreads) dropout_mask_kernel(const DropoutMaskParams params) {
  const int64_t group = static_cast<int64_t>(blockIdx.x) * kBlockGroups + threadIdx.x;
  const int64_t first_col = group * kDecisionsPerCall;
  if (first_col >= params.cols) {
    return;
  }
  const int64_t seed = *params.seed;
  const int64_t row_step = static_cast<int64_t>(gridDim.y) * kBlockRows;
  for (int64_t row = static_cast<int64_t>(blockIdx.y) * kBlockRows + threadIdx.y; row < params.rows; row += row_step) {
    const Words draws = draw(seed, params.first_row + row, static_cast<uint32_t>(group), params.lane);
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

void check_params(const DropoutMaskParams& params) {
  if (params.first_row < 0 || params.rows < 0 || params.cols < 0) {
    throw std::invalid_argument("lora_linear: first_row, rows and cols must not be negative, got (" +
                                std::to_string(params.first_row) + ", " + std::to_string(params.rows) + ", " +
                                std::to_string(params.cols) + ")");
  }
  if (params.cols > int64_t{kDecisionsPerCall} << 32) {
    throw std::invalid_argument("lora_linear: cols must be at most 2^35, got " + std::to_string(params.cols));
  }
  if (params.threshold >= kDropoutLevels) {
    throw std::invalid_argument("lora_linear: threshold must be below 65536, got " + std::to_string(params.threshold));
  }
}

}  // namespace

void dropout_mask(const DropoutMaskParams& params, cudaStream_t stream) {
  check_params(params);
  if (params.rows == 0 || params.cols == 0) {
    return;
  }
  const int64_t groups = ceil_div(params.cols, kDecisionsPerCall);
  const int64_t grid_rows = std::min(ceil_div(params.rows, kBlockRows), kMaxGridRows);
  const LaunchShape shape{dim3(static_cast<unsigned>(ceil_div(groups, kBlockGroups)), static_cast<unsigned>(grid_rows)),
                          dim3(kBlockGroups, kBlockRows)};

  const bool aligned =
      params.cols % kDecisionsPerCall == 0 && reinterpret_cast<uintptr_t>(params.mask) % sizeof(uint64_t) == 0;
  launch("launch of lora_linear's dropout_mask", aligned ? dropout_mask_kernel<true> : dropout_mask_kernel<false>,
         shape, stream, params);
}

}  // namespace peft_kernels::lora
