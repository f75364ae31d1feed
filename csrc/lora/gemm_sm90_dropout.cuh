// Which elements gemm_sm90 drops, of x forward and of the rank product backward: draws of dropout.h that the four lanes
// of a quad share, since they hold parts of the same rows. Header: gemm_sm90.cuh.
#pragma once

#include <cstdint>

#include "core/sm90/arch.cuh"
#include "lora/dropout.h"

namespace peft_kernels::lora {

// Of 64 columns and the two rows, 8 apart, that a lane holds of each 16: which of its elements are kept. Groups of 8
// columns are of a quad's lanes in turn, and each lane holds a pair of columns of every group.
struct Kept {
  uint32_t of_lane[4];

  // Column `j` (0 or 1) of the lane's pair in column group `group` (0 to 7), in the first row or the second.
  PEFT_KERNELS_DEVICE bool operator()(int second, int group, int j) const {
    return (of_lane[group % 4] >> (8 * (group / 4 * 2 + second) + j) & 1) != 0;
  }

  // A mask of such a pair in a word of half-precision values.
  PEFT_KERNELS_DEVICE uint32_t pair(int second, int group) const {
    return ((*this)(second, group, 0) ? 0x0000FFFFu : 0u) | ((*this)(second, group, 1) ? 0xFFFF0000u : 0u);
  }
};

// Draw for the lane's rows `row` and `row` + 8 and columns from `col` on, a multiple of 8. All lanes of a warp call it.
PEFT_KERNELS_DEVICE Kept draw_kept(int64_t seed, uint32_t threshold, int row, int col) {
  const int lane_of_quad = threadIdx.x % 4;
  uint32_t mine = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const Words draws =
        draw(seed, row + 8 * (i % 2), static_cast<uint32_t>(col / kDecisionsPerCall + lane_of_quad + i / 2 * 4));
#pragma unroll
    for (int j = 0; j < kDecisionsPerCall; ++j) {
      mine |= static_cast<uint32_t>(keep(draws, j, threshold)) << (8 * i + j);
    }
  }
  Kept kept;
#pragma unroll
  for (int lane = 0; lane < 4; ++lane) {
    kept.of_lane[lane] = __shfl_sync(0xFFFFFFFFu, mine, lane, 4) >> (2 * lane_of_quad);
  }
  return kept;
}

}  // namespace peft_kernels::lora
