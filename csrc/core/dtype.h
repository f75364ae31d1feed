// Element types, by torch's names without "torch.". Plain C++.
#pragma once

#include <array>

#include "core/names.h"

namespace peft_kernels {

enum class Dtype { kBfloat16, kFloat16, kFloat32 };

constexpr auto names_of(Dtype) {
  return std::array{Named{Dtype::kBfloat16, "bfloat16"}, Named{Dtype::kFloat16, "float16"},
                    Named{Dtype::kFloat32, "float32"}};
}

}  // namespace peft_kernels
