// Functions of the module that launch a kernel: a struct from keyword arguments, as bind.h has it, and the stream.
#pragma once

#include <cuda_runtime.h>

#include "core/bind.h"

namespace peft_kernels {

// Give the module a function of a struct's fields and the stream, which is called without Python's lock.
template <typename Params>
void bind_launch(pybind11::module_& module,
                 const char* name,
                 void (*launch)(const Params&, cudaStream_t),
                 const char* doc) {
  const auto function = [=](const pybind11::kwargs& given) {
    Params params = {};
    cudaStream_t stream = nullptr;
    Arguments arguments(name, given);
    fields(arguments, params);
    arguments("stream", stream);
    arguments.finish();
    const pybind11::gil_scoped_release unlocked;
    launch(params, stream);
  };
  module.def(name, function, doc);
}

}  // namespace peft_kernels
