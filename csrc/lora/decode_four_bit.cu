// Launcher of the decode kernel for weights of four bits; header and body: decode_four_bit.cuh.
#include <string>

#include "core/launch.h"
#include "lora/decode_four_bit.cuh"
#include "lora/decode_launch.h"

namespace peft_kernels::lora {
namespace {

constexpr const char* kName = "lora_four_bit";

template <typename T, typename TAdapter, int kTokens>
__global__ void __launch_bounds__(decode::kThreads, decode::kCtasPerSm)
    decode_four_bit_kernel(const __grid_constant__ DecodeFourBitParams params) {
  decode::decode_four_bit_body<T, TAdapter, kTokens>(params);
}

struct Kernels {
  template <typename T, typename TAdapter, int kTokens>
  static auto kernel() {
    return decode_four_bit_kernel<T, TAdapter, kTokens>;
  }
};

void check_codes(const DecodeFourBitParams& params) {
  const decode::Shape& shape = params.layer.shape;
  if (params.block_shift < decode::kChunkShift || params.block_shift > 30 || params.second_shift < 0 ||
      params.second_shift > 30) {
    throw std::invalid_argument(std::string(kName) +
                                ": decode takes blocks of 64 to 2^30 elements, and of 1 to 2^30 "
                                "blocks of a second level");
  }
  if (shape.k % (1 << params.block_shift) != 0) {
    throw std::invalid_argument(std::string(kName) + ": decode's k must be a multiple of the block, " +
                                std::to_string(1 << params.block_shift) + ", got " + std::to_string(shape.k));
  }
  if (static_cast<int64_t>(shape.n) * (shape.k / decode::kChunkK) > decode::kMaxSize) {
    throw std::invalid_argument(std::string(kName) + ": decode's n times k must be at most 2^36");
  }
  decode::check_rows(kName, "codes", params.codes, shape.n, shape.k / 2, 1);
}

}  // namespace

void decode_four_bit(const DecodeFourBitParams& given, cudaStream_t stream) {
  const DecodeParams& layer = given.layer;
  const auto kernel = decode::kernel_for<Kernels>(kName, layer.dtype, layer.adapter_dtype, layer.shape.m);
  decode::check_params(kName, layer, layer.shape.r);
  check_codes(given);
  DecodeFourBitParams params = given;
  params.layer.partials = reinterpret_cast<float*>(params.layer.flags + decode::flag_count(layer.shape));

  LaunchShape shape{dim3(static_cast<unsigned>(layer.grid)), dim3(decode::kThreads), decode::kFourBitSharedBytes};
  shape.cooperative = true;
  launch("launch of lora_four_bit's decode_four_bit", kernel, shape, stream, params);
}

}  // namespace peft_kernels::lora
