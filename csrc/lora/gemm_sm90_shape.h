// Which tiles gemm_sm90 cuts y into: a choice of the host from the sizes and the multiprocessors. Plain C++.
//
// Costs are cycles of one multiprocessor [model]: 4 for each column of a 128-row step of 64 on the tensor cores, and
// what the step's bytes out of L2 add, 12 % of the time of the largest tile's where two blocks share W, in proportion
// to the bytes. They order the shapes; nobody has timed them.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "lora/gemm_sm90_config.h"

namespace peft_kernels::lora {

struct GemmShape {
  int block_n;
  int cluster;     // blocks, one below the other
  int group_rows;  // row units of a group, as tile_order.h has them
};

// Cycles from the first to the last tile of a launch.
inline double gemm_cycles(int64_t m, int64_t n, int64_t k, int block_n, int cluster, int multiprocessors) {
  const int64_t units = ((m + cluster * kGemmBlockM - 1) / (cluster * kGemmBlockM)) * ((n + block_n - 1) / block_n);
  const int64_t at_a_time = multiprocessors / cluster > 0 ? multiprocessors / cluster : 1;
  const int64_t waves = (units + at_a_time - 1) / at_a_time;
  const double kilobytes = 16.0 + block_n / 8.0 / cluster, step = 4.0 * block_n + 123.0 * kilobytes / 32.0;
  // To fill the ring, and to store a tile: half of it lies under the other consumer's products.
  const double at_ends = 1000.0 + 2.0 * block_n;
  return static_cast<double>(waves) * (static_cast<double>((k + 63) / 64) * step + at_ends);
}

// The row units that make what one wave of clusters reads, rows of x and columns of W, least: as long as it is wide.
inline int gemm_group_rows(int64_t m, int block_n, int cluster, int multiprocessors) {
  const int64_t rows = cluster * kGemmBlockM, units = (m + rows - 1) / rows, wave = multiprocessors / cluster;
  int64_t group = 1;
  while (group < units && (group + 1) * (group + 1) * rows <= wave * block_n) {
    ++group;
  }
  return static_cast<int>(group);
}

// The cheapest of the `wide` and the `narrow` tiles, alone or in clusters of two; the larger where they cost the same.
inline GemmShape gemm_shape(int64_t m, int64_t n, int64_t k, int wide, int narrow, int multiprocessors) {
  GemmShape best = {};
  double least = 0.0;
  for (const int cluster : {kGemmMaxCluster, 1}) {
    if (cluster > 1 && m <= kGemmBlockM) {
      continue;
    }
    for (const int block_n : {wide, narrow}) {
      const double cycles = gemm_cycles(m, n, k, block_n, cluster, multiprocessors);
      if (best.cluster == 0 || cycles < least) {
        best = {block_n, cluster, gemm_group_rows(m, block_n, cluster, multiprocessors)};
        least = cycles;
      }
    }
  }
  return best;
}

// Of all multiprocessors' time, the part that a launch keeps them busy with tiles of y.
inline double gemm_busy(int64_t m, int64_t n, const GemmShape& shape, int multiprocessors) {
  const int64_t rows = (m + kGemmBlockM - 1) / kGemmBlockM, cols = (n + shape.block_n - 1) / shape.block_n;
  const int64_t units = (rows + shape.cluster - 1) / shape.cluster * cols, at_a_time = multiprocessors / shape.cluster;
  const int64_t waves = (units + at_a_time - 1) / at_a_time;
  return static_cast<double>(rows * cols) / static_cast<double>(waves * multiprocessors);
}

}  // namespace peft_kernels::lora
