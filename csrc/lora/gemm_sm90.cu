// Launcher of gemm_sm90; header and body: gemm_sm90.cuh.
#include <stdexcept>
#include <string>

#include "core/launch.h"
#include "lora/gemm_sm90_arguments.h"
#include "lora/gemm_sm90_launch.h"

namespace peft_kernels::lora {
namespace {

template <bool kDropout>
void launch_typed(const GemmParams& params, cudaStream_t stream) {
  constexpr auto kBf16 = HalfType::kBf16, kFp16 = HalfType::kFp16;
  constexpr auto kForward = Direction::kForward, kBackward = Direction::kBackward;
  if (params.dtype == Dtype::kBfloat16) {
    params.backward ? launch_gemm_sm90<kBf16, kBackward, kDropout>(params, stream)
                    : launch_gemm_sm90<kBf16, kForward, kDropout>(params, stream);
  } else {
    params.backward ? launch_gemm_sm90<kFp16, kBackward, kDropout>(params, stream)
                    : launch_gemm_sm90<kFp16, kForward, kDropout>(params, stream);
  }
}

}  // namespace

void gemm_sm90(const GemmParams& given, cudaStream_t stream) {
  GemmParams params = given;
  params.s_half = params.flags + gemm_flags(params.m);
  check_gemm_params(params);
  if (params.multiprocessors < 1) {
    throw std::invalid_argument("lora_linear: multiprocessors must be positive, got " +
                                std::to_string(params.multiprocessors));
  }
  require_hopper(kGemmName);
  params.threshold > 0 ? launch_typed<true>(params, stream) : launch_typed<false>(params, stream);
}

}  // namespace peft_kernels::lora
