// Launcher of gemm_sm90; header and body: gemm_sm90.cuh.
#include <stdexcept>
#include <string>

#include "core/launch.h"
#include "lora/gemm_sm90_arguments.h"
#include "lora/gemm_sm90_launch.h"

namespace peft_kernels::lora {

void gemm_sm90(const GemmParams& given, cudaStream_t stream) {
  GemmParams params = given;
  params.s_half = params.flags + gemm_flags(params.m);
  check_gemm_params(params);
  if (params.multiprocessors < 1) {
    throw std::invalid_argument("lora_linear: multiprocessors must be positive, got " +
                                std::to_string(params.multiprocessors));
  }
  require_hopper(kGemmName);
  const bool bf16 = params.dtype == Dtype::kBfloat16;
  const auto launch_typed = bf16 ? (params.backward ? launch_gemm_sm90<HalfType::kBf16, Direction::kBackward>
                                                    : launch_gemm_sm90<HalfType::kBf16, Direction::kForward>)
                                 : (params.backward ? launch_gemm_sm90<HalfType::kFp16, Direction::kBackward>
                                                    : launch_gemm_sm90<HalfType::kFp16, Direction::kForward>);
  launch_typed(params, stream);
}

}  // namespace peft_kernels::lora
