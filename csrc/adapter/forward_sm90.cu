// The launcher of forward_sm90.cuh, where what it computes is described.
#include "adapter/forward_sm90.cuh"

#include <stdexcept>
#include <string>

#include "adapter/params.h"
#include "core/cluster_launch.h"
#include "core/sm90/tensor_map.h"

namespace peft_kernels::adapter {
namespace {

using sm90::HalfType;

constexpr const char* kName = "launch of bottleneck_adapter's forward_sm90";
static_assert(kSharedLimit == kHopperSharedLimit, "the plan and the launch allow a block the same");
constexpr int64_t kIndexLimit = int64_t{1} << 31;  // TMA's coordinates are 32-bit

// Two CTAs a multiprocessor where their shared memory leaves room for them, which it does at the narrower width.
template <HalfType kType, int kRank>
__global__ void __launch_bounds__(kThreads, kRank == 64 ? 2 : 1)
    forward_sm90_kernel(const __grid_constant__ ForwardMaps maps, const __grid_constant__ ForwardArguments args) {
  extern __shared__ __align__(kTileAlign) uint8_t shared[];
#ifdef PEFT_KERNELS_SM90A
  forward_cta<kType, kRank>(shared, maps, args);
#else
  __trap();
#endif
}

using Kernel = void (*)(ForwardMaps, ForwardArguments);

struct Variant {
  Kernel kernel;
  int rank;
  int shared_bytes;
  int max_slots;
};

template <HalfType kType, int kRank>
Variant variant_of(int slots) {
  using Plan = ForwardPlan<kRank>;
  return {forward_sm90_kernel<kType, kRank>, kRank, Plan::bytes(slots), Plan::kMaxSlots};
}

Variant choose_variant(const ForwardParams& params) {
  const int slots = slots_of(params.k, params.n, params.cluster);
  const bool bf16 = params.dtype == Dtype::kBfloat16;
  if (params.r <= 64) {
    return bf16 ? variant_of<HalfType::kBf16, 64>(slots) : variant_of<HalfType::kFp16, 64>(slots);
  }
  return bf16 ? variant_of<HalfType::kBf16, 128>(slots) : variant_of<HalfType::kFp16, 128>(slots);
}

[[noreturn]] void refuse(const std::string& what) {
  throw std::invalid_argument("bottleneck_adapter: " + what);
}

void check_matrix(const char* name, const void* data, int64_t row_stride, int64_t cols) {
  if (data == nullptr || reinterpret_cast<uintptr_t>(data) % 16 != 0) {
    refuse(std::string(name) + " must start at a multiple of 16 bytes");
  }
  if (row_stride < cols || row_stride % kAlignElements != 0) {
    refuse(std::string(name) + "'s row stride must be a multiple of 8 and at least " + std::to_string(cols) + ", got " +
           std::to_string(row_stride));
  }
}

void check_params(const ForwardParams& params) {
  if (params.dtype == Dtype::kFloat32) {
    refuse("dtype must be bfloat16 or float16, got float32");
  }
  if (params.m < 0 || params.n < 1 || params.k < 1 || params.m >= kIndexLimit) {
    refuse("M must be in [0, 2^31), N and K positive, got " + std::to_string(params.m) + ", " +
           std::to_string(params.n) + ", " + std::to_string(params.k));
  }
  if (params.n % kAlignElements != 0 || params.k % kAlignElements != 0) {
    refuse("N and K must be multiples of 8, got " + std::to_string(params.n) + ", " + std::to_string(params.k));
  }
  if (params.r < 1 || params.r > kMaxRank) {
    refuse("r must be in [1, 128], got " + std::to_string(params.r));
  }
  if (params.cluster != 1 && params.cluster != 2 && params.cluster != 4 && params.cluster != 8) {
    refuse("cluster must be 1, 2, 4 or 8, got " + std::to_string(params.cluster));
  }
  if (params.k > max_columns(params.r) || params.n > max_columns(params.r)) {
    refuse("N and K must be at most " + std::to_string(max_columns(params.r)) + " at r = " + std::to_string(params.r) +
           ", got " + std::to_string(params.n) + ", " + std::to_string(params.k));
  }
  if (params.serial && (params.n != params.k || params.residual != nullptr)) {
    refuse("the serial form has N = K and no other residual than x");
  }
  check_matrix("x", params.x, params.x_stride, params.k);
  check_matrix("down_weight", params.down_weight, params.down_weight_stride, params.k);
  check_matrix("up_weight", params.up_weight, params.up_weight_stride, params.r);
  check_matrix("y", params.y, params.n, params.n);
  if (params.residual != nullptr) {
    check_matrix("residual", params.residual, params.residual_stride, params.n);
  }
}

ForwardMaps make_maps(const ForwardParams& params, int rank) {
  const HalfType type = params.dtype == Dtype::kBfloat16 ? HalfType::kBf16 : HalfType::kFp16;
  const auto box = [type](const void* data, int64_t stride, int64_t rows, int64_t cols, int box_rows) {
    return sm90::encode(type, {data, rows, cols, stride, static_cast<uint32_t>(box_rows), kBlockC});
  };
  ForwardMaps maps = {};
  maps.x = box(params.x, params.x_stride, params.m, params.k, kBlockM);
  maps.down_weight = box(params.down_weight, params.down_weight_stride, params.r, params.k, rank);
  maps.up_weight = box(params.up_weight, params.up_weight_stride, params.n, params.r, kBlockC);
  maps.y = box(params.y, params.n, params.m, params.n, kBlockM);
  if (params.residual != nullptr) {
    maps.residual = box(params.residual, params.residual_stride, params.m, params.n, kBlockM);
  }
  return maps;
}

ForwardArguments make_arguments(const ForwardParams& params) {
  const bool loads_residual = params.residual != nullptr;
  return {static_cast<const uint16_t*>(params.down_bias),
          static_cast<const uint16_t*>(params.up_bias),
          params.scale,
          params.z,
          static_cast<int>(params.m),
          static_cast<int>(params.n),
          static_cast<int>(params.k),
          static_cast<int>(params.r),
          params.scale_value,
          params.serial || loads_residual,
          loads_residual,
          params.activation};
}

}  // namespace

int64_t max_columns(int64_t r) {
  return int64_t{kMaxCluster} * kBlockC * (r <= 64 ? ForwardPlan<64>::kMaxSlots : ForwardPlan<128>::kMaxSlots);
}

void forward_sm90(const ForwardParams& params, cudaStream_t stream) {
  check_params(params);
  if (params.m == 0) {
    return;
  }
  const Variant variant = choose_variant(params);
  if (slots_of(params.k, params.n, params.cluster) > variant.max_slots) {
    refuse("a cluster of " + std::to_string(params.cluster) + " cannot hold N and K of " + std::to_string(params.n) +
           ", " + std::to_string(params.k));
  }
  const int64_t ctas = ceil_div(params.m, kBlockM) * params.cluster;
  LaunchShape shape{dim3(static_cast<unsigned>(ctas)), dim3(kThreads), static_cast<size_t>(variant.shared_bytes)};
  shape.cluster = static_cast<unsigned>(params.cluster);
  prepare_clusters(kName, variant.kernel, shape);
  const ForwardMaps maps = make_maps(params, variant.rank);

  launch(kName, variant.kernel, shape, stream, maps, make_arguments(params));
}

}  // namespace peft_kernels::adapter
