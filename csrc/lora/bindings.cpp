#include <cuda_runtime.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>
#include <utility>

#include "core/registry.h"
#include "lora/gemm_sm90_config.h"
#include "lora/params.h"

namespace py = pybind11;

namespace peft_kernels::lora {
namespace {

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// The workspace begins with the flags; the partial sums follow.
py::tuple decode_workspace(int m, int n, int k, int r, int splits, int down_splits) {
  const decode::Shape shape = {m, n, k, r, splits, down_splits};
  return py::make_tuple(decode::flag_count(shape), decode::workspace_bytes(shape));
}

void bind_decode(py::module_& module) {
  module.def("decode_workspace", &decode_workspace, py::kw_only(), py::arg("m"), py::arg("n"), py::arg("k"),
             py::arg("r"), py::arg("splits"), py::arg("down_splits"),
             "Flags and bytes of decode_forward's workspace, which begins with the flags, 8 bytes each.");
  module.def(
      "decode_forward",
      [](uintptr_t x, uintptr_t weight, uintptr_t lora_a, uintptr_t lora_b, uintptr_t bias, uintptr_t scale,
         double scale_value, uintptr_t y, uintptr_t s, uintptr_t workspace, uint64_t nonce, int64_t x_stride,
         int64_t weight_stride, int64_t a_stride, std::pair<int64_t, int64_t> b_strides, int64_t bias_stride, int m,
         int n, int k, int r, int splits, int down_splits, const std::string& dtype, const std::string& adapter_dtype,
         int grid, uintptr_t stream) {
        DecodeParams params = {};
        params.x = pointer<const void>(x);
        params.weight = pointer<const void>(weight);
        params.lora_a = pointer<const void>(lora_a);
        params.lora_b = pointer<const void>(lora_b);
        params.bias = pointer<const void>(bias);
        params.scale = pointer<const float>(scale);
        params.scale_value = static_cast<float>(scale_value);
        params.y = pointer<void>(y);
        params.s = pointer<float>(s);
        params.nonce = nonce;
        params.x_stride = x_stride;
        params.weight_stride = weight_stride;
        params.a_stride = a_stride;
        params.b_stride_n = b_strides.first;
        params.b_stride_r = b_strides.second;
        params.bias_stride = bias_stride;
        params.shape = {m, n, k, r, splits, down_splits};
        params.flags = pointer<uint64_t>(workspace);
        decode_forward(params, dtype_of(dtype), dtype_of(adapter_dtype), grid, pointer<CUstream_st>(stream));
      },
      py::kw_only(), py::arg("x"), py::arg("weight"), py::arg("lora_a"), py::arg("lora_b"), py::arg("bias"),
      py::arg("scale"), py::arg("scale_value"), py::arg("y"), py::arg("s"), py::arg("workspace"), py::arg("nonce"),
      py::arg("x_stride"), py::arg("weight_stride"), py::arg("a_stride"), py::arg("b_strides"), py::arg("bias_stride"),
      py::arg("m"), py::arg("n"), py::arg("k"), py::arg("r"), py::arg("splits"), py::arg("down_splits"),
      py::arg("dtype"), py::arg("adapter_dtype"), py::arg("grid"), py::arg("stream"),
      py::call_guard<py::gil_scoped_release>(),
      "Write y (m, n) and S (m, r) of at most 16 tokens. bias 0: none; scale 0: scale_value; strides in elements.");
}

// The workspace begins with the flags; S in half precision follows.
py::tuple gemm_workspace(int64_t m, int64_t r) {
  return py::make_tuple(gemm_flags(m), gemm_workspace_bytes(m, r));
}

void bind_gemm(py::module_& module) {
  module.def("gemm_workspace", &gemm_workspace, py::kw_only(), py::arg("m"), py::arg("r"),
             "Flags and bytes of gemm_sm90's workspace, which begins with the flags, 8 bytes each.");
  module.def(
      "gemm_sm90",
      [](uintptr_t x, uintptr_t w, uintptr_t down, uintptr_t up, uintptr_t bias, uintptr_t scale, double scale_value,
         uintptr_t y, uintptr_t s, uintptr_t workspace, uint64_t nonce, int64_t x_stride, int64_t w_stride,
         int64_t down_stride, int64_t up_stride, int64_t m, int64_t n, int64_t k, int64_t r, const std::string& dtype,
         bool backward, int multiprocessors, uintptr_t stream) {
        GemmParams params = {};
        params.x = pointer<const void>(x);
        params.w = pointer<const void>(w);
        params.down = pointer<const void>(down);
        params.up = pointer<const void>(up);
        params.bias = pointer<const void>(bias);
        params.scale = pointer<const float>(scale);
        params.scale_value = static_cast<float>(scale_value);
        params.y = pointer<void>(y);
        params.s = pointer<float>(s);
        params.flags = pointer<uint64_t>(workspace);
        params.s_half = params.flags + gemm_flags(m);
        params.nonce = nonce;
        params.x_stride = x_stride;
        params.w_stride = w_stride;
        params.down_stride = down_stride;
        params.up_stride = up_stride;
        params.y_stride = n;
        params.m = m;
        params.n = n;
        params.k = k;
        params.r = r;
        params.dtype = dtype_of(dtype);
        params.backward = backward;
        gemm_sm90(params, multiprocessors, pointer<CUstream_st>(stream));
      },
      py::kw_only(), py::arg("x"), py::arg("w"), py::arg("down"), py::arg("up"), py::arg("bias"), py::arg("scale"),
      py::arg("scale_value"), py::arg("y"), py::arg("s"), py::arg("workspace"), py::arg("nonce"), py::arg("x_stride"),
      py::arg("w_stride"), py::arg("down_stride"), py::arg("up_stride"), py::arg("m"), py::arg("n"), py::arg("k"),
      py::arg("r"), py::arg("dtype"), py::arg("backward"), py::arg("multiprocessors"), py::arg("stream"),
      py::call_guard<py::gil_scoped_release>(),
      "Write y (m, n) and S (m, r) as GemmParams says. bias 0: none; scale 0: scale_value; strides in elements.");
}

void bind(py::module_& module) {
  module.doc() = "Kernels of lora_linear. Pointers and the stream are integers; the current device must be theirs.";
  module.def(
      "dropout_mask",
      [](uintptr_t mask, uintptr_t seed, int64_t rows, int64_t cols, uint32_t threshold, uintptr_t stream) {
        dropout_mask({pointer<uint8_t>(mask), pointer<const int64_t>(seed), rows, cols, threshold},
                     pointer<CUstream_st>(stream));
      },
      py::kw_only(), py::arg("mask"), py::arg("seed"), py::arg("rows"), py::arg("cols"), py::arg("threshold"),
      py::arg("stream"), py::call_guard<py::gil_scoped_release>(),
      "Write the keep-mask (rows, cols), one byte an element, of the 0-d int64 seed.");
  bind_decode(module);
  bind_gemm(module);
}

const Registrar registrar("lora", bind);

}  // namespace
}  // namespace peft_kernels::lora
