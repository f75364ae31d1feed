// The arguments that the launchers hand to cuTensorMapEncodeTiled, held against those of CuTe's make_tma_copy for the
// same matrix, tile of shared memory and cluster. Both ask a driver that records. Prints a line for each map, "same" or
// "differs" and what it was.
#include <cuda.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

// What was asked for; equal requests have equal maps, which hold them.
struct Request {
  int type, rank;
  uint64_t address, sizes[3], strides[2];
  uint32_t box[3], steps[3];
  int interleave, swizzle, fill;
};
static_assert(sizeof(Request) <= sizeof(CUtensorMap));

// Not recorded: the promotion to L2's sectors, which is a hint; CuTe asks for 128 bytes and this project for 256.
extern "C" CUresult CUDAAPI cuTensorMapEncodeTiled(CUtensorMap* map,
                                                   CUtensorMapDataType type,
                                                   cuuint32_t rank,
                                                   void* address,
                                                   const cuuint64_t* sizes,
                                                   const cuuint64_t* strides,
                                                   const cuuint32_t* box,
                                                   const cuuint32_t* steps,
                                                   CUtensorMapInterleave interleave,
                                                   CUtensorMapSwizzle swizzle,
                                                   CUtensorMapL2promotion,
                                                   CUtensorMapFloatOOBfill fill) {
  Request request = {};
  if (rank > 3) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  request.type = type;
  request.rank = static_cast<int>(rank);
  request.address = reinterpret_cast<uint64_t>(address);
  std::copy(sizes, sizes + rank, request.sizes);
  std::copy(strides, strides + rank - 1, request.strides);
  std::copy(box, box + rank, request.box);
  std::copy(steps, steps + rank, request.steps);
  request.interleave = interleave;
  request.swizzle = swizzle;
  request.fill = fill;
  std::memset(map, 0, sizeof(*map));
  std::memcpy(map, &request, sizeof(request));
  return CUDA_SUCCESS;
}

