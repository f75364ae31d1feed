// Launcher of the decode kernel; header and body: decode.cuh.
#include <stdexcept>
#include <string>

#include "core/launch.h"
#include "lora/decode.cuh"

namespace peft_kernels::lora {
namespace {

template <typename T, typename TAdapter, int kTokens>
__global__ void __launch_bounds__(decode::kThreads, decode::kCtasPerSm)
    decode_kernel(const __grid_constant__ DecodeParams params) {
  decode::decode_body<T, TAdapter, kTokens>(params);
}

using Kernel = void (*)(const DecodeParams);

template <typename T, typename TAdapter>
Kernel kernel_of(int m) {
  static_assert(decode::kMaxTokens == 16, "a kernel for each number of tokens that tokens_of names");
  return decode::tokens_of(m) == 8 ? decode_kernel<T, TAdapter, 8> : decode_kernel<T, TAdapter, 16>;
}

Kernel kernel_for(Dtype dtype, Dtype adapter_dtype, int m) {
  const bool wide = adapter_dtype == Dtype::kFloat32;
  if (dtype == Dtype::kFloat32 || (!wide && adapter_dtype != dtype)) {
    throw std::invalid_argument("lora_linear: decode takes bfloat16 or float16 with adapters of that dtype or float32");
  }
  if (dtype == Dtype::kBfloat16) {
    return wide ? kernel_of<__nv_bfloat16, float>(m) : kernel_of<__nv_bfloat16, __nv_bfloat16>(m);
  }
  return wide ? kernel_of<__half, float>(m) : kernel_of<__half, __half>(m);
}

void check_positive(const char* name, int64_t value) {
  if (value < 1) {
    throw std::invalid_argument("lora_linear: decode's " + std::string(name) + " must be positive, got " +
                                std::to_string(value));
  }
}

void check_rows(const char* name, const void* base, int rows, int64_t stride, int64_t element_bytes) {
  const bool strides = rows > 1 && stride * element_bytes % 16 != 0;
  if (reinterpret_cast<uintptr_t>(base) % 16 != 0 || strides) {
    throw std::invalid_argument("lora_linear: decode reads 16 bytes at a time, rows of " + std::string(name) +
                                " do not start at multiples of 16 bytes");
  }
}

void check_params(const DecodeParams& params) {
  const decode::Shape& shape = params.shape;
  check_positive("m", shape.m);
  check_positive("n", shape.n);
  check_positive("k", shape.k);
  check_positive("r", shape.r);
  check_positive("splits", shape.splits);
  check_positive("down_splits", shape.down_splits);
  check_positive("grid", params.grid);
  if (shape.m > decode::kMaxTokens) {
    throw std::invalid_argument("lora_linear: decode takes at most 16 tokens, got " + std::to_string(shape.m));
  }
  if (shape.n > decode::kMaxSize || shape.k > decode::kMaxSize || shape.r > decode::kMaxSize) {
    throw std::invalid_argument("lora_linear: decode's n, k and r must be at most 2^30");
  }
  if (shape.k % decode::kVector != 0) {
    throw std::invalid_argument("lora_linear: decode's k must be a multiple of 8, got " + std::to_string(shape.k));
  }
  check_rows("x", params.x, shape.m, params.x_stride, 2);
  check_rows("weight", params.weight, shape.n, params.weight_stride, 2);
  check_rows("lora_a", params.lora_a, shape.r, params.a_stride, params.adapter_dtype == Dtype::kFloat32 ? 4 : 2);
}

}  // namespace

void decode_forward(const DecodeParams& given, cudaStream_t stream) {
  const Kernel kernel = kernel_for(given.dtype, given.adapter_dtype, given.shape.m);
  check_params(given);
  DecodeParams params = given;
  params.partials = reinterpret_cast<float*>(params.flags + decode::flag_count(params.shape));

  LaunchShape shape{dim3(static_cast<unsigned>(params.grid)), dim3(decode::kThreads), decode::kSharedBytes};
  shape.cooperative = true;
  launch("launch of lora_linear's decode_forward", kernel, shape, stream, params);
}

}  // namespace peft_kernels::lora
