// What the launchers of this family take. Pointers are device pointers; sizes count elements.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "core/dtype.h"
#include "lora_linear/decode_config.h"

namespace peft_kernels::lora_linear {

struct DropoutMaskParams {
  uint8_t* mask;        // (rows, cols), contiguous: 1 keeps, 0 drops
  const int64_t* seed;  // 0-d
  int64_t rows;
  int64_t cols;
  uint32_t threshold;  // a 16-bit draw below it drops its element
};

void dropout_mask(const DropoutMaskParams& params, cudaStream_t stream);

struct DecodeParams {
  const void* x;       // (m, k), rows contiguous and on 16-byte boundaries
  const void* weight;  // (n, k), likewise
  const void* lora_a;  // (r, k), likewise
  const void* lora_b;  // (n, r)
  const void* bias;    // (n,), or null
  const float* scale;  // 0-d, or null: scale_value
  void* y;             // (m, n), contiguous
  float* s;            // (m, r), contiguous
  uint64_t* flags;     // decode::flag_count(shape) of them
  float* partials;     // decode::partials(shape) times (m, kTileRows)
  int64_t x_stride;    // between rows, in elements
  int64_t weight_stride;
  int64_t a_stride;
  int64_t b_stride_n;
  int64_t b_stride_r;
  int64_t bias_stride;
  uint64_t nonce;  // that no other launch on these flags has
  float scale_value;
  decode::Shape shape;
};

// `dtype` of x, weight, bias and y; `adapter_dtype` of lora_a and lora_b: the same, or float32. `flags` is the
// beginning of a workspace of decode::workspace_bytes, in which partials finds its place. All CTAs must be resident
// together: the launch is cooperative, and fails where `grid` is too large for that.
void decode_forward(DecodeParams params, Dtype dtype, Dtype adapter_dtype, int grid, cudaStream_t stream);

}  // namespace peft_kernels::lora_linear
