// What gemm_sm90.cu asks of the sources that instantiate the kernel.
#pragma once

#include <cuda_runtime.h>

#include "lora/gemm_sm90_config.h"
#include "lora/params.h"

namespace peft_kernels::lora {

constexpr const char* kGemmName = "launch of lora_linear's gemm_sm90";

// Launch on the current device, an sm_90. The parameters are checked.
template <HalfType kType, Direction kDirection, bool kDropout>
void launch_gemm_sm90(const GemmParams& params, cudaStream_t stream);

}  // namespace peft_kernels::lora
