// The part of peft_kernels._C that needs CUDA. The CUDA runtime is linked statically and finds the driver when it is
// first called, so the import needs no driver.
#include <cuda_runtime.h>
#include <pybind11/pybind11.h>

#include <string>

#include "core/error.h"

namespace py = pybind11;

namespace peft_kernels::lora {
void bind(pybind11::module_& module);
}
namespace peft_kernels::adapter {
void bind(pybind11::module_ module);
}

namespace peft_kernels {
namespace {

// PEFT_KERNELS_ARCHS is set by setup.py to what the binary holds, such as "80;90a".
py::dict build_info() {
  py::dict info;
  info["archs"] = py::str(PEFT_KERNELS_ARCHS).attr("split")(";");
  info["nvcc"] = std::to_string(__CUDACC_VER_MAJOR__) + "." + std::to_string(__CUDACC_VER_MINOR__) + "." +
                 std::to_string(__CUDACC_VER_BUILD__);
  info["cudart"] = CUDART_VERSION;
  return info;
}

py::object why_no_device() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) {
    return py::str(describe_error(error));
  }
  if (count == 0) {
    return py::str("the CUDA runtime sees no device");
  }
  return py::none();
}

int device_count() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}

}  // namespace

void bind_cuda(py::module_& module, py::module_& lora) {
  module.def("build_info", &build_info,
             "What the kernels were built with: archs (list of str), nvcc (str), cudart (int).");
  module.def("device_count", &device_count, "Number of CUDA devices; 0 where there is no driver.");
  module.def("why_no_device", &why_no_device, "Reason why device_count() is 0, or None.");
  module.def("driver_version", &driver_version,
             "The driver's CUDA version, such as 13000; 0 where there is no driver.");
  lora::bind(lora);
  adapter::bind(module.def_submodule("adapter"));
}

}  // namespace peft_kernels
