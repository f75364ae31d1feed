#include <cuda_runtime.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "adapter/forward_sm90_config.h"
#include "adapter/params.h"
#include "core/registry.h"

namespace py = pybind11;

namespace peft_kernels::adapter {
namespace {

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

sm90::HalfType half_type(const std::string& name) {
  if (name == "bfloat16") {
    return sm90::HalfType::kBf16;
  }
  if (name == "float16") {
    return sm90::HalfType::kFp16;
  }
  throw std::invalid_argument("bottleneck_adapter: dtype must be 'bfloat16' or 'float16', got '" + name + "'");
}

Activation activation_of(int number) {
  if (number < 0 || number >= static_cast<int>(Activation::kCount)) {
    throw std::invalid_argument("bottleneck_adapter: there is no activation " + std::to_string(number));
  }
  return static_cast<Activation>(number);
}

void forward(uintptr_t x,
             int64_t x_stride,
             uintptr_t down_weight,
             int64_t down_weight_stride,
             uintptr_t up_weight,
             int64_t up_weight_stride,
             uintptr_t down_bias,
             uintptr_t up_bias,
             uintptr_t residual,
             int64_t residual_stride,
             uintptr_t scale_tensor,
             float scale,
             uintptr_t z,
             uintptr_t y,
             int64_t m,
             int64_t n,
             int64_t k,
             int64_t r,
             bool serial,
             int activation,
             const std::string& dtype,
             int cluster,
             uintptr_t stream) {
  ForwardParams params = {};
  params.x = {pointer<const void>(x), x_stride};
  params.down_weight = {pointer<const void>(down_weight), down_weight_stride};
  params.up_weight = {pointer<const void>(up_weight), up_weight_stride};
  params.down_bias = pointer<const void>(down_bias);
  params.up_bias = pointer<const void>(up_bias);
  params.residual = {pointer<const void>(residual), residual_stride};
  params.scale_tensor = pointer<const float>(scale_tensor);
  params.z = pointer<float>(z);
  params.y = pointer<void>(y);
  params.m = m;
  params.n = n;
  params.k = k;
  params.r = r;
  params.scale = scale;
  params.serial = serial;
  params.activation = activation_of(activation);
  params.type = half_type(dtype);
  params.cluster = cluster;
  forward_sm90(params, pointer<CUstream_st>(stream));
}

void bind(py::module_& module) {
  module.doc() =
      "Kernels of bottleneck_adapter. Pointers and the stream are integers, 0 for a tensor that is not there; the "
      "current device must be theirs.";
  module.attr("MAX_RANK") = kMaxRank;
  module.def("max_columns", &max_columns, py::arg("r"), "The largest K and N at this width that a cluster can hold.");
  module.def("forward", &forward, py::kw_only(), py::arg("x"), py::arg("x_stride"), py::arg("down_weight"),
             py::arg("down_weight_stride"), py::arg("up_weight"), py::arg("up_weight_stride"), py::arg("down_bias"),
             py::arg("up_bias"), py::arg("residual"), py::arg("residual_stride"), py::arg("scale_tensor"),
             py::arg("scale"), py::arg("z"), py::arg("y"), py::arg("m"), py::arg("n"), py::arg("k"), py::arg("r"),
             py::arg("serial"), py::arg("activation"), py::arg("dtype"), py::arg("cluster"), py::arg("stream"),
             py::call_guard<py::gil_scoped_release>(),
             "Write z (M, r) float32 and y (M, N) on an sm_90 device; strides are of rows, in elements.");
}

const Registrar registrar("adapter", bind);

}  // namespace
}  // namespace peft_kernels::adapter
