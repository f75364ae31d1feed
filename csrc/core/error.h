// Errors of the CUDA runtime as C++ exceptions, which pybind11 hands to Python as RuntimeError.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace peft_kernels {

// Version of the installed driver's CUDA, such as 13000; 0 if no driver is installed.
inline int driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

inline std::string describe_error(cudaError_t error) {
  std::string text = std::string(cudaGetErrorName(error)) + ": " + cudaGetErrorString(error);
  // Without a driver the runtime says that the driver's version is insufficient, which sends users the wrong way.
  if (error == cudaErrorInsufficientDriver && driver_version() == 0) {
    text += " (no NVIDIA driver is installed)";
  }
  return text;
}

// Throw if a runtime call failed; `call` names it for the message.
inline void check(cudaError_t error, const char* call) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(call) + " failed: " + describe_error(error));
  }
}

}  // namespace peft_kernels
