// Twin of csrc/core/sm90/wgmma_registers.cuh: products of the twin of wgmma.cuh, whose first operand is gathered from
// the warp's registers when they are issued.
#pragma once

#include <array>
#include <cstdint>

#include "core/sm90/wgmma.cuh"

namespace peft_kernels::sm90 {

// A warp's 16 rows of the first operand, as floats.
using WarpRows = std::array<std::array<float, 16>, 16>;

template <HalfType kType, int kN>
__attribute__((optimize("O3"))) void multiply_rows(
    simt::Cta& cta, const std::array<float*, 32>& d, const WarpRows& rows, const Operand& b, bool accumulate) {
  const auto& unfenced = cta.state<UnfencedShared>();
  static float cols[16][kN];
  for (uint32_t k = 0; k < 16; ++k) {
    for (uint32_t j = 0; j < kN; ++j) {
      const uint32_t address = b.at(j, k, true);
      unfenced.check(cta.shared + address, 2, "a wgmma");
      uint16_t bits;
      std::memcpy(&bits, cta.shared + address, 2);
      cols[k][j] = half_to_float<kType>(bits);
    }
  }
  for (size_t lane = 0; lane < 32; ++lane) {
    for (size_t i = 0; i < kN / 2; ++i) {
      const size_t row = lane / 4 + 8 * (i / 2 % 2), col = 8 * (i / 4) + 2 * (lane % 4) + i % 2;
      float sum = 0.0f;
      for (size_t k = 0; k < 16; ++k) {
        sum += rows[row][k] * cols[k][col];
      }
      d[lane][i] = accumulate ? d[lane][i] + sum : sum;
    }
  }
}

template <int kSteps>
void wgmma_operands(uint32_t (&)[kSteps][4]) {}

template <HalfType kType, int kCount>
void wgmma_registers(float (&d)[kCount], const uint32_t (&a)[4], uint64_t b, bool accumulate, SIMT_CALLER) {
  struct Issue {
    float* d;
    uint32_t a[4];
    uint64_t b;
    bool accumulate;
  };
  const Issue mine{d, {a[0], a[1], a[2], a[3]}, b, accumulate};
  auto& thread = simt::self().state<ThreadProducts>();
  if (!thread.fenced) {
    simt::fail("a wgmma without a wgmma.fence since the accumulators could last be touched");
  }
  const auto all = simt::gather(mine, 128, 0xFFFFFFFFu, SIMT_SITE("wgmma.mma_async from registers"));
  const unsigned first = simt::self().linear % 128 / 32 * 32;
  auto& warp = warp_products();
  // The first thread of the warp to come out issues for all of them.
  if (thread.issued++ != warp.issued) {
    return;
  }
  ++warp.issued;
  std::array<float*, 32> accumulators;
  WarpRows rows;
  for (unsigned lane = 0; lane < 128; ++lane) {
    const Issue other = all[lane];
    if (other.b != b || other.accumulate != accumulate) {
      simt::fail("the threads of a warpgroup start different products");
    }
    if (lane / 32 != first / 32) {
      continue;
    }
    accumulators[lane % 32] = other.d;
    for (unsigned i = 0; i < 4; ++i) {
      const float2 pair = unpack_halves<kType>(other.a[i]);
      const unsigned row = lane % 32 / 4 + i % 2 * 8, col = lane % 4 * 2 + i / 2 * 8;
      rows[row][col] = pair.x;
      rows[row][col + 1] = pair.y;
    }
  }
  simt::Cta& cta = *simt::self().cta;
  const auto read = Operand(b).read(cta, 0, 2 * kCount, true);
  simt::defer(
      "wgmma from registers",
      [=, &cta] {
        cta.state<PendingReads>().ranges.erase(read);
        multiply_rows<kType, 2 * kCount>(cta, accumulators, rows, Operand(b), accumulate);
      },
      &warp);
}

}  // namespace peft_kernels::sm90
