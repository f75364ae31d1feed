// What the launchers of decode_forward and decode_rows share: the choice of a kernel, and checks.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "core/launch.h"
#include "lora/decode_config.h"
#include "lora/params.h"

namespace peft_kernels::lora::decode {

// A kernel for each number of tokens that tokens_of names; Kernels has them by dtypes and tokens.
template <typename Kernels, typename T, typename TAdapter>
auto kernel_of(int m) {
  static_assert(kMaxTokens == 16);
  return tokens_of(m) == 8 ? Kernels::template kernel<T, TAdapter, 8>() : Kernels::template kernel<T, TAdapter, 16>();
}

template <typename Kernels>
auto kernel_for(const std::string& name, Dtype dtype, Dtype adapter_dtype, int m) {
  const bool wide = adapter_dtype == Dtype::kFloat32;
  if (dtype == Dtype::kFloat32 || (!wide && adapter_dtype != dtype)) {
    throw std::invalid_argument(name + ": decode takes bfloat16 or float16 with adapters of that dtype or float32");
  }
  if (dtype == Dtype::kBfloat16) {
    return wide ? kernel_of<Kernels, __nv_bfloat16, float>(m) : kernel_of<Kernels, __nv_bfloat16, __nv_bfloat16>(m);
  }
  return wide ? kernel_of<Kernels, __half, float>(m) : kernel_of<Kernels, __half, __half>(m);
}

inline void check_positive(const std::string& name, const char* what, int64_t value) {
  if (value < 1) {
    throw std::invalid_argument(name + ": decode's " + what + " must be positive, got " + std::to_string(value));
  }
}

inline void check_rows(
    const std::string& name, const char* what, const void* base, int rows, int64_t stride, int64_t element_bytes) {
  const bool strides = rows > 1 && stride * element_bytes % 16 != 0;
  if (reinterpret_cast<uintptr_t>(base) % 16 != 0 || strides) {
    throw std::invalid_argument(name + ": decode reads 16 bytes at a time, rows of " + what +
                                " do not start at multiples of 16 bytes");
  }
}

// Throw unless a kernel can run this; a_rows are lora_a's.
inline void check_params(const std::string& name, const DecodeParams& params, int a_rows) {
  const Shape& shape = params.shape;
  check_positive(name, "m", shape.m);
  check_positive(name, "n", shape.n);
  check_positive(name, "k", shape.k);
  check_positive(name, "r", shape.r);
  check_positive(name, "splits", shape.splits);
  check_positive(name, "down_splits", shape.down_splits);
  check_positive(name, "grid", params.grid);
  if (shape.m > kMaxTokens) {
    throw std::invalid_argument(name + ": decode takes at most 16 tokens, got " + std::to_string(shape.m));
  }
  if (shape.n > kMaxSize || shape.k > kMaxSize || shape.r > kMaxSize) {
    throw std::invalid_argument(name + ": decode's n, k and r must be at most 2^30");
  }
  if (shape.k % kVector != 0) {
    throw std::invalid_argument(name + ": decode's k must be a multiple of 8, got " + std::to_string(shape.k));
  }
  check_rows(name, "x", params.x, shape.m, params.x_stride, 2);
  check_rows(name, "weight", params.weight, shape.n, params.weight_stride, 2);
  check_rows(name, "lora_a", params.lora_a, a_rows, params.a_stride, params.adapter_dtype == Dtype::kFloat32 ? 4 : 2);
}

}  // namespace peft_kernels::lora::decode
