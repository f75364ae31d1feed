// The cast of gemm_sm90: tiles, threads and their roles, the shared memory plan, barriers. Plain C++.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/sm90/dtype.h"

namespace peft_kernels::lora {

using sm90::HalfType;

// Forward, W and A by rows of K, B by rows of r:   y = x W^T + bias + f S B^T,  S = x A^T.
// Backward, the same memory read the other way:    dX = dY W + dS A,  dS = f dY B.
// The kernel speaks of x, W, down, up, S and y in both.
enum class Direction { kForward, kBackward };

constexpr int kGemmMaxRank = 128;
constexpr int kGemmBlockM = 128;
constexpr int kGemmConsumers = 2;
constexpr int kGemmMaxCluster = 2;
constexpr int kGemmNarrow = 128;  // columns of a tile where wider ones are too few

// The rank that S in half precision is padded to, with zeros.
constexpr int gemm_padded_rank(int64_t r) {
  return r <= 16 ? 16 : r <= 32 ? 32 : r <= 64 ? 64 : 128;
}

// Whether S up^T is more steps of the reduction, on its accumulators: f is then in the half-precision S, rounded once
// as S itself would be. Backward it is, but for dropout, which masks a product of its own. Forward in float16, f S may
// leave the range of what it is kept in where S does not, so f multiplies a product of its own, in float32.
constexpr bool gemm_folds(HalfType type, Direction direction, bool dropout) {
  return direction == Direction::kBackward ? !dropout : type == HalfType::kBf16;
}

// Columns of the widest tile. At rank 128 the tile n = 0 has 64 accumulators of S a thread, which spill beside 128 of
// y, and, with 32 of a rank product of its own, beside 96. With dropout, 16 words of x or the decisions on a chunk of
// the rank product come on top.
constexpr int gemm_wide(int padded_rank, bool folds, bool dropout) {
  if (dropout) {
    return padded_rank <= 32 ? 256 : padded_rank <= 64 ? 192 : kGemmNarrow;
  }
  return padded_rank <= 64 ? 256 : folds ? 192 : kGemmNarrow;
}

// Columns of the narrowest. With dropout there is one width, for the time that compiling another takes.
constexpr int gemm_narrow(int wide, bool dropout) {
  return dropout ? wide : kGemmNarrow;
}

// What the caller lends: a flag of 8 bytes for each consumer's half of each row block, those past the end of y that a
// cluster reaches among them; then S (m, padded rank) in half precision, on a 16-byte boundary.
constexpr int64_t gemm_flags(int64_t m) {
  constexpr int64_t kRows = kGemmMaxCluster * kGemmBlockM;
  return kGemmConsumers * kGemmMaxCluster * ((m + kRows - 1) / kRows);
}
constexpr int64_t gemm_workspace_bytes(int64_t m, int64_t r) {
  return 8 * gemm_flags(m) + 2 * m * gemm_padded_rank(r);
}

// How many stages fit into `limit` bytes beside what the larger takes, the stages' copies of down or y's staging.
constexpr int gemm_stages(int stage_bytes, int down_bytes, int staging_bytes, int limit) {
  int stages = 1;
  while (stages < 6 &&
         (stages + 1) * stage_bytes +
                 ((stages + 1) * down_bytes > staging_bytes ? (stages + 1) * down_bytes : staging_bytes) <=
             limit) {
    ++stages;
  }
  return stages;
}

template <HalfType kType_, int kRank_, Direction kDirection_, int kBlockN_, bool kDropout_>
struct GemmConfig {
  static constexpr HalfType kType = kType_;
  static constexpr Direction kDirection = kDirection_;

  // Forward, S is of x with elements dropped, which registers mask; backward, y's rank product has them dropped.
  static constexpr bool kDropout = kDropout_;

  // kRank: the rank, padded with zeros.
  static constexpr int kRank = kRank_;
  static_assert(kRank == 16 || kRank == 32 || kRank == 64 || kRank == 128, "ranks that wgmma is spelled out for");

  // Whether W, down and up lie in memory by rows of what is summed over, so that wgmma transposes them.
  static constexpr bool kTransposed = kDirection == Direction::kBackward;

  static constexpr bool kFolded = gemm_folds(kType, kDirection, kDropout);
  static constexpr bool kDropsX = kDropout && !kTransposed;
  static constexpr bool kDropsProduct = kDropout && kTransposed;

  // A tile of y, and the depth of a step of the reduction: 64 half-precision values are the widest swizzle, 128 bytes.
  static constexpr int kBlockM = kGemmBlockM;
  static constexpr int kBlockN = kBlockN_;
  static constexpr int kBlockK = 64;
  static constexpr int kLineBytes = 128;

