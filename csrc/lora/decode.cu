// Launcher of the decode kernel; header and body: decode.cuh.
#include "core/launch.h"
#include "lora/decode.cuh"
#include "lora/decode_launch.h"

namespace peft_kernels::lora {
namespace {

template <typename T, typename TAdapter, int kTokens>
__global__ void __launch_bounds__(decode::kThreads, decode::kCtasPerSm)
    decode_kernel(const __grid_constant__ DecodeParams params) {
  decode::decode_body<T, TAdapter, kTokens>(params, decode::Products<T, TAdapter>{});
}

struct Kernels {
  template <typename T, typename TAdapter, int kTokens>
  static auto kernel() {
    return decode_kernel<T, TAdapter, kTokens>;
  }
};

}  // namespace

void decode_forward(const DecodeParams& given, cudaStream_t stream) {
  const auto kernel = decode::kernel_for<Kernels>("lora_linear", given.dtype, given.adapter_dtype, given.shape.m);
  decode::check_params("lora_linear", given, given.shape.r);
  DecodeParams params = given;
  params.partials = reinterpret_cast<float*>(params.flags + decode::flag_count(params.shape));

  LaunchShape shape{dim3(static_cast<unsigned>(params.grid)), dim3(decode::kThreads), decode::kSharedBytes};
  shape.cooperative = true;
  launch("launch of lora_linear's decode_forward", kernel, shape, stream, params);
}

}  // namespace peft_kernels::lora
