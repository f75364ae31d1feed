// The activations of a bottleneck in float32; names and equations as in peft_kernels/adapter/kernels/activations.py.
// Plain C++ for host and device, so that a host compiler alone can test it.
#pragma once

#include <array>
#include <cmath>

#include "core/host_device.h"
#include "core/names.h"

namespace peft_kernels::adapter {

enum class Activation : int { kRelu, kGelu, kGeluTanh, kSilu, kTanh, kSigmoid, kLeakyRelu, kIdentity };

constexpr auto names_of(Activation) {
  return std::array{Named{Activation::kRelu, "relu"},
                    Named{Activation::kGelu, "gelu"},
                    Named{Activation::kGeluTanh, "gelu_tanh"},
                    Named{Activation::kSilu, "silu"},
                    Named{Activation::kTanh, "tanh"},
                    Named{Activation::kSigmoid, "sigmoid"},
                    Named{Activation::kLeakyRelu, "leaky_relu"},
                    Named{Activation::kIdentity, "identity"}};
}

constexpr float kLeakySlope = 0.01f;

// h = act(z). All threads of a launch take the same branch: the activation is an argument, because each of them is a
// few of thousands of instructions, and a kernel of its own for each would be eight times the machine code.
PEFT_KERNELS_HOST_DEVICE float activate(float z, Activation activation) {
  switch (activation) {
    case Activation::kRelu:
      return z < 0.0f ? 0.0f : z;  // nan stays nan
    case Activation::kGelu:
      return 0.5f * z * (1.0f + erff(z * 0.70710678118654752f));
    case Activation::kGeluTanh:
      return 0.5f * z * (1.0f + tanhf(0.79788456080286536f * (z + 0.044715f * z * z * z)));
    case Activation::kSilu:
      return z / (1.0f + expf(-z));
    case Activation::kTanh:
      return tanhf(z);
    case Activation::kSigmoid:
      return 1.0f / (1.0f + expf(-z));
    case Activation::kLeakyRelu:
      return z > 0.0f ? z : kLeakySlope * z;
    default:
      return z;
  }
}

}  // namespace peft_kernels::adapter
