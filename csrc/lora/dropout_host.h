// Dropout of the low-rank branch in a CPU's memory, by the recipe of dropout.h. Plain C++ without CUDA.
//
// Each function walks down the rows of a mask once; the mask itself is in no memory. Elements of a row follow each
// other; strides are between rows, in elements. A dropped element counts as zero, also where it is inf or nan.
#pragma once

#include <array>
#include <cstdint>

#include "core/names.h"

namespace peft_kernels::lora::host {

enum class Element { kBfloat16, kFloat16, kFloat32, kFloat64 };

constexpr auto names_of(Element) {
  return std::array{Named{Element::kBfloat16, "bfloat16"}, Named{Element::kFloat16, "float16"},
                    Named{Element::kFloat32, "float32"}, Named{Element::kFloat64, "float64"}};
}

// Which instructions the loops are compiled for. All give the same bits.
enum class Level { kPortable, kAvx2, kAvx512 };

constexpr auto names_of(Level) {
  return std::array{Named{Level::kPortable, "portable"}, Named{Level::kAvx2, "avx2"}, Named{Level::kAvx512, "avx512"}};
}

// What this processor and this binary have of it, the best last.
bool has_level(Level level);

// Rows first_row ... first_row + rows - 1 of the mask that a seed gives a lane.
struct Mask {
  const int64_t* seed;
  int64_t first_row;
  int64_t rows;
  int64_t cols;
  uint32_t threshold;  // a 16-bit draw below it drops its element
  uint32_t lane;       // the recipe's
  int threads;         // at most so many
  Level level;
};

// out = factor drop(x), where x may be out. Rounds as torch does: x to out's type, then the product.
// Types (x, out): any with itself; bfloat16 and float16 with float32.
struct DropParams {
  Mask mask;
  const void* x;
  void* out;
  int64_t x_stride;
  int64_t out_stride;
  double factor;
  Element dtype;
  Element out_dtype;
};

// sum += factor drop(product), rounded once.
// Types (sum, product): any with itself; bfloat16 and float16 with float32.
struct AddDroppedParams {
  Mask mask;
  void* sum;
  const void* product;
  int64_t sum_stride;
  int64_t product_stride;
  double factor;
  Element dtype;
  Element product_dtype;
};

// out = 1 where the element is kept, else 0; (rows, cols) bytes, contiguous.
struct KeepParams {
  Mask mask;
  uint8_t* out;
};

template <typename Take>
void fields(Take& take, Mask& mask) {
  take("seed", mask.seed);
  take("first_row", mask.first_row);
  take("rows", mask.rows);
  take("cols", mask.cols);
  take("threshold", mask.threshold);
  take("lane", mask.lane);
  take("threads", mask.threads);
  take("level", mask.level);
}

template <typename Take>
void fields(Take& take, DropParams& params) {
  fields(take, params.mask);
  take("x", params.x, params.x_stride);
  take("out", params.out, params.out_stride);
  take("factor", params.factor);
  take("dtype", params.dtype);
  take("out_dtype", params.out_dtype);
}

template <typename Take>
void fields(Take& take, AddDroppedParams& params) {
  fields(take, params.mask);
  take("sum", params.sum, params.sum_stride);
  take("product", params.product, params.product_stride);
  take("factor", params.factor);
  take("dtype", params.dtype);
  take("product_dtype", params.product_dtype);
}

template <typename Take>
void fields(Take& take, KeepParams& params) {
  fields(take, params.mask);
  take("out", params.out);
}

void drop(const DropParams& params);
void add_dropped(const AddDroppedParams& params);
void keep(const KeepParams& params);

}  // namespace peft_kernels::lora::host
