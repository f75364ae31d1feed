// The half-precision types that Hopper's kernels are compiled for. Plain C++.
#pragma once

namespace peft_kernels::sm90 {

enum class HalfType { kBf16, kFp16 };

}  // namespace peft_kernels::sm90
