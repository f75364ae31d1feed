// The cast list of the adapter's forward pass on Hopper: tiles, who owns which columns, where everything lies in shared
// memory. Plain C++ for host and device, so that a host compiler alone can test it; the play is forward_sm90.cuh.
//
// A cluster owns kBlockM rows. Its CTAs share the columns of x and of y out among themselves in chunks of kBlockC, and
// the rows of z, which they sum from each other's partial products.
#pragma once

#include <cstdint>

#include "core/host_device.h"
#include "core/sm90/swizzle.h"

namespace peft_kernels::adapter {

constexpr int kBlockM = 64;                       // the rows of a wgmma
constexpr int kBlockC = 64;                       // columns of a chunk: 128 bytes, the span of the swizzle
constexpr int kThreads = 128;                     // one warpgroup, which loads, multiplies and stores
constexpr int kDepth = 16;                        // columns of its operands that a wgmma multiplies
constexpr int kDescriptorStep = kDepth * 2 / 16;  // what that adds to an operand's descriptor, which counts 16 bytes
constexpr int kWarpRows = 16;                     // of the 64, those whose products are in a warp's registers
constexpr int kStages = 3;                        // tiles of weights: one is multiplied, one is here, one is on its way
constexpr int kMaxCluster = 8;                    // what every Hopper GPU can schedule
constexpr int kMaxRank = 128;
constexpr int kAlignElements = 8;  // TMA's rows start at multiples of 16 bytes
constexpr int kElementBytes = 2;
constexpr int kRowBytes = kBlockC * kElementBytes;
constexpr int kSharedLimit = 227 * 1024;  // of a block on sm_90
constexpr int kChunkBytes = kBlockM * kRowBytes;
constexpr int kBarrierBytes = 8;
constexpr int kTileAlign = 1024;  // a swizzled tile starts where the pattern of its address bits does

// The chunks of a matrix that one CTA of the cluster owns.
struct Slice {
  int first;
  int count;
};

PEFT_KERNELS_HOST_DEVICE int chunks_of(int64_t columns) {
  return static_cast<int>((columns + kBlockC - 1) / kBlockC);
}

// Chunks are dealt out in runs of equal length, so that the last CTAs may have fewer, or none.
PEFT_KERNELS_HOST_DEVICE Slice slice_of(int64_t columns, int cluster, int rank) {
  const int chunks = chunks_of(columns);
  const int each = (chunks + cluster - 1) / cluster;
  const int first = rank * each < chunks ? rank * each : chunks;
  return {first, chunks - first < each ? chunks - first : each};
}

// Buffers of a CTA for chunks of x, which become its chunks of y.
PEFT_KERNELS_HOST_DEVICE int slots_of(int64_t k, int64_t n, int cluster) {
  return slice_of(k > n ? k : n, cluster, 0).count;
}

// The byte of element (row, col) in a matrix of half-precision values that is kept as tiles of 64 columns, each with
// TMA's swizzle: chunks of x and y, tiles of weights, h.
PEFT_KERNELS_HOST_DEVICE int tile_offset(int row, int col) {
  const uint32_t within = static_cast<uint32_t>(row * kRowBytes + col % kBlockC * kElementBytes);
  return col / kBlockC * kChunkBytes + static_cast<int>(sm90::swizzled(within, kRowBytes));
}

// Where float (row, col) of a partial product (kBlockM, kRank) lies, counted in floats. Pieces of four floats trade
// places so that the eight bytes each that a warp's lanes write, two columns of eight rows, meet no bank twice.
template <int kRank>
PEFT_KERNELS_HOST_DEVICE int partial_offset(int row, int col) {
  return row * kRank + (((col >> 2) ^ ((row & 3) << 1)) << 2) + (col & 3);
}

// Where a thread's part of a wgmma's 64 rows begins. Accumulator i stands 8 * (i / 2 % 2) rows below and
// 8 * (i / 4) + i % 2 columns right of it (core/sm90/wgmma.cuh).
struct Fragment {
  int row;
  int col;
};

PEFT_KERNELS_HOST_DEVICE Fragment fragment_of(int thread) {
  return {thread / 32 * kWarpRows + thread % 32 / 4, thread % 4 * 2};
}

// Shared memory of a CTA, in bytes from its start. The slots come last, because their number is known at run time.
template <int kRank>
struct ForwardPlan {
  static_assert(kRank == 64 || kRank == 128, "the width of the bottleneck is padded to one of these");
  static constexpr int kStageBytes = kRank * kBlockC * kElementBytes;
  static constexpr int kHiddenBytes = kBlockM * kRank * kElementBytes;
  static constexpr int kPartialBytes = kBlockM * kRank * 4;

  static constexpr int kStagesAt = 0;
  static constexpr int kHiddenAt = kStagesAt + kStages * kStageBytes;
  static constexpr int kPartialAt = kHiddenAt + kHiddenBytes;
  static constexpr int kSlotsAt = kPartialAt + kPartialBytes;
  // A barrier for each stage (`w_full`), then one for each slot (`slot_full`).
  static constexpr int kMaxSlots = (kSharedLimit - kSlotsAt - kStages * kBarrierBytes) / (kChunkBytes + kBarrierBytes);

  PEFT_KERNELS_HOST_DEVICE static int slot_at(int slot) { return kSlotsAt + slot * kChunkBytes; }
  PEFT_KERNELS_HOST_DEVICE static int barriers_at(int slots) { return kSlotsAt + slots * kChunkBytes; }
  PEFT_KERNELS_HOST_DEVICE static int bytes(int slots) {
    return barriers_at(slots) + (kStages + slots) * kBarrierBytes;
  }

  static_assert(kHiddenAt % kTileAlign == 0 && kPartialAt % kTileAlign == 0 && kSlotsAt % kTileAlign == 0);
  static_assert(kStageBytes % kTileAlign == 0 && kChunkBytes % kTileAlign == 0);
  static_assert(kMaxSlots >= 16, "8 CTAs hold 8192 columns at every width");
};

}  // namespace peft_kernels::adapter
