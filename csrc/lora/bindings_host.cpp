#include <pybind11/pybind11.h>

#include "core/bind.h"
#include "lora/dropout_host.h"

namespace py = pybind11;

namespace peft_kernels::lora {
namespace {

// Names of the levels that run here, the best last.
py::list host_levels() {
  py::list names;
  for (const auto& entry : names_of(host::Level{})) {
    if (host::has_level(entry.value)) {
      names.append(entry.name);
    }
  }
  return names;
}

}  // namespace

void bind_host(py::module_& module) {
  module.doc() =
      "Kernels of LoRA, as lora/dropout_host.h and, with CUDA, lora/params.h describe them; for the latter the current "
      "device must be that of the tensors.";
  module.def("host_levels", &host_levels, "What the processor can take as `level`, the best last.");
  bind_call(module, "host_drop", host::drop, "Write factor drop(x) of rows in the CPU's memory.");
  bind_call(module, "host_add_dropped", host::add_dropped, "Add factor drop(product) to rows in the CPU's memory.");
  bind_call(module, "host_keep", host::keep, "Write the keep-mask of rows, one byte an element, in the CPU's memory.");
}

}  // namespace peft_kernels::lora
