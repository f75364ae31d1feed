// What the launchers of this family take. Pointers are device pointers; sizes count elements.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "core/dtype.h"
#include "core/fields.h"
#include "lora/decode_config.h"

namespace peft_kernels::lora {

struct DropoutMaskParams {
  uint8_t* mask;        // (rows, cols), contiguous: 1 keeps, 0 drops
  const int64_t* seed;  // 0-d
  int64_t rows;
  int64_t cols;
  uint32_t threshold;  // a 16-bit draw below it drops its element
};

inline constexpr auto kDropoutMaskFields = std::make_tuple(field("mask", &DropoutMaskParams::mask),
                                                           field("seed", &DropoutMaskParams::seed),
                                                           field("rows", &DropoutMaskParams::rows),
                                                           field("cols", &DropoutMaskParams::cols),
                                                           field("threshold", &DropoutMaskParams::threshold));

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
  Dtype dtype;          // of x, weight, bias and y
  Dtype adapter_dtype;  // of lora_a and lora_b: the same, or float32
  int grid;
};

inline constexpr auto kDecodeShapeFields = std::make_tuple(field("m", &decode::Shape::m),
                                                           field("n", &decode::Shape::n),
                                                           field("k", &decode::Shape::k),
                                                           field("r", &decode::Shape::r),
                                                           field("splits", &decode::Shape::splits),
                                                           field("down_splits", &decode::Shape::down_splits));

inline constexpr auto kDecodeFields =
    std::make_tuple(field("x", &DecodeParams::x, &DecodeParams::x_stride),
                    field("weight", &DecodeParams::weight, &DecodeParams::weight_stride),
                    field("lora_a", &DecodeParams::lora_a, &DecodeParams::a_stride),
                    field("lora_b", &DecodeParams::lora_b, &DecodeParams::b_stride_n, &DecodeParams::b_stride_r),
                    field("bias", &DecodeParams::bias, &DecodeParams::bias_stride),
                    field("scale", &DecodeParams::scale, &DecodeParams::scale_value),
                    field("y", &DecodeParams::y),
                    field("s", &DecodeParams::s),
                    field("workspace", &DecodeParams::flags),
                    field("nonce", &DecodeParams::nonce),
                    part(&DecodeParams::shape, kDecodeShapeFields),
                    field("dtype", &DecodeParams::dtype),
                    field("adapter_dtype", &DecodeParams::adapter_dtype),
                    field("grid", &DecodeParams::grid));

// `flags` is the beginning of a workspace of decode::workspace_bytes, in which partials finds its place. All CTAs must
// be resident together: the launch is cooperative, and fails where `grid` is too large for that.
void decode_forward(const DecodeParams& given, cudaStream_t stream);

// Forward: y (m, n) = x w^T + bias + f S up^T and S = x down^T, with w (n, k), down = A (r, k), up = B (n, r).
// Backward: the gradients dX = dY W + dS A and dS = f dY B under the names y, S and x = dY, with w = W (k, n), down = B
// (k, r), up = A (r, n); m, n, k are the sizes of this product, not of the layer.
// Every matrix but S has rows of 16-byte multiples, contiguous, on 16-byte boundaries, in `dtype`.
struct GemmParams {
  const void* x;       // (m, k)
  const void* w;       // (n, k) | (k, n)
  const void* down;    // (r, k) | (k, r)
  const void* up;      // (n, r) | (r, n)
  const void* bias;    // (n,) or null, on a 4-byte boundary
  const float* scale;  // f: 0-d, or null: scale_value
  void* y;             // (m, n), contiguous
  float* s;            // (m, r), contiguous
  uint64_t* flags;     // gemm_flags(m) of them
  void* s_half;        // (m, gemm_padded_rank(r)) in `dtype`, contiguous, on a 16-byte boundary
  int64_t x_stride;    // between rows, in elements
  int64_t w_stride;
  int64_t down_stride;
  int64_t up_stride;
  uint64_t nonce;  // that no flag holds before the launch
  float scale_value;
  int64_t m;
  int64_t n;
  int64_t k;
  int64_t r;
  Dtype dtype;  // bfloat16 or float16
  bool backward;
  int multiprocessors;  // of the device
};

inline constexpr auto kGemmFields = std::make_tuple(field("x", &GemmParams::x, &GemmParams::x_stride),
                                                    field("w", &GemmParams::w, &GemmParams::w_stride),
                                                    field("down", &GemmParams::down, &GemmParams::down_stride),
                                                    field("up", &GemmParams::up, &GemmParams::up_stride),
                                                    field("bias", &GemmParams::bias),
                                                    field("scale", &GemmParams::scale, &GemmParams::scale_value),
                                                    field("y", &GemmParams::y),
                                                    field("s", &GemmParams::s),
                                                    field("workspace", &GemmParams::flags),
                                                    field("nonce", &GemmParams::nonce),
                                                    field("m", &GemmParams::m),
                                                    field("n", &GemmParams::n),
                                                    field("k", &GemmParams::k),
                                                    field("r", &GemmParams::r),
                                                    field("dtype", &GemmParams::dtype),
                                                    field("backward", &GemmParams::backward),
                                                    field("multiprocessors", &GemmParams::multiprocessors));

// `flags` is the beginning of a workspace of gemm_workspace_bytes, in which s_half finds its place. The device must be
// of compute capability 9.0. Its multiprocessors bound the grid, whose blocks are all resident together: the launch is
// cooperative.
void gemm_sm90(const GemmParams& given, cudaStream_t stream);

}  // namespace peft_kernels::lora
