// peft_kernels._C: kernels behind raw pointers, free of torch, so that one binary serves every torch version. What is
// compiled for the host is always in it; what needs CUDA, all in files that setup.py leaves out without an nvcc, is
// there where setup.py defines PEFT_KERNELS_CUDA.
#include <pybind11/pybind11.h>

namespace py = pybind11;

namespace peft_kernels::lora {
void bind_host(pybind11::module_& module);
}

namespace peft_kernels {
void bind_cuda(pybind11::module_& module, pybind11::module_& lora);

namespace {

#ifdef PEFT_KERNELS_CUDA
constexpr bool kHasCuda = true;
#else
constexpr bool kHasCuda = false;
#endif

// Counts changes of what Python calls on the host: a binary of other sources is not used.
constexpr int kHostInterface = 1;

}  // namespace
}  // namespace peft_kernels

PYBIND11_MODULE(_C, module) {
  module.doc() = "C++ and CUDA C++ of peft_kernels, behind raw pointers.";
  module.attr("HAS_CUDA") = peft_kernels::kHasCuda;
  module.attr("HOST_INTERFACE") = peft_kernels::kHostInterface;
  py::module_ lora = module.def_submodule("lora");
  peft_kernels::lora::bind_host(lora);
#ifdef PEFT_KERNELS_CUDA
  peft_kernels::bind_cuda(module, lora);
#endif
}
