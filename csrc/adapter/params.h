// What the launchers of this family take. Pointers are device pointers; sizes and strides count elements.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "adapter/activations.h"
#include "core/dtype.h"

namespace peft_kernels::adapter {

// Rows of matrices are contiguous.
struct ForwardParams {
  const void* x;            // (M, K)
  const void* down_weight;  // (r, K)
  const void* up_weight;    // (N, r)
  const void* down_bias;    // (r,), or null
  const void* up_bias;      // (N,), or null
  const void* residual;     // (M, N); null where there is none, or where it is x
  const float* scale;       // 0-d, or null: scale_value
  float* z;                 // (M, r), contiguous: x Wd^T + bd
  void* y;                  // (M, N), contiguous
  int64_t x_stride;         // between rows
  int64_t down_weight_stride;
  int64_t up_weight_stride;
  int64_t residual_stride;
  int64_t m;
  int64_t n;
  int64_t k;
  int64_t r;
  float scale_value;
  bool serial;  // x is the residual
  Activation activation;
  Dtype dtype;  // bfloat16 or float16, of everything but z and the scale
  int cluster;  // CTAs that share a block of rows
};

template <typename Take>
void fields(Take& take, ForwardParams& params) {
  take("x", params.x, params.x_stride);
  take("down_weight", params.down_weight, params.down_weight_stride);
  take("up_weight", params.up_weight, params.up_weight_stride);
  take("down_bias", params.down_bias);
  take("up_bias", params.up_bias);
  take("residual", params.residual, params.residual_stride);
  take("scale", params.scale, params.scale_value);
  take("z", params.z);
  take("y", params.y);
  take("m", params.m);
  take("n", params.n);
  take("k", params.k);
  take("r", params.r);
  take("serial", params.serial);
  take("activation", params.activation);
  take("dtype", params.dtype);
  take("cluster", params.cluster);
}

// The largest K and N at this width that a cluster can hold.
int64_t max_columns(int64_t r);

void forward_sm90(const ForwardParams& params, cudaStream_t stream);

}  // namespace peft_kernels::adapter
