// The cast of the reduce kernel: its tiles, and which CTA takes which rows of them. Plain C++, so that a host compiler
// alone can test it.
//
// A unit is kColumns columns of dY or of x, and a block of ranks; dY's units come first. Its rows are cut into chunks,
// and the chunks of all units, one unit after the other, into one range for each CTA, all of one length: whatever the
// shape, all CTAs stream to the end. A CTA may so share its first unit with CTAs before it, and its last with CTAs
// after it. Each of a unit's CTAs then leaves a partial sum, in a slot of its own, and the last of them to come adds
// them up in the order of the CTAs.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "core/host_device.h"

namespace peft_kernels::lora::reduce {

constexpr int64_t kMaxSize =
    (int64_t{1} << 31) - 1024;  // of m, n and k: indices are 32-bit, and tiles reach past the end
constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kWarpColumns = 32;  // two products of 16
constexpr int kColumns = kWarps * kWarpColumns;
constexpr int kVector = 8;       // half-precision elements in 16 bytes
constexpr int kStepRows = 16;    // of a tensor-core product
constexpr int kTileRanks = 8;    // likewise
constexpr int kMinChunks = 4;    // a CTA with fewer would not fill its stages, and leave partial sums for little
constexpr int kMaxCtas = 65535;  // which a ticket counts

// What a kernel is compiled for.
struct Variant {
  int ranks;    // of a unit at most
  bool exact;   // float32 adapters: S is not rounded to half precision
  bool narrow;  // can make dS beside dB

  // x's rows of 512 bytes and S's: 16 to 21 KiB a stage, 60 KiB or more under way to a multiprocessor, where 4.3 TB/s
  // at 0.8 us ask for 26 (model); all of it within the 99 KiB that sm_86 and sm_89 have for a block.
  PEFT_KERNELS_HOST_DEVICE constexpr int rows() const { return ranks <= 32 ? 32 : 16; }
  PEFT_KERNELS_HOST_DEVICE constexpr int stages() const { return ranks <= 32 ? 4 : 5; }
  PEFT_KERNELS_HOST_DEVICE constexpr int ctas_per_sm() const { return ranks <= 32 && !narrow ? 2 : 1; }

  // Rows in shared memory are 16 bytes longer than they need be: the eight that ldmatrix reads then lie in other banks.
  PEFT_KERNELS_HOST_DEVICE constexpr int pitch() const { return kColumns + kVector; }
  PEFT_KERNELS_HOST_DEVICE constexpr int half_pitch() const { return ranks + kVector; }

  // Bytes: stages of x (rows, pitch) in half precision and S (rows, ranks) in float32; then S (rows, half_pitch) in
  // half precision, and a word.
  PEFT_KERNELS_HOST_DEVICE constexpr int stage_s() const { return rows() * pitch() * 2; }
  PEFT_KERNELS_HOST_DEVICE constexpr int stage_bytes() const { return stage_s() + rows() * ranks * 4; }
  PEFT_KERNELS_HOST_DEVICE constexpr int half_s() const { return stages() * stage_bytes(); }
  PEFT_KERNELS_HOST_DEVICE constexpr int last_word() const { return half_s() + rows() * half_pitch() * 2; }
  PEFT_KERNELS_HOST_DEVICE constexpr int shared_bytes() const { return last_word() + 16; }

  // Floats of a slot: a thread's accumulators for each 16 of its columns, four for each kTileRanks and four for dbias.
  PEFT_KERNELS_HOST_DEVICE constexpr int64_t slot_floats() const {
    return int64_t{kThreads} * (kWarpColumns / 16) * (ranks / kTileRanks + 1) * 4;
  }
};

// Up to rank 32 with two CTAs on a multiprocessor, or up to 128 with one; 32 where B takes registers, or the pieces of
// a float32 S. Ranks beyond read dY and x once more, mostly from L2.
PEFT_KERNELS_HOST_DEVICE constexpr Variant variant_for(int64_t r, bool exact, bool narrow) {
  return {r <= 32 || exact || narrow ? 32 : 128, exact, exact || narrow};
}

PEFT_KERNELS_HOST_DEVICE constexpr int blocks_of(int64_t size, int block) {
  return static_cast<int>((size + block - 1) / block);
}

constexpr int kUp = 0;    // the job over dY: dB, dbias and dS
constexpr int kDown = 1;  // the job over x: dA

struct Unit {
  int job;
  int tile;  // of columns
  int rank_block;
};

struct Plan {
  int up_tiles, down_tiles;  // of dY's and of x's columns
  int rank_blocks;
  int chunks;  // of the rows
  int ctas;

  PEFT_KERNELS_HOST_DEVICE int units() const { return (up_tiles + down_tiles) * rank_blocks; }
  PEFT_KERNELS_HOST_DEVICE int64_t all_chunks() const { return int64_t{units()} * chunks; }

  // Rank blocks of the same columns follow each other: the second finds in L2 what the first has read.
  PEFT_KERNELS_HOST_DEVICE Unit unit_at(int index) const {
    const int tile = index / rank_blocks;
    return tile < up_tiles ? Unit{kUp, tile, index % rank_blocks} : Unit{kDown, tile - up_tiles, index % rank_blocks};
  }

  // A CTA takes the chunks first_chunk(cta) ... first_chunk(cta + 1) - 1.
  PEFT_KERNELS_HOST_DEVICE int64_t first_chunk(int cta) const { return all_chunks() * cta / ctas; }
  PEFT_KERNELS_HOST_DEVICE int cta_of(int64_t chunk) const {
    return static_cast<int>(((chunk + 1) * ctas - 1) / all_chunks());
  }
  PEFT_KERNELS_HOST_DEVICE int first_cta(int unit) const { return cta_of(int64_t{unit} * chunks); }
  PEFT_KERNELS_HOST_DEVICE int last_cta(int unit) const { return cta_of(int64_t{unit + 1} * chunks - 1); }

  // Along the chunks, from one pair of a CTA and a unit to the next at least one number grows and none falls.
  PEFT_KERNELS_HOST_DEVICE int slot(int cta, int unit) const { return cta + unit; }
  PEFT_KERNELS_HOST_DEVICE int slots() const { return ctas + units() - 1; }
};

// n or k is 0 where dY or x is not asked about.
inline Plan plan_for(int64_t m, int64_t n, int64_t k, int64_t r, const Variant& variant, int multiprocessors) {
  Plan plan = {blocks_of(n, kColumns), blocks_of(k, kColumns), blocks_of(r, variant.ranks),
               blocks_of(m, variant.rows()), 1};
  const int64_t most = std::min<int64_t>(int64_t{multiprocessors} * variant.ctas_per_sm(), kMaxCtas);
  plan.ctas = static_cast<int>(std::min(most, std::max<int64_t>(plan.units(), plan.all_chunks() / kMinChunks)));
  return plan;
}

// The workspace: a ticket for each unit, then the slots, on a 16-byte boundary.
inline int64_t ticket_count(const Plan& plan) {
  return (plan.units() + 1) / 2 * 2;
}

inline int64_t workspace_bytes(const Plan& plan, const Variant& variant) {
  return ticket_count(plan) * static_cast<int64_t>(sizeof(uint64_t)) +
         plan.slots() * variant.slot_floats() * static_cast<int64_t>(sizeof(float));
}

}  // namespace peft_kernels::lora::reduce
