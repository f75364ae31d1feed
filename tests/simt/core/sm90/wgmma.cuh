// Twin of csrc/core/sm90/wgmma.cuh. Each warp's share of a product, 16 rows, is done at a random step between its issue
// and the warp's wait, from the bytes that shared memory holds then, found as the PTX ISA reads matrix descriptors
// ("Strides", "Canonical Layouts", "Matrix Descriptor Format").
#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <list>

#include "core/sm90/arch.cuh"
#include "core/sm90/dtype.h"
#include "core/sm90/memory.cuh"
#include "core/sm90/swizzle.h"

namespace peft_kernels::sm90 {

// An operand in shared memory, taken out of its descriptor.
struct Operand {
  uint32_t start, leading, stride, width;

  explicit Operand(uint64_t bits) {
    const auto field = [bits](int first) { return static_cast<uint32_t>(bits >> first & 0x3FFF) << 4; };
    start = field(0);
    leading = field(16);
    stride = field(32);
    const int mode = static_cast<int>(bits >> 62);
    width = mode == 1 ? 128 : mode == 2 ? 64 : 32;
    if (mode == 0 || (bits >> 46 & 0xFFFF) != 0 || (bits >> 14 & 3) != 0 || (bits >> 30 & 3) != 0) {
      simt::fail("a matrix descriptor without a swizzle, with a base offset, or with bits set that mean nothing");
    }
  }

  // Element (mn, k), 16 bits wide, before the swizzle: 8 of them are the 16-byte units that the layouts are made of.
  uint32_t plain(uint32_t mn, uint32_t k, bool k_major) const {
    const uint32_t units = width / 16;
    return start + (k_major
                        ? mn % 8 * width + mn / 8 * stride + k * 2
                        : mn % 8 * 2 + mn / 8 % units * 16 + mn / 8 / units * leading + k % 8 * width + k / 8 * stride);
  }
  uint32_t at(uint32_t mn, uint32_t k, bool k_major) const {
    const uint32_t address = plain(mn, k, k_major);
    return address ^ ((address >> 7 & (width / 16 - 1)) << 4);
  }

