// What the launchers of this family take. Pointers are device pointers; sizes count elements.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace peft_kernels::lora_linear {

struct DropoutMaskParams {
  uint8_t* mask;        // (rows, cols), contiguous: 1 keeps, 0 drops
  const int64_t* seed;  // 0-d
  int64_t rows;
  int64_t cols;
  uint32_t threshold;  // a 16-bit draw below it drops its element
};

void dropout_mask(const DropoutMaskParams& params, cudaStream_t stream);

}  // namespace peft_kernels::lora_linear