// Of CUDA's runtime, what making a map calls.
extern "C" {
#if CUDART_VERSION >= 12050
cudaError_t CUDARTAPI cudaGetDriverEntryPointByVersion(
    const char*, void** function, unsigned, unsigned long long, cudaDriverEntryPointQueryResult* found) {
#else
cudaError_t CUDARTAPI cudaGetDriverEntryPoint(const char*,
                                              void** function,
                                              unsigned long long,
                                              cudaDriverEntryPointQueryResult* found) {
#endif
  *function = reinterpret_cast<void*>(&cuTensorMapEncodeTiled);
  *found = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
cudaError_t CUDARTAPI cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t CUDARTAPI cudaSetDevice(int) {
  return cudaSuccess;
}
cudaError_t CUDARTAPI cudaDriverGetVersion(int*) {
  return cudaErrorUnknown;
}
const char* CUDARTAPI cudaGetErrorName(cudaError_t) {
  return "";
}
const char* CUDARTAPI cudaGetErrorString(cudaError_t) {
  return "";
}
}

// Device code and launches are read, and none of them is used: their names need a meaning, but no body.
#define __launch_bounds__(...)
extern dim3 threadIdx, blockIdx, blockDim, gridDim;
void __nanosleep(unsigned);
void __syncthreads();
void __syncwarp();
unsigned __shfl_sync(unsigned, unsigned, int, int);
[[noreturn]] void __trap();
size_t __cvta_generic_to_shared(const void*);
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int);
template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveClusters(int*, Kernel*, const cudaLaunchConfig_t*);

#include "adapter/forward_sm90.cu"
#include "cute_tile.h"
#include "lora/gemm_sm90_arguments.h"

using namespace peft_kernels;
using lora::Direction;
using lora::GemmConfig;
using sm90::HalfType;
using witness::Tile;

template <HalfType kType>
using Element = std::conditional_t<kType == HalfType::kBf16, cute::bfloat16_t, cute::half_t>;

// Sizes and strides that differ from each other, all multiples of 8.
constexpr int kM = 8200, kN = 4096, kK = 1032, kPadding = 24;

struct Matrix {
  void* data;
  int rows, cols, stride;
};

std::string text(const CUtensorMap& map) {
  Request request;
  std::memcpy(&request, &map, sizeof(request));
  std::string all;
  const auto add = [&](const char* name, auto value) { all += std::string(" ") + name + std::to_string(value); };
  add("type ", request.type);
  add("rank ", request.rank);
  for (int i = 0; i < request.rank; ++i) {
    add("size ", request.sizes[i]);
    add("box ", request.box[i]);
  }
  add("stride ", request.strides[0]);
  add("swizzle ", request.swizzle);
  add("fill ", request.fill);
  return all;
}

// The map for a tile of a row-major matrix: of its rows, or transposed of its columns, shared by `kCluster` blocks.
template <typename Tile, HalfType kType, int kCluster = 1>
CUtensorMap made_by_cute(const Matrix& matrix) {
  using Type = Element<kType>;
  const auto pointer = cute::make_gmem_ptr(static_cast<Type*>(matrix.data));
  const auto copy = [&](const auto& tensor) {
    using Operation = std::conditional_t<kCluster == 1, cute::SM90_TMA_LOAD, cute::SM90_TMA_LOAD_MULTICAST>;
    const auto tma = cute::make_tma_copy(Operation{}, tensor, Tile::template layout<Type>(), typename Tile::Shape{},
                                         cute::Int<kCluster>{});
    return *tma.get_tma_descriptor();
  };
  if constexpr (Tile::kTransposed) {
    return copy(cute::make_tensor(pointer, cute::make_shape(matrix.cols, matrix.rows),
                                  cute::make_stride(cute::Int<1>{}, matrix.stride)));
  } else {
    return copy(cute::make_tensor(pointer, cute::make_shape(matrix.rows, matrix.cols),
                                  cute::make_stride(matrix.stride, cute::Int<1>{})));
  }
}

template <typename Tile, HalfType kType, int kCluster = 1>
void compare(const std::string& what, const CUtensorMap& ours, const Matrix& matrix) {
  const CUtensorMap theirs = made_by_cute<Tile, kType, kCluster>(matrix);
  const bool same = std::memcmp(&ours, &theirs, sizeof(Request)) == 0;
  std::printf("%s %s: %s", same ? "same" : "differs", what.c_str(), Tile::name().c_str());
  std::printf(same ? "\n" : ",%s; CuTe's%s\n", text(ours).c_str(), text(theirs).c_str());
}

void* address(int index) {
  return reinterpret_cast<void*>(0x7f0000000000 + 0x1000000 * static_cast<int64_t>(index));
}

template <typename Config>
void check_gemm() {
  constexpr bool kTransposed = Config::kTransposed;
  constexpr HalfType kType = Config::kType;
  constexpr int kRows = Config::kBlockM, kLine = Config::kLineBytes, kRankLine = Config::kRankLineBytes;
  const int rank = Config::kRank - 8;
  const Matrix x = {address(0), kM, kK, kK + kPadding};
  const Matrix w = {address(1), kTransposed ? kK : kN, kTransposed ? kN : kK, kN + kPadding};
  const Matrix down = {address(2), kTransposed ? kK : rank, kTransposed ? rank : kK, kK + 2 * kPadding};
  const Matrix up = {address(3), kTransposed ? rank : kN, kTransposed ? kN : rank, kN + 2 * kPadding};
  const Matrix s = {address(4), kM, Config::kRank, Config::kRank}, y = {address(5), kM, kN, kN};
  lora::GemmParams params = {};
  params.x = x.data;
  params.w = w.data;
  params.down = down.data;
  params.up = up.data;
  params.s_half = s.data;
  params.y = y.data;
  params.x_stride = x.stride;
  params.w_stride = w.stride;
  params.down_stride = down.stride;
  params.up_stride = up.stride;
  params.m = kM;
  params.n = kN;
  params.k = kK;
  params.r = rank;
  const lora::GemmArguments ours = lora::gemm_arguments<Config>(params, 2, 1, 1);

  const std::string prefix = std::string("gemm ") + (kTransposed ? "backward " : "forward ");
  compare<Tile<kRows, Config::kBlockK, kLine, false>, kType>(prefix + "x", ours.x, x);
  compare<Tile<Config::kBlockN, Config::kBlockK, kLine, kTransposed>, kType, Config::kHalves>(prefix + "w", ours.w, w);
  compare<Tile<Config::kRank, Config::kBlockK, kTransposed ? kRankLine : kLine, kTransposed>, kType>(prefix + "down",
                                                                                                     ours.down, down);
  compare<Tile<Config::kBlockN, Config::kRankChunk, kTransposed ? kLine : kRankLine, kTransposed>, kType,
          Config::kHalves>(prefix + "up", ours.up, up);
  compare<Tile<kRows, Config::kRankChunk, kRankLine, false>, kType>(prefix + "s_half", ours.s_half, s);
  compare<Tile<Config::kWarpRows, Config::kChunkN, kLine, false>, kType>(prefix + "y", ours.y, y);
}

template <int kRank>
void check_gemm_rank() {
  constexpr int kWide = lora::gemm_wide(kRank, true, false);
  check_gemm<GemmConfig<HalfType::kBf16, kRank, Direction::kForward, kWide, false>>();
  check_gemm<GemmConfig<HalfType::kBf16, kRank, Direction::kBackward, kWide, false>>();
}

template <int kRank>
void check_adapter() {
  using namespace adapter;
  constexpr HalfType kType = HalfType::kFp16;
  const int rank = kRank - 8;
  const Matrix x = {address(0), kM, kK, kK + kPadding}, down = {address(1), rank, kK, kK + 2 * kPadding};
  const Matrix up = {address(2), kN, rank, kRank}, residual = {address(3), kM, kN, kN + kPadding};
  const Matrix y = {address(4), kM, kN, kN};
  ForwardParams params = {};
  params.x = x.data;
  params.down_weight = down.data;
  params.up_weight = up.data;
  params.residual = residual.data;
  params.y = y.data;
  params.x_stride = x.stride;
  params.down_weight_stride = down.stride;
  params.up_weight_stride = up.stride;
  params.residual_stride = residual.stride;
  params.m = kM;
  params.n = kN;
  params.k = kK;
  params.r = rank;
  params.dtype = Dtype::kFloat16;
  const ForwardMaps ours = make_maps(params, kRank);
  using Rows = Tile<kBlockM, kBlockC, kRowBytes, false>;
  compare<Rows, kType>("adapter x", ours.x, x);
  compare<Tile<kRank, kBlockC, kRowBytes, false>, kType>("adapter down_weight", ours.down_weight, down);
  compare<Tile<kBlockC, kBlockC, kRowBytes, false>, kType>("adapter up_weight", ours.up_weight, up);
  compare<Rows, kType>("adapter residual", ours.residual, residual);
  compare<Rows, kType>("adapter y", ours.y, y);
}

// W's tile between two blocks of a cluster, each of which copies half of the lines to both.
template <int kBlockN, bool kTransposed>
void check_half_of_w() {
  using Whole = Tile<kBlockN, 64, 128, kTransposed>;
  constexpr HalfType kType = HalfType::kBf16;
  const Matrix w = {address(1), kTransposed ? kK : kN, kTransposed ? kN : kK, kN + kPadding};
  const sm90::MatrixBox box = {w.data, w.rows, w.cols, w.stride, kTransposed ? 32u : kBlockN / 2, 64};
  compare<Whole, kType, 2>("half of w", sm90::encode(kType, box), w);
}

int main() {
  check_gemm_rank<16>();
  check_gemm_rank<32>();
  check_gemm_rank<64>();
  check_gemm_rank<128>();
  check_adapter<64>();
  check_adapter<adapter::kMaxRank>();
  check_half_of_w<256, false>();
  check_half_of_w<192, false>();
  check_half_of_w<128, false>();
  check_half_of_w<256, true>();
  check_half_of_w<192, true>();
  check_half_of_w<128, true>();
}