  // The rank product takes steps of kRankChunk ranks. y leaves in chunks of kChunkN columns, each warp's 16 rows by
  // themselves, through kBuffers buffers in turn.
  static constexpr int kRankChunk = kRank < 64 ? kRank : 64;
  static constexpr int kRankSteps = kRank / kRankChunk;
  static constexpr int kRankLineBytes = 2 * kRankChunk;
  static constexpr int kChunkN = 64;
  static constexpr int kChunks = kBlockN / kChunkN;
  static constexpr int kBiasWords = kFolded ? kBlockN / 8 : 1;
  static constexpr int kWarpRows = 16;
  static constexpr int kBuffers = 2;

  // Warpgroup 0 copies (one thread of it), warpgroups 1 and 2 multiply, 64 rows of the tile each. A block has the
  // multiprocessor's 65536 registers to itself: 384 threads enter with 168 each, then 128 * 40 + 256 * 232 = 384 * 168.
  static constexpr int kWarpgroup = 128;
  static constexpr int kConsumers = kGemmConsumers;
  static constexpr int kThreads = kWarpgroup * (1 + kConsumers);
  static constexpr int kConsumerWarps = kConsumers * kWarpgroup / 32;
  static constexpr int kConsumerRows = kBlockM / kConsumers;
  static constexpr int kProducerRegisters = 40;
  static constexpr int kConsumerRegisters = 232;
  static_assert(kWarpgroup * (kProducerRegisters + kConsumers * kConsumerRegisters) <= kThreads * 168,
                "registers handed out are registers that were there");

  // The blocks of a cluster each copy one half of W's and of up's slots to all of them: of its columns where these are
  // lines, of every block's lines where they are not.
  static constexpr int kHalves = kGemmMaxCluster;
  static constexpr int kWHalf = kTransposed ? kBlockK / kHalves : kBlockN / kHalves;
  static constexpr int kUpHalf = kTransposed ? kRankChunk / kHalves : kBlockN / kHalves;

  // Bytes of the slots of a stage. A rank step keeps S where x is and up where W is.
  static constexpr int kXBytes = kBlockM * kLineBytes;
  static constexpr int kWBytes = kBlockN * kLineBytes;
  static constexpr int kDownBytes = kRank * kLineBytes;
  static constexpr int kSBytes = kBlockM * kRankLineBytes;
  static constexpr int kUpBytes = kBlockN * kRankLineBytes;
  static_assert(kSBytes <= kXBytes && kUpBytes <= kWBytes, "a rank step fits a stage");
  static constexpr int kStagingBytes = kWarpRows * kChunkN * 2;

  // What the swizzles of 128 bytes ask for; 1024 bytes of slack, since nobody promises the start of dynamic memory.
  static constexpr int kAlignment = 1024;
  static constexpr int kSharedLimit = 227 * 1024;
  static constexpr int kStages = gemm_stages(
      kXBytes + kWBytes, kDownBytes, kConsumerWarps * kBuffers * kStagingBytes, kSharedLimit - 2 * kAlignment);
  static_assert(kStages > kRankSteps, "the next tile's first step has a slot beside the rank steps");
};

template <typename Config>
struct alignas(Config::kAlignment) GemmShared {
  struct alignas(Config::kAlignment) Stage {
    uint8_t x[Config::kXBytes];  // x (128, 64); S (128, ranks) in a rank step
    uint8_t w[Config::kWBytes];  // W (block n, 64), or blocks of (64, 64) transposed; up in a rank step
  };
  Stage stage[Config::kStages];
  // Only tiles n = 0 have a down beside x and W. It is where y passes between tiles, so that neither takes from the
  // other's room: down is loaded after the last tile's y has left, and y staged after the last product by down.
  union {
    alignas(Config::kAlignment) uint8_t down[Config::kStages][Config::kDownBytes];  // (rank, 64) | (64, rank)
    alignas(Config::kAlignment) uint8_t staging[Config::kConsumerWarps][Config::kBuffers][Config::kStagingBytes];
  };

  uint64_t full[Config::kStages];  // a stage's copies have arrived: one arrival, and their bytes
  uint64_t free[Config::kStages];  // its operands have been read: one arrival a consumer warp of the cluster
  uint64_t drained;                // y has left `staging`: one arrival a consumer warp, once a tile n = 0
};

template <typename Config>
constexpr size_t gemm_shared_bytes() {
  constexpr size_t bytes = sizeof(GemmShared<Config>) + Config::kAlignment;
  static_assert(bytes <= Config::kSharedLimit, "a block's shared memory on sm_90");
  return bytes;
}

// Named barriers: one for each consumer, and one for both; 0 is __syncthreads'.
constexpr uint32_t kConsumerBarrier = 1;
constexpr uint32_t kBothConsumersBarrier = kConsumerBarrier + kGemmConsumers;

}  // namespace peft_kernels::lora
