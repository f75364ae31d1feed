// What the launcher of the reduce kernel takes. Pointers are device pointers; sizes count elements.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "core/dtype.h"
#include "lora/reduce_config.h"

namespace peft_kernels::lora {

// out = factor x^T S, and the sums of x's columns.
struct ReduceJob {
  const void* x;        // (m, columns), rows contiguous and on 16-byte boundaries; null: there is no such job
  const float* s;       // (m, r), contiguous; null where out is
  void* out;            // (columns, r) in the adapters' dtype, or null
  void* sums;           // (columns,) in x's dtype, or null
  const float* factor;  // 0-d, or null: factor_value
  const int64_t* seed;  // 0-d, of the mask that drops elements of x; null where threshold is 0
  int64_t x_stride;     // between rows, in elements
  int64_t out_column;   // of out's strides
  int64_t out_rank;
  float factor_value;
  uint32_t threshold;
  int columns;
};

// jobs[kUp]:   dB = scale dY^T S and dbias, x = dY (m, n)
// jobs[kDown]: dA^T = keep_scale drop(x)^T dS, x (m, k)
// ds:          scale dY B, one part for each reduce::kColumns columns of dY
struct ReduceParams {
  ReduceJob jobs[2];
  const void* lora_b;  // (n, r) in the adapters' dtype, where ds is asked for
  float* ds;           // (tiles of n, m, r), contiguous, or null
  uint64_t* tickets;   // reduce::ticket_count(plan) of them
  float* partials;     // reduce's slots, on a 16-byte boundary
  int64_t b_stride_n;
  int64_t b_stride_r;
  uint64_t nonce;  // that no other launch on these tickets has
  int m;
  int r;
  Dtype dtype;          // of dY and x
  Dtype adapter_dtype;  // of lora_b, dB and dA: the same, or float32
  int multiprocessors;  // of the device
  reduce::Plan plan;    // made by the launcher
};

template <typename Take>
void fields(Take& take, ReduceParams& params) {
  ReduceJob &up = params.jobs[reduce::kUp], &down = params.jobs[reduce::kDown];
  take("dy", up.x, up.x_stride);
  take("s", up.s);
  take("db", up.out, up.out_column, up.out_rank);
  take("dbias", up.sums);
  take("scale", up.factor, up.factor_value);
  take("x", down.x, down.x_stride);
  take("ds", down.s);
  take("da", down.out, down.out_rank, down.out_column);
  take("keep_scale", down.factor_value);
  take("seed", down.seed);
  take("threshold", down.threshold);
  take("lora_b", params.lora_b, params.b_stride_n, params.b_stride_r);
  take("ds_parts", params.ds);
  take("workspace", params.tickets);
  take("nonce", params.nonce);
  take("m", params.m);
  take("n", up.columns);
  take("k", down.columns);
  take("r", params.r);
  take("dtype", params.dtype);
  take("adapter_dtype", params.adapter_dtype);
  take("multiprocessors", params.multiprocessors);
}

inline reduce::Variant variant_of(const ReduceParams& params) {
  return reduce::variant_for(params.r, params.adapter_dtype == Dtype::kFloat32, params.ds != nullptr);
}

// With the plan, and with what is left out of the workspace's address.
inline ReduceParams planned(ReduceParams params) {
  for (ReduceJob& job : params.jobs) {
    job.columns = job.x == nullptr ? 0 : job.columns;
  }
  params.plan = reduce::plan_for(params.m, params.jobs[reduce::kUp].columns, params.jobs[reduce::kDown].columns,
                                 params.r, variant_of(params), params.multiprocessors);
  params.partials = reinterpret_cast<float*>(params.tickets + reduce::ticket_count(params.plan));
  return params;
}

// `tickets` is the beginning of a workspace of reduce::workspace_bytes, in which partials finds its place.
void reduce_rows(const ReduceParams& given, cudaStream_t stream);

}  // namespace peft_kernels::lora
