// Element types by number, as Python hands them over.
#pragma once

#include <stdexcept>
#include <string>

namespace peft_kernels {

enum class Dtype { kBfloat16, kFloat16, kFloat32 };

// `name` is torch's, without "torch.".
inline Dtype dtype_of(const std::string& name) {
  if (name == "bfloat16") {
    return Dtype::kBfloat16;
  }
  if (name == "float16") {
    return Dtype::kFloat16;
  }
  if (name == "float32") {
    return Dtype::kFloat32;
  }
  throw std::invalid_argument("dtype must be bfloat16, float16 or float32, got " + name);
}

}  // namespace peft_kernels
