#include "lora/gemm_sm90_kernel.cuh"

namespace peft_kernels::lora {

template void launch_gemm_sm90<HalfType::kFp16, Direction::kForward, false>(const GemmParams&, cudaStream_t);

}  // namespace peft_kernels::lora
