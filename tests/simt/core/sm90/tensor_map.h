// Twin of csrc/core/sm90/tensor_map.h: the driver's rules for a tensor map, and the map.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "core/sm90/dtype.h"
#include "core/sm90/tma.cuh"

namespace peft_kernels::sm90 {

struct MatrixBox {
  const void* data;
  int64_t rows;
  int64_t cols;
  int64_t stride;
  uint32_t box_rows;
  uint32_t box_cols;
};

inline TensorMap encode(HalfType, const MatrixBox& box) {
  const bool sizes = box.rows > 0 && box.cols > 0 && box.rows <= int64_t{1} << 32 && box.cols <= int64_t{1} << 32;
  const bool aligned = reinterpret_cast<uintptr_t>(box.data) % 16 == 0 && box.stride * 2 % 16 == 0;
  const bool fits = box.box_rows >= 1 && box.box_rows <= 256 &&
                    (box.box_cols == 16 || box.box_cols == 32 || box.box_cols == 64) && box.stride >= box.cols;
  if (!sizes || !aligned || !fits) {
    throw std::runtime_error("no tensor map for (" + std::to_string(box.rows) + ", " + std::to_string(box.cols) +
                             "), rows " + std::to_string(box.stride) + " apart");
  }
  return {static_cast<char*>(const_cast<void*>(box.data)),
          box.rows,
          box.cols,
          box.stride,
          static_cast<int>(box.box_rows),
          static_cast<int>(box.box_cols)};
}

}  // namespace peft_kernels::sm90
