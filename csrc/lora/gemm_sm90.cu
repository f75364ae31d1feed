// Launcher of gemm_sm90; header and body: gemm_sm90.cuh.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "core/launch.h"
#include "core/shared.cuh"
#include "lora/gemm_sm90_arguments.h"

namespace peft_kernels::lora {
namespace {

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
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, gemm_shared_bytes<Config>()),
        "cudaFuncSetAttribute of lora_linear's gemm_sm90");

  const int64_t blocks = std::min<int64_t>(params.multiprocessors, arguments.order.count());
  LaunchShape shape{dim3(static_cast<unsigned>(blocks)), dim3(Config::kThreads), gemm_shared_bytes<Config>()};
  shape.cooperative = true;
  launch("launch of lora_linear's gemm_sm90", kernel, shape, stream, arguments);
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

// Elsewhere the kernel is a trap.
void check_device() {
  int device = 0, major = 0, minor = 0;
  check(cudaGetDevice(&device), "cudaGetDevice for lora_linear's gemm_sm90");
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "cudaDeviceGetAttribute");
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "cudaDeviceGetAttribute");
  if (major != 9 || minor != 0) {
    throw std::invalid_argument("lora_linear: gemm_sm90 runs on compute capability 9.0 alone, this device has " +
                                std::to_string(major) + "." + std::to_string(minor));
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
  check_device();
  const bool bf16 = params.dtype == Dtype::kBfloat16;
  const auto launch_typed = bf16 ? (params.backward ? launch_rank<HalfType::kBf16, Direction::kBackward>
                                                    : launch_rank<HalfType::kBf16, Direction::kForward>)
                                 : (params.backward ? launch_rank<HalfType::kFp16, Direction::kBackward>
                                                    : launch_rank<HalfType::kFp16, Direction::kForward>);
  launch_typed(params, stream);
}

}  // namespace peft_kernels::lora
