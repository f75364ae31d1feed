// Products of a warpgroup: a 64 x kN tile of float32 accumulators in registers, operands of half-precision values in
// shared memory, 16 deep.
//
// Accumulators (PTX ISA, "Register Fragments", wgmma.mma_async.m64nNk16): thread t of the warpgroup holds, in
// accumulators[i], row 16 (t / 32) + (t % 32) / 4 + 8 (i / 2 % 2) and column 8 (i / 4) + 2 (t % 4) + i % 2.
#pragma once

#include <cstdint>

#include "core/sm90/arch.cuh"
#include "core/sm90/dtype.h"
#include "core/sm90/swizzle.h"

namespace peft_kernels::sm90 {

// Order this thread's accesses to accumulators before the products that follow.
PEFT_KERNELS_DEVICE void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

PEFT_KERNELS_DEVICE void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Wait until at most `kPending` groups of this warp's products are unfinished. A finished group has read its operands,
// and its accumulators may be touched.
template <int kPending>
PEFT_KERNELS_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Hold the compiler to the order "wait, then touch the accumulators", which no dependency of its own demands.
template <int kCount>
PEFT_KERNELS_DEVICE void wgmma_results(float (&accumulators)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    asm volatile("" : "+f"(accumulators[i])::"memory");
  }
}

// Operand lists: kN / 2 registers, and their numbers in the instruction.
// clang-format off
#define PK_F4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define PK_F8(i) PK_F4(i), PK_F4(i + 4)
#define PK_F16(i) PK_F8(i), PK_F8(i + 8)
#define PK_F32(i) PK_F16(i), PK_F16(i + 16)
#define PK_F64(i) PK_F32(i), PK_F32(i + 32)
#define PK_F96(i) PK_F64(i), PK_F32(i + 64)
#define PK_F128(i) PK_F64(i), PK_F64(i + 64)
#define PK_R8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define PK_R16 PK_R8 \
  ", %8, %9, %10, %11, %12, %13, %14, %15"
#define PK_R32 PK_R16 \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define PK_R64 PK_R32 \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define PK_R96 PK_R64 \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" \
  ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define PK_R128 PK_R96 \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
  ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

#define PK_WGMMA(n, type, registers, a_number, b_number, add_number, transpose_number)                          \
  asm volatile(                                                                                                 \
      "{\n"                                                                                                     \
      ".reg .pred add;\n"                                                                                       \
      "setp.ne.b32 add, %" #add_number ", 0;\n"                                                                 \
      "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" PK_R##registers "}, %" #a_number     \
      ", %" #b_number ", add, 1, 1, 0, %" #transpose_number ";\n"                                               \
      "}"                                                                                                       \
      : PK_F##registers(0)                                                                                      \
      : "l"(a), "l"(b), "r"(static_cast<uint32_t>(accumulate)), "n"(kTransposeB ? 1 : 0)                        \
      : "memory")

#define PK_WGMMA_TYPES(n, registers, a_number, b_number, add_number, transpose_number)               \
  if constexpr (kType == HalfType::kBf16) {                                                          \
    PK_WGMMA(n, "bf16", registers, a_number, b_number, add_number, transpose_number);                \
  } else {                                                                                           \
    PK_WGMMA(n, "f16", registers, a_number, b_number, add_number, transpose_number);                 \
  }
// clang-format on

// Start d = a b, or d += a b if `accumulate`: a (64, 16) with rows of K, b (16, kN) with rows of K, or of N if
// kTransposeB; both by their descriptors. All threads of the warpgroup call it with the same arguments.
template <HalfType kType, int kN, bool kTransposeB>
PEFT_KERNELS_DEVICE void wgmma(float (&d)[kN / 2], uint64_t a, uint64_t b, bool accumulate) {
  static_assert(kN == 16 || kN == 32 || kN == 64 || kN == 128 || kN == 192 || kN == 256,
                "a width that is spelled out here");
  if constexpr (kN == 16) {
    PK_WGMMA_TYPES(16, 8, 8, 9, 10, 11)
  } else if constexpr (kN == 32) {
    PK_WGMMA_TYPES(32, 16, 16, 17, 18, 19)
  } else if constexpr (kN == 64) {
    PK_WGMMA_TYPES(64, 32, 32, 33, 34, 35)
  } else if constexpr (kN == 128) {
    PK_WGMMA_TYPES(128, 64, 64, 65, 66, 67)
  } else if constexpr (kN == 192) {
    PK_WGMMA_TYPES(192, 96, 96, 97, 98, 99)
  } else {
    PK_WGMMA_TYPES(256, 128, 128, 129, 130, 131)
  }
}

#undef PK_WGMMA_TYPES
#undef PK_WGMMA
#undef PK_R128
#undef PK_R96
#undef PK_R64
#undef PK_R32
#undef PK_R16
#undef PK_R8
#undef PK_F128
#undef PK_F96
#undef PK_F64
#undef PK_F32
#undef PK_F16
#undef PK_F8
#undef PK_F4

}  // namespace peft_kernels::sm90
