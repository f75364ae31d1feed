// Launcher of the decode kernel for tokens of several adapters; header and body: decode_rows.cuh.
#include "core/launch.h"
#include "lora/decode_launch.h"
#include "lora/decode_rows.cuh"

namespace peft_kernels::lora {
namespace {

template <typename T, typename TAdapter, int kTokens>
__global__ void __launch_bounds__(decode::kThreads, decode::kCtasPerSm)
    decode_rows_kernel(const __grid_constant__ DecodeRowsParams params) {
  decode::decode_rows_body<T, TAdapter, kTokens>(params);
}

struct Kernels {
  template <typename T, typename TAdapter, int kTokens>
  static auto kernel() {
    return decode_rows_kernel<T, TAdapter, kTokens>;
  }
};

}  // namespace

void decode_rows(const DecodeRowsParams& given, cudaStream_t stream) {
  const DecodeParams& layer = given.layer;
  const auto kernel = decode::kernel_for<Kernels>("lora_rows", layer.dtype, layer.adapter_dtype, layer.shape.m);
  decode::check_params("lora_rows", layer, given.a_rows);
  decode::check_positive("lora_rows", "slots", given.slots);
  DecodeRowsParams params = given;
  params.layer.partials = reinterpret_cast<float*>(params.layer.flags + decode::flag_count(layer.shape));

  LaunchShape shape{dim3(static_cast<unsigned>(layer.grid)), dim3(decode::kThreads), decode::kRowsSharedBytes};
  shape.cooperative = true;
  launch("launch of lora_rows's decode_rows", kernel, shape, stream, params);
}

}  // namespace peft_kernels::lora