  // The whole 128-byte lines, which the swizzle never leaves, that elements mn to mn + count - 1 lie in.
  std::list<PendingReads::Range>::iterator read(simt::Cta& cta, uint32_t mn, uint32_t count, bool k_major) const {
    const uint32_t begin = plain(mn, 0, k_major) / 128 * 128, last = plain(mn + count - 1, 15, k_major);
    return cta.state<PendingReads>().add(begin, last / 128 * 128 + 128, "a wgmma");
  }
};

// What a warp has issued: products in order, and of how many products each uncompleted group is.
struct WarpProducts {
  uint64_t issued = 0;
  std::deque<uint64_t> groups;  // `issued` at each commit
};
struct ThreadProducts {
  uint64_t issued = 0;
  uint64_t commits = 0;
  bool fenced = false;
};

// Of the running thread's warp.
inline WarpProducts& warp_products() {
  struct Warps {
    std::array<WarpProducts, 32> warp;
  };
  return simt::self().cta->state<Warps>().warp[simt::self().warp()];
}

inline void wgmma_fence() {
  simt::self().state<ThreadProducts>().fenced = true;
}

inline void wgmma_commit(SIMT_CALLER) {
  simt::gather(0, 32, 0xFFFFFFFFu, SIMT_SITE("wgmma.commit_group"));
  auto& thread = simt::self().state<ThreadProducts>();
  auto& warp = warp_products();
  if (warp.groups.size() == thread.commits) {
    warp.groups.push_back(warp.issued);
  }
  ++thread.commits;
}

template <int kPending>
void wgmma_wait(SIMT_CALLER) {
  simt::gather(kPending, 32, 0xFFFFFFFFu, SIMT_SITE("wgmma.wait_group"));
  auto& thread = simt::self().state<ThreadProducts>();
  auto& warp = warp_products();
  const uint64_t done = thread.commits > kPending ? warp.groups[thread.commits - kPending - 1] : 0;
  simt::finish_deferred(&warp, warp.issued - done);
  thread.fenced = false;
  simt::preempt("wgmma_wait");
}

template <int kCount>
void wgmma_results(float (&)[kCount]) {}

template <HalfType kType, int kN>
__attribute__((optimize("O3"))) void multiply(simt::Cta& cta,
                                              unsigned warp,
                                              const std::array<float*, 32>& d,
                                              const Operand& a,
                                              const Operand& b,
                                              bool transpose_b,
                                              bool accumulate) {
  const auto& unfenced = cta.state<UnfencedShared>();
  const auto value = [&](uint32_t address) {
    unfenced.check(cta.shared + address, 2, "a wgmma");
    uint16_t bits;
    std::memcpy(&bits, cta.shared + address, 2);
    return half_to_float<kType>(bits);
  };
  static float rows[16][16], cols[16][kN], sums[16][kN];
  for (uint32_t k = 0; k < 16; ++k) {
    for (uint32_t i = 0; i < 16; ++i) {
      rows[i][k] = value(a.at(16 * (warp % 4) + i, k, true));
    }
    for (uint32_t j = 0; j < kN; ++j) {
      cols[k][j] = value(b.at(j, k, !transpose_b));
    }
  }
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < kN; ++j) {
      sums[i][j] = 0.0f;
    }
    for (int k = 0; k < 16; ++k) {
      for (int j = 0; j < kN; ++j) {
        sums[i][j] += rows[i][k] * cols[k][j];
      }
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < kN / 2; ++i) {
      const float sum = sums[lane / 4 + 8 * (i / 2 % 2)][8 * (i / 4) + 2 * (lane % 4) + i % 2];
      d[static_cast<size_t>(lane)][i] = accumulate ? d[static_cast<size_t>(lane)][i] + sum : sum;
    }
  }
}

template <HalfType kType, int kN, bool kTransposeB>
void wgmma(float (&d)[kN / 2], uint64_t a, uint64_t b, bool accumulate, SIMT_CALLER) {
  struct Issue {
    float* d;
    uint64_t a, b;
    bool accumulate;
  };
  const Issue mine{d, a, b, accumulate};
  auto& thread = simt::self().state<ThreadProducts>();
  if (!thread.fenced) {
    simt::fail("a wgmma without a wgmma.fence since the accumulators could last be touched");
  }
  const auto all = simt::gather(mine, 128, 0xFFFFFFFFu, SIMT_SITE("wgmma.mma_async"));
  const unsigned first = simt::self().linear % 128 / 32 * 32;
  auto& warp = warp_products();
  // The first thread of the warp to come out issues for all of them.
  if (thread.issued++ == warp.issued) {
    ++warp.issued;
    std::array<float*, 32> accumulators;
    for (unsigned lane = 0; lane < 128; ++lane) {
      const Issue other = all[lane];
      if (other.a != a || other.b != b || other.accumulate != accumulate) {
        simt::fail("the threads of a warpgroup start different products");
      }
      if (lane / 32 == first / 32) {
        accumulators[lane % 32] = other.d;
      }
    }
    simt::Cta& cta = *simt::self().cta;
    const unsigned number = simt::self().warp();
    const auto read_a = Operand(a).read(cta, 16 * (number % 4), 16, true);
    const auto read_b = Operand(b).read(cta, 0, kN, !kTransposeB);
    simt::defer(
        "wgmma",
        [=, &cta] {
          multiply<kType, kN>(cta, number, accumulators, Operand(a), Operand(b), kTransposeB, accumulate);
          cta.state<PendingReads>().ranges.erase(read_a);
          cta.state<PendingReads>().ranges.erase(read_b);
        },
        &warp);
  }
}

}  // namespace peft_kernels::sm90
