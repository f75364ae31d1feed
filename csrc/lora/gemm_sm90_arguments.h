// What the host hands to gemm_sm90: the checks of its parameters, tensor maps, the order of tiles.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "core/sm90/tensor_map.h"
#include "lora/dropout.h"
#include "lora/gemm_sm90.cuh"
#include "lora/params.h"

namespace peft_kernels::lora {

// Rows of a matrix as TMA takes them.
inline void check_gemm_rows(const char* name, const void* data, int64_t cols, int64_t stride) {
  if (reinterpret_cast<uintptr_t>(data) % 16 != 0 || stride % 8 != 0 || stride < cols) {
    throw std::invalid_argument("lora_linear: TMA takes rows that start at multiples of 16 bytes; those of " +
                                std::string(name) + " are " + std::to_string(stride) + " elements apart, for " +
                                std::to_string(cols) + " columns");
  }
}

inline void check_gemm_params(const GemmParams& params) {
  if (params.dtype != Dtype::kBfloat16 && params.dtype != Dtype::kFloat16) {
    throw std::invalid_argument("lora_linear: gemm_sm90 takes bfloat16 or float16");
  }
  const int64_t sizes[] = {params.m, params.n, params.k, params.r};
  for (const int64_t size : sizes) {
    // TMA's coordinates are 32-bit and signed, and tiles reach past the end.
    if (size < 1 || size > (int64_t{1} << 31) - 1024) {
      throw std::invalid_argument(
          "lora_linear: gemm_sm90's m, n, k and r must be positive and below 2^31 - 1023, got " + std::to_string(size));
    }
  }
  if (params.r > kGemmMaxRank) {
    throw std::invalid_argument("lora_linear: gemm_sm90 takes ranks up to 128, got " + std::to_string(params.r));
  }
  if (params.n % 8 != 0 || reinterpret_cast<uintptr_t>(params.bias) % 4 != 0) {
    throw std::invalid_argument("lora_linear: gemm_sm90's n must be a multiple of 8, and bias on a 4-byte boundary");
  }
  if (params.threshold >= kDropoutLevels) {
    throw std::invalid_argument("lora_linear: gemm_sm90's threshold must be below 65536, got " +
                                std::to_string(params.threshold));
  }
  if (params.threshold > 0 && params.seed == nullptr) {
    throw std::invalid_argument("lora_linear: gemm_sm90's dropout needs a seed");
  }
  check_gemm_rows("x", params.x, params.k, params.x_stride);
  check_gemm_rows("w", params.w, params.backward ? params.n : params.k, params.w_stride);
  check_gemm_rows("down", params.down, params.backward ? params.r : params.k, params.down_stride);
  check_gemm_rows("up", params.up, params.backward ? params.n : params.r, params.up_stride);
  check_gemm_rows("y", params.y, params.n, params.n);
  check_gemm_rows("s_half", params.s_half, 0, 0);
}

template <typename Config>
GemmArguments gemm_arguments(const GemmParams& params, int cluster, int group_rows, int resident_clusters) {
  constexpr uint32_t kLine = Config::kBlockK, kRankLine = Config::kRankChunk;
  const auto matrix = [](const void* data, int64_t rows, int64_t cols, int64_t stride, uint32_t box_rows,
                         uint32_t box_cols) {
    return sm90::encode(Config::kType, {data, rows, cols, stride, box_rows, box_cols});
  };
  GemmArguments arguments = {};
  arguments.x = matrix(params.x, params.m, params.k, params.x_stride, Config::kBlockM, kLine);
  if (Config::kTransposed) {
    arguments.w = matrix(params.w, params.k, params.n, params.w_stride, Config::kWHalf, kLine);
    arguments.down = matrix(params.down, params.k, params.r, params.down_stride, Config::kBlockK, kRankLine);
    arguments.up = matrix(params.up, params.r, params.n, params.up_stride, Config::kUpHalf, kLine);
  } else {
    arguments.w = matrix(params.w, params.n, params.k, params.w_stride, Config::kWHalf, kLine);
    arguments.down = matrix(params.down, params.r, params.k, params.down_stride, Config::kRank, kLine);
    arguments.up = matrix(params.up, params.n, params.r, params.up_stride, Config::kUpHalf, kRankLine);
  }
  arguments.s_half = matrix(params.s_half, params.m, Config::kRank, Config::kRank, Config::kBlockM, kRankLine);
  arguments.y = matrix(params.y, params.m, params.n, params.n, Config::kWarpRows, Config::kChunkN);

  arguments.bias = static_cast<const uint16_t*>(params.bias);
  arguments.s = params.s;
  arguments.s_half_data = static_cast<uint16_t*>(params.s_half);
  arguments.flags = params.flags;
  arguments.nonce = params.nonce;
  arguments.scale_ptr = params.scale;
  arguments.scale = params.scale_value;
  arguments.seed = params.seed;
  arguments.threshold = params.threshold;
  arguments.keep_scale = params.keep_scale;
  arguments.m = static_cast<int>(params.m);
  arguments.n = static_cast<int>(params.n);
  arguments.k = static_cast<int>(params.k);
  arguments.r = static_cast<int>(params.r);
  arguments.cluster = cluster;
  const int64_t rows = cluster * Config::kBlockM;
  arguments.order = {static_cast<int>((params.m + rows - 1) / rows),
                     static_cast<int>((params.n + Config::kBlockN - 1) / Config::kBlockN), group_rows};
  arguments.clusters = static_cast<int>(std::min<int64_t>(resident_clusters, arguments.order.count()));
  return arguments;
}

}  // namespace peft_kernels::lora
