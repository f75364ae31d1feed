// Launcher of the reduce kernel; header and body: reduce.cuh.
#include <stdexcept>
#include <string>

#include "core/launch.h"
#include "lora/reduce.cuh"

namespace peft_kernels::lora {
namespace {

constexpr const char* kName = "launch of lora_linear's reduce_rows";

template <typename C>
__global__ void __launch_bounds__(reduce::kThreads, C::kVariant.ctas_per_sm())
    reduce_rows_kernel(const __grid_constant__ ReduceParams params) {
  reduce::reduce_body<C>(params);
}

template <typename C>
void launch_as(const ReduceParams& params, cudaStream_t stream) {
  constexpr int kBytes = C::kVariant.shared_bytes();
  check(cudaFuncSetAttribute(reduce_rows_kernel<C>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes), kName);
  const LaunchShape shape{dim3(static_cast<unsigned>(params.plan.ctas)), dim3(reduce::kThreads), kBytes};
  launch(kName, reduce_rows_kernel<C>, shape, stream, params);
}

template <typename T>
void launch_typed(const ReduceParams& params, cudaStream_t stream) {
  const reduce::Variant variant = variant_of(params);
  if (variant.exact) {
    launch_as<reduce::Config<T, 32, true, true>>(params, stream);
  } else if (variant.narrow) {
    launch_as<reduce::Config<T, 32, false, true>>(params, stream);
  } else if (variant.ranks == 32) {
    launch_as<reduce::Config<T, 32, false, false>>(params, stream);
  } else {
    launch_as<reduce::Config<T, 128, false, false>>(params, stream);
  }
}

void refuse(const std::string& why) {
  throw std::invalid_argument("lora_linear: reduce_rows: " + why);
}

void check_size(const char* name, int64_t size) {
  if (size < 1 || size > reduce::kMaxSize) {
    refuse(std::string(name) + " must be positive and at most 2^31 - 1024, got " + std::to_string(size));
  }
}

void check_job(const char* name, const ReduceJob& job) {
  if (job.x == nullptr) {
    return;
  }
  check_size(name, job.columns);
  if (reinterpret_cast<uintptr_t>(job.x) % 16 != 0 || job.x_stride % reduce::kVector != 0) {
    refuse("rows whose number of columns is " + std::string(name) + " do not start at multiples of 16 bytes");
  }
  if (job.out != nullptr && job.s == nullptr) {
    refuse("the other factor of a gradient over " + std::string(name) + " is missing");
  }
  if (job.threshold >= kDropoutLevels) {
    refuse("threshold must be below 65536, got " + std::to_string(job.threshold));
  }
  if (job.threshold > 0 && job.seed == nullptr) {
    refuse("dropout needs a seed");
  }
}

void check_params(const ReduceParams& params) {
  if (params.dtype == Dtype::kFloat32 ||
      (params.adapter_dtype != params.dtype && params.adapter_dtype != Dtype::kFloat32)) {
    refuse("it takes bfloat16 or float16 with adapters of that dtype or float32");
  }
  if (params.jobs[reduce::kUp].x == nullptr && params.jobs[reduce::kDown].x == nullptr) {
    refuse("there is nothing to do");
  }
  check_size("m", params.m);
  check_size("r", params.r);
  check_job("n", params.jobs[reduce::kUp]);
  check_job("k", params.jobs[reduce::kDown]);
  if (params.ds != nullptr && (params.jobs[reduce::kUp].x == nullptr || params.lora_b == nullptr)) {
    refuse("dS needs dY and lora_b");
  }
  if (params.multiprocessors < 1) {
    refuse("multiprocessors must be positive, got " + std::to_string(params.multiprocessors));
  }
}

}  // namespace

void reduce_rows(const ReduceParams& given, cudaStream_t stream) {
  check_params(given);
  const ReduceParams params = planned(given);
  if (params.dtype == Dtype::kBfloat16) {
    launch_typed<__nv_bfloat16>(params, stream);
  } else {
    launch_typed<__half>(params, stream);
  }
}

}  // namespace peft_kernels::lora
