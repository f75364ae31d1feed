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
#define PK_F8(i) PK_F4(i), PK_F4(i + 4)
#define PK_F16(i) PK_F8(i), PK_F8(i + 8)
#define PK_F32(i) PK_F16(i), PK_F16(i + 16)
#define PK_F64(i) PK_F32(i), PK_F32(i + 32)
#define PK_R8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define PK_R16 PK_R8 \
  ", %8, %9, %10, %11, %12, %13, %14, %15"
#define PK_R32 PK_R16 \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define PK_R64 PK_R32 \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

#define PK_WGMMA(n, type, registers, a_numbers, b_number, add_number)                                           \
  asm volatile(                                                                                                 \
      "{\n"                                                                                                     \
      ".reg .pred add;\n"                                                                                       \
      "setp.ne.b32 add, %" #add_number ", 0;\n"                                                                 \
      "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" PK_R##registers "}, {" a_numbers "}" \
      ", %" #b_number ", add, 1, 1, 0;\n"                                                                       \
      "}"                                                                                                       \
      : PK_F##registers(0)                                                                                      \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<uint32_t>(accumulate))              \
      : "memory")

#define PK_WGMMA_TYPES(n, registers, a_numbers, b_number, add_number)    \
  if constexpr (kType == HalfType::kBf16) {                              \
    PK_WGMMA(n, "bf16", registers, a_numbers, b_number, add_number);     \
  } else {                                                               \
    PK_WGMMA(n, "f16", registers, a_numbers, b_number, add_number);      \
  }
// clang-format on

// Start d = a b, or d += a b if `accumulate`: a (64, 16) in registers, which must keep their values until the group is
// waited for, b (16, 2 kCount) with rows of K by its descriptor. All threads of the warpgroup call it.
template <HalfType kType, int kCount>
PEFT_KERNELS_DEVICE void wgmma_registers(float (&d)[kCount], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  static_assert(kCount == 8 || kCount == 16 || kCount == 32 || kCount == 64, "a width that is spelled out here");
  if constexpr (kCount == 8) {
    PK_WGMMA_TYPES(16, 8, "%8, %9, %10, %11", 12, 13)
  } else if constexpr (kCount == 16) {
    PK_WGMMA_TYPES(32, 16, "%16, %17, %18, %19", 20, 21)
  } else if constexpr (kCount == 32) {
    PK_WGMMA_TYPES(64, 32, "%32, %33, %34, %35", 36, 37)
  } else {
    PK_WGMMA_TYPES(128, 64, "%64, %65, %66, %67", 68, 69)
  }
}

// Hold the compiler to keep an operand's registers until here, after the wait for its group.
template <int kSteps>
PEFT_KERNELS_DEVICE void wgmma_operands(uint32_t (&a)[kSteps][4]) {
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    asm volatile("" : "+r"(a[step][0]), "+r"(a[step][1]), "+r"(a[step][2]), "+r"(a[step][3])::"memory");
  }
}

#undef PK_WGMMA_TYPES
#undef PK_WGMMA
#undef PK_R64
#undef PK_R32
#undef PK_R16
#undef PK_R8
#undef PK_F64
#undef PK_F32
#undef PK_F16
#undef PK_F8
#undef PK_F4

}  // namespace peft_kernels::sm90
