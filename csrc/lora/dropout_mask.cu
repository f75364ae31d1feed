// Launcher of the mask kernel; header and body: dropout_mask.cuh.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "core/launch.h"
#include "lora/dropout_mask.cuh"

namespace peft_kernels::lora {
namespace {

template <bool kAligned>
__global__ void __launch_bounds__(mask::kThreads) dropout_mask_kernel(const DropoutMaskParams params) {
  mask::mask_body<kAligned>(params);
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
  const int64_t grid_rows = std::min(ceil_div(params.rows, mask::kBlockRows), mask::kMaxGridRows);
  const LaunchShape shape{
      dim3(static_cast<unsigned>(ceil_div(groups, mask::kBlockGroups)), static_cast<unsigned>(grid_rows)),
      dim3(mask::kBlockGroups, mask::kBlockRows)};
  launch("launch of lora_linear's dropout_mask",
         mask::is_aligned(params) ? dropout_mask_kernel<true> : dropout_mask_kernel<false>, shape, stream, params);
}

}  // namespace peft_kernels::lora
