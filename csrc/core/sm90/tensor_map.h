// Host side of TMA: tensor maps, encoded by the driver, which is looked up at run time so that the
// extension links and imports without one.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "core/error.h"
#include "core/sm90/dtype.h"

namespace peft_kernels::sm90 {

// A matrix of half-precision values, `stride` elements from row to row, and the box that a copy moves. A row of the box
// is as long as the swizzle: 32, 64 or 128 bytes.
struct MatrixBox {
  const void* data;
  int64_t rows;
  int64_t cols;
  int64_t stride;
  uint32_t box_rows;
  uint32_t box_cols;
};

using EncodeTiled = CUresult (*)(CUtensorMap*,
                                 CUtensorMapDataType,
                                 cuuint32_t,
                                 void*,
                                 const cuuint64_t*,
                                 const cuuint64_t*,
                                 const cuuint32_t*,
                                 const cuuint32_t*,
                                 CUtensorMapInterleave,
                                 CUtensorMapSwizzle,
                                 CUtensorMapL2promotion,
                                 CUtensorMapFloatOOBfill);

inline EncodeTiled encode_tiled() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
  check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found),
        "lookup of cuTensorMapEncodeTiled");
#else
  check(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found),
        "lookup of cuTensorMapEncodeTiled");
#endif
  if (found != cudaDriverEntryPointSuccess || function == nullptr) {
    throw std::runtime_error("the driver has no cuTensorMapEncodeTiled; CUDA 12.0 and newer have it");
  }
  return reinterpret_cast<EncodeTiled>(function);
}

// Bind the current device's context to the calling thread, which the driver asks of whoever encodes. A thread whose
// first CUDA call this is has none: choosing a device binds one (since CUDA 12), and torch leaves that out for device
// 0.
inline void bind_context() {
  thread_local int bound = -1;
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  if (device != bound) {
    check(cudaSetDevice(device), "cudaSetDevice");
    bound = device;
  }
}

inline CUtensorMap encode(HalfType type, const MatrixBox& box) {
  static const EncodeTiled function = encode_tiled();
  bind_context();
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(box.cols), static_cast<cuuint64_t>(box.rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(box.stride) * 2};
  const cuuint32_t box_sizes[2] = {box.box_cols, box.box_rows};
  const cuuint32_t steps[2] = {1, 1};
  const CUtensorMapSwizzle swizzle = box.box_cols == 64   ? CU_TENSOR_MAP_SWIZZLE_128B
                                     : box.box_cols == 32 ? CU_TENSOR_MAP_SWIZZLE_64B
                                                          : CU_TENSOR_MAP_SWIZZLE_32B;
  CUtensorMap map;
  const CUresult result =
      function(&map, type == HalfType::kBf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2,
               const_cast<void*>(box.data), sizes, strides, box_sizes, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
               CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error("cuTensorMapEncodeTiled failed with CUresult " + std::to_string(result) +
                             " for a matrix of (" + std::to_string(box.rows) + ", " + std::to_string(box.cols) +
                             ") elements with rows " + std::to_string(box.stride) + " elements apart");
  }
  return map;
}

}  // namespace peft_kernels::sm90
