// Launcher of gemm_sm90; header and body: gemm_sm90.cuh.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "core/launch.h"
#include "core/shared.cuh"
#include "lora/gemm_sm90_arguments.h"

namespace peft_kernels::lora {
namespace {

constexpr const char* kName = "launch of lora_linear's gemm_sm90";

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    gemm_sm90_kernel(const __grid_constant__ GemmArguments arguments) {
#ifdef PEFT_KERNELS_SM90A
  constexpr uintptr_t kAlignment = Config::kAlignment;
  const uintptr_t start = (reinterpret_cast<uintptr_t>(shared_memory()) + kAlignment - 1) / kAlignment * kAlignment;
  gemm<Config>(arguments, *reinterpret_cast<GemmShared<Config>*>(start));
#else
  __trap();
#endif
}

template <typename Config>
void launch_gemm(const GemmParams& params, cudaStream_t stream) {
  const auto kernel = gemm_sm90_kernel<Config>;
  const GemmArguments arguments = gemm_arguments<Config>(params);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, gemm_shared_bytes<Config>()), kName);

  const int64_t blocks = std::min<int64_t>(params.multiprocessors, arguments.order.count());
  LaunchShape shape{dim3(static_cast<unsigned>(blocks)), dim3(Config::kThreads), gemm_shared_bytes<Config>()};
  shape.cooperative = true;
  launch(kName, kernel, shape, stream, arguments);
}

template <HalfType kType, Direction kDirection>
void launch_rank(const GemmParams& params, cudaStream_t stream) {
  switch (gemm_padded_rank(params.r)) {
    case 16:
      return launch_gemm<GemmConfig<kType, 16, kDirection>>(params, stream);
    case 32:
      return launch_gemm<GemmConfig<kType, 32, kDirection>>(params, stream);
    case 64:
      return launch_gemm<GemmConfig<kType, 64, kDirection>>(params, stream);
    default:
      return launch_gemm<GemmConfig<kType, 128, kDirection>>(params, stream);
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
  require_hopper(kName);
  const bool bf16 = params.dtype == Dtype::kBfloat16;
  const auto launch_typed = bf16 ? (params.backward ? launch_rank<HalfType::kBf16, Direction::kBackward>
                                                    : launch_rank<HalfType::kBf16, Direction::kForward>)
                                 : (params.backward ? launch_rank<HalfType::kFp16, Direction::kBackward>
                                                    : launch_rank<HalfType::kFp16, Direction::kForward>);
  launch_typed(params, stream);
}

}  // namespace peft_kernels::lora
