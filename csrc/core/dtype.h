// Element types, by torch's names without "torch.". Plain C++.
#pragma once

#include "core/names.h"

namespace peft_kernels {

enum class Dtype { kBfloat16, kFloat16, kFloat32 };

inline constexpr Named<Dtype> kDtypes[] = {
    {Dtype::kBfloat16, "bfloat16"}, {Dtype::kFloat16, "float16"}, {Dtype::kFloat32, "float32"}};

constexpr const auto& names_of(Dtype) {
  return kDtypes;
}

}  // namespace peft_kernels
