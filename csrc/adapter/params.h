// What the launchers of this family take. Pointers are device pointers; sizes and strides count elements.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "adapter/activations.h"
#include "core/sm90/dtype.h"

namespace peft_kernels::adapter {

// A matrix with contiguous rows.
struct Matrix {
  const void* data;
  int64_t row_stride;
};

struct ForwardParams {
  Matrix x;                   // (M, K)
  Matrix down_weight;         // (r, K)
  Matrix up_weight;           // (N, r)
  const void* down_bias;      // (r,), or null
  const void* up_bias;        // (N,), or null
  Matrix residual;            // (M, N); null where there is none, or where it is x
  const float* scale_tensor;  // 0-d, or null: then `scale` counts
  float* z;                   // (M, r), contiguous: x Wd^T + bd
  void* y;                    // (M, N), contiguous
  int64_t m;
  int64_t n;
  int64_t k;
  int64_t r;
  float scale;
  bool serial;  // x is the residual
  Activation activation;
  sm90::HalfType type;  // of everything but z and the scale
  int cluster;          // CTAs that share a block of rows
};

// The largest K and N at this width that a cluster can hold.
int64_t max_columns(int64_t r);

void forward_sm90(const ForwardParams& params, cudaStream_t stream);

}  // namespace peft_kernels::adapter
