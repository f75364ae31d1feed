#include <cuda_runtime.h>
#include <pybind11/pybind11.h>

#include <cstdint>

#include "core/registry.h"
#include "lora_linear/params.h"

namespace py = pybind11;

namespace peft_kernels::lora_linear {
namespace {

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
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
}

const Registrar registrar("lora_linear", bind);

}  // namespace
}  // namespace peft_kernels::lora_linear
