// Products of a warpgroup as in wgmma.cuh, whose first operand is in registers: for one that many products share.
//
// Fragment (PTX ISA, "Register Fragments", wgmma.mma_async.m64nNk16, matrix A): thread t of the warpgroup holds, in
// word a[i], columns 2 (t % 4) + 8 (i / 2) and the next of row 16 (t / 32) + (t % 32) / 4 + 8 (i % 2), the first in the
// low half.
#pragma once

#include <cstdint>

#include "core/sm90/arch.cuh"
#include "core/sm90/dtype.h"

namespace peft_kernels::sm90 {

// clang-format off
#define PK_F4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define PK_F16(i) PK_F4(i), PK_F4(i + 4), PK_F4(i + 8), PK_F4(i + 12)
#define PK_WGMMA(type)                                                                                   \
  asm volatile(                                                                                          \
      "{\n"                                                                                              \
      ".reg .pred add;\n"                                                                                \
      "setp.ne.b32 add, %37, 0;\n"                                                                       \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " "                                    \
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                          \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "                \
      "{%32, %33, %34, %35}, %36, add, 1, 1, 0;\n"                                                       \
      "}"                                                                                                \
      : PK_F16(0), PK_F16(16)                                                                            \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<uint32_t>(accumulate))       \
      : "memory")
// clang-format on

// Start d = a b, or d += a b if `accumulate`: a (64, 16) in registers, which must keep their values until the group is
// waited for, b (16, 64) with rows of K by its descriptor. All threads of the warpgroup call it.
template <HalfType kType>
PEFT_KERNELS_DEVICE void wgmma_registers(float (&d)[32], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  if constexpr (kType == HalfType::kBf16) {
    PK_WGMMA("bf16");
  } else {
    PK_WGMMA("f16");
  }
}

#undef PK_WGMMA
#undef PK_F16
#undef PK_F4

}  // namespace peft_kernels::sm90
