// What the launchers of this family take. Pointers are device pointers; sizes count elements.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "core/dtype.h"
#include "lora/decode_config.h"

namespace peft_kernels::lora {

namespace decode {

template <typename Take>
void fields(Take& take, Shape& shape) {
  take("m", shape.m);
  take("n", shape.n);
  take("k", shape.k);
  take("r", shape.r);
  take("splits", shape.splits);
  take("down_splits", shape.down_splits);
}

}  // namespace decode

struct DropoutMaskParams {
  uint8_t* mask;        // (rows, cols), contiguous: 1 keeps, 0 drops
  const int64_t* seed;  // 0-d
  int64_t first_row;    // of the whole mask
  int64_t rows;
  int64_t cols;
  uint32_t threshold;  // a 16-bit draw below it drops its element
  uint32_t lane;       // the recipe's
};

template <typename Take>
void fields(Take& take, DropoutMaskParams& params) {
  take("mask", params.mask);
  take("seed", params.seed);
  take("first_row", params.first_row);
  take("rows", params.rows);
  take("cols", params.cols);
  take("threshold", params.threshold);
  take("lane", params.lane);
}

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

// All but the weight, the scale and S.
template <typename Take>
void fields_of_layer(Take& take, DecodeParams& params) {
  take("x", params.x, params.x_stride);
  take("lora_a", params.lora_a, params.a_stride);
  take("lora_b", params.lora_b, params.b_stride_n, params.b_stride_r);
  take("bias", params.bias, params.bias_stride);
  take("y", params.y);
  take("workspace", params.flags);
  take("nonce", params.nonce);
  fields(take, params.shape);
  take("dtype", params.dtype);
  take("adapter_dtype", params.adapter_dtype);
  take("grid", params.grid);
}

template <typename Take>
void fields(Take& take, DecodeParams& params) {
  fields_of_layer(take, params);
  take("weight", params.weight, params.weight_stride);
  take("scale", params.scale, params.scale_value);
  take("s", params.s);
}

// `flags` is the beginning of a workspace of decode::workspace_bytes, in which partials finds its place. All CTAs must
// be resident together: the launch is cooperative, and fails where `grid` is too large for that.
void decode_forward(const DecodeParams& given, cudaStream_t stream);

// A row of the table of slots.
enum TableRow { kFirst, kRank };

// Each token has the adapter of a slot, or none: a slot's A is rows first ... first + rank - 1 of lora_a (a_rows, k),
// its B those columns of lora_b (n, a_rows), and its scale an element of `scale`.
struct DecodeRowsParams {
  // r: no less than the ranks of all slots that tokens have, added up. scale: (slots,). s: (m, a slot's greatest rank),
  // rows contiguous; row i is token order[i]'s, of which its slot's rank are written.
  DecodeParams layer;
  const int32_t* slot;   // (m,); what is not 0 ... slots - 1 is no adapter
  const int32_t* order;  // (m,), a permutation of the tokens
  const int32_t* table;  // (rows of TableRow or more, slots), rows contiguous
  int64_t scale_stride;
  int64_t s_stride;
  int64_t slot_stride;
  int64_t order_stride;
  int64_t table_stride;
  int slots;
  int a_rows;
};

template <typename Take>
void fields(Take& take, DecodeRowsParams& params) {
  fields_of_layer(take, params.layer);
  take("weight", params.layer.weight, params.layer.weight_stride);
  take("scales", params.layer.scale, params.scale_stride);
  take("s", params.layer.s, params.s_stride);
  take("slot", params.slot, params.slot_stride);
  take("order", params.order, params.order_stride);
  take("table", params.table, params.table_stride);
  take("slots", params.slots);
  take("a_rows", params.a_rows);
}

// As decode_forward, whose workspace it has.
void decode_rows(const DecodeRowsParams& given, cudaStream_t stream);

constexpr int kNibbles = 16;

// The weight has four bits an element. Element i of it, in the order of rows, is values[nibble i] times the scale of
// its block i >> block_shift, in float32, rounded to dtype. Without a second level a block's scale is a float32; with
// one it is a byte b, and stands for code[b] * second[block >> second_shift] + offset, each operation rounded.
struct DecodeFourBitParams {
  DecodeParams layer;  // without a weight
  const uint8_t*
      codes;            // (n, k / 2), contiguous, on a 16-byte boundary; of a byte the high nibble is the first element
  const void* scales;   // contiguous: float32 or bytes, one a block; rows are whole blocks
  const float* code;    // (256,), contiguous, or null: there is no second level
  const float* second;  // contiguous
  const float* offset;  // 0-d, or null: offset_value
  float offset_value;
  float values[kNibbles];
  int block_shift;
  int second_shift;
};

template <typename Take>
void fields(Take& take, DecodeFourBitParams& params) {
  fields_of_layer(take, params.layer);
  take("scale", params.layer.scale, params.layer.scale_value);
  take("s", params.layer.s);
  take("codes", params.codes);
  take("scales", params.scales);
  take("code", params.code);
  take("second", params.second);
  take("offset", params.offset, params.offset_value);
  float (&values)[kNibbles] = params.values;
  take("values", values[0], values[1], values[2], values[3], values[4], values[5], values[6], values[7], values[8],
       values[9], values[10], values[11], values[12], values[13], values[14], values[15]);
  take("block_shift", params.block_shift);
  take("second_shift", params.second_shift);
}

// As decode_forward, whose workspace it has, and whose bits on the weight in dtype.
void decode_four_bit(const DecodeFourBitParams& given, cudaStream_t stream);

// Forward: y (m, n) = x w^T + bias + f S up^T and S = x down^T, with w (n, k), down = A (r, k), up = B (n, r).
// Backward: the gradients dX = dY W + dS A and dS = f dY B under the names y, S and x = dY, with w = W (k, n), down = B
// (k, r), up = A (r, n); m, n, k are the sizes of this product, not of the layer.
// With dropout S = c drop(x) down^T forward, and y = x W + c drop(S up) backward: c is the keep_scale, and the mask
// that of the layer's x, whose rows and columns are x's forward and y's backward. Every matrix but S has rows of
// 16-byte multiples, contiguous, on 16-byte boundaries, in `dtype`.
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
  uint64_t nonce;       // that no flag holds before the launch
  const int64_t* seed;  // 0-d, of the mask; null where threshold is 0
  uint32_t threshold;   // a 16-bit draw below it drops its element
  float keep_scale;
  float scale_value;
  int64_t m;
  int64_t n;
  int64_t k;
  int64_t r;
  Dtype dtype;  // bfloat16 or float16
  bool backward;
  int multiprocessors;  // of the device
};

template <typename Take>
void fields(Take& take, GemmParams& params) {
  take("x", params.x, params.x_stride);
  take("w", params.w, params.w_stride);
  take("down", params.down, params.down_stride);
  take("up", params.up, params.up_stride);
  take("bias", params.bias);
  take("scale", params.scale, params.scale_value);
  take("seed", params.seed);
  take("threshold", params.threshold);
  take("keep_scale", params.keep_scale);
  take("y", params.y);
  take("s", params.s);
  take("workspace", params.flags);
  take("nonce", params.nonce);
  take("m", params.m);
  take("n", params.n);
  take("k", params.k);
  take("r", params.r);
  take("dtype", params.dtype);
  take("backward", params.backward);
  take("multiprocessors", params.multiprocessors);
}

// `flags` is the beginning of a workspace of gemm_workspace_bytes, in which s_half finds its place. The device must be
// of compute capability 9.0. Its multiprocessors bound the grid, whose blocks are all resident together: the launch is
// cooperative.
void gemm_sm90(const GemmParams& given, cudaStream_t stream);

}  // namespace peft_kernels::lora
