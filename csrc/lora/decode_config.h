// The cast of the decode kernel: its tiles, who owns which part of K, where partial sums and flags lie. Plain C++, so
// that a host compiler alone can test it.
//
// The rows of W and those of A are cut into tiles of kTileRows. A tile's K is split between CTAs, `splits` for W and
// `down_splits` for A; a tile's split is a unit. Units are numbered A's first, then W's, the splits of a tile following
// each other, and CTA c takes the units c, c + grid, ... in that order. The last split of a tile adds up what the
// earlier ones have left in memory, in the order of the splits; for a tile of A that makes S, which the last splits of
// W's tiles wait for. So a unit waits for units of a smaller number alone.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/host_device.h"

namespace peft_kernels::lora::decode {

constexpr int kMaxTokens = 16;     // the rows of one tensor-core product; its columns are 8
constexpr int kMaxSize = 1 << 30;  // of n, k and r: indices within a row or column are 32-bit
constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kCtasPerSm = 2;

// Tokens that a kernel is compiled for.
PEFT_KERNELS_HOST_DEVICE constexpr int tokens_of(int m) {
  return m <= 8 ? 8 : kMaxTokens;
}

// A warp multiplies 32 rows. Two warps of different rows share a chunk of k, so that the second finds x in L1: one row
// group would fetch m / 32 of W's bytes from L2 for x beside W itself, two fetch m / 64. More would ask for more splits
// of k to fill the machine, whose partial sums go through L2 too.
constexpr int kWarpRows = 32;
constexpr int kSubtiles = kWarpRows / 8;
constexpr int kRowGroups = 2;
constexpr int kTileRows = kRowGroups * kWarpRows;
constexpr int kWarpsOfK = kWarps / kRowGroups;

constexpr int kVector = 8;                // half-precision elements in 16 bytes
constexpr int kStepK = 4 * kVector;       // the four lanes that share a row load 64 bytes of it
constexpr int kSteps = 2;                 // of a chunk
constexpr int kChunkK = kSteps * kStepK;  // what a warp takes of k before the next warp of its rows

// Steps of rows that a warp has asked for: what registers hold. While it multiplies one, the others are on their way,
// of 16 warps 32 KiB of W for each to a multiprocessor.
PEFT_KERNELS_HOST_DEVICE constexpr int steps_ahead(int tokens) {
  return tokens == 8 ? 4 : 3;
}

// Floats from a token's sums to the next one's, so that a warp's lanes write to banks that differ.
PEFT_KERNELS_HOST_DEVICE constexpr int sums_pitch(int tokens) {
  return kWarpRows + (tokens == 8 ? 4 : 8);
}
constexpr int kRankBlock = 64;            // ranks of B and S that are in shared memory at a time
constexpr int kUpPitch = kRankBlock + 1;  // lanes read a column

// Offsets in the CTA's shared memory, in floats.
constexpr int kSums = 0;                                                   // (kWarps, tokens, sums_pitch)
constexpr int kUp = kSums + kWarps * kMaxTokens * sums_pitch(kMaxTokens);  // (kTileRows, kUpPitch) of B
constexpr int kS = kUp + kTileRows * kUpPitch;                             // (kMaxTokens, kRankBlock) of S
constexpr int kSharedBytes = (kS + kMaxTokens * kRankBlock) * static_cast<int>(sizeof(float));
static_assert(kSharedBytes <= 48 * 1024, "more would have to be asked for");

struct Shape {
  int m, n, k, r;
  int splits;       // of K, for the tiles of W
  int down_splits;  // of K, for the tiles of A
};

struct Range {
  int begin, end;
};

struct Unit {
  bool is_down;  // of A
  int tile;
  int split;
  int splits;
  PEFT_KERNELS_HOST_DEVICE bool is_last() const { return split == splits - 1; }
};

PEFT_KERNELS_HOST_DEVICE int tiles(int rows) {
  return (rows - 1) / kTileRows + 1;
}

PEFT_KERNELS_HOST_DEVICE int down_units(const Shape& shape) {
  return tiles(shape.r) * shape.down_splits;
}

PEFT_KERNELS_HOST_DEVICE int units(const Shape& shape) {
  return down_units(shape) + tiles(shape.n) * shape.splits;
}

PEFT_KERNELS_HOST_DEVICE Unit unit_at(const Shape& shape, int index) {
  const int down = down_units(shape);
  if (index < down) {
    return {true, index / shape.down_splits, index % shape.down_splits, shape.down_splits};
  }
  return {false, (index - down) / shape.splits, (index - down) % shape.splits, shape.splits};
}

// The unit that publishes S of a tile of A.
PEFT_KERNELS_HOST_DEVICE int unit_of_s(const Shape& shape, int tile) {
  return (tile + 1) * shape.down_splits - 1;
}

PEFT_KERNELS_HOST_DEVICE int chunks(int k) {
  return (k - 1) / kChunkK + 1;
}

// The chunks of K that a split takes; warp w of a row group takes the chunks begin + w, begin + w + kWarpsOfK, ...
PEFT_KERNELS_HOST_DEVICE Range chunks_of(const Shape& shape, const Unit& unit) {
  const int64_t all = chunks(shape.k);
  return {static_cast<int>(all * unit.split / unit.splits), static_cast<int>(all * (unit.split + 1) / unit.splits)};
}

// The place of a unit's partial sums, which all but the last split of a tile leave in memory.
PEFT_KERNELS_HOST_DEVICE int partial_of(const Shape& shape, const Unit& unit) {
  const int first = unit.is_down ? 0 : tiles(shape.r) * (shape.down_splits - 1);
  return first + unit.tile * (unit.splits - 1) + unit.split;
}

PEFT_KERNELS_HOST_DEVICE int partials(const Shape& shape) {
  return units(shape) - tiles(shape.r) - tiles(shape.n);
}

// Floats of one unit's partial sums: (m, kTileRows).
PEFT_KERNELS_HOST_DEVICE int64_t partial_floats(const Shape& shape) {
  return static_cast<int64_t>(shape.m) * kTileRows;
}

// The workspace: a 64-bit flag for each unit, then the partial sums.
inline int64_t flag_count(const Shape& shape) {
  return units(shape);
}

inline int64_t workspace_bytes(const Shape& shape) {
  return flag_count(shape) * static_cast<int64_t>(sizeof(uint64_t)) +
         partials(shape) * partial_floats(shape) * static_cast<int64_t>(sizeof(float));
}

}  // namespace peft_kernels::lora::decode
