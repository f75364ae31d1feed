// Which elements of x the low-rank branch drops: the recipe of peft_kernels/lora/kernels/dropout.py, bit for bit.
// Plain C++ for host and device, so that a host compiler alone can test it.
//
// Philox4x32 with 7 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11), key = the seed's 64
// bits, counter = (column / 8, row low, row high, lane). One call decides on 8 columns: column c takes the 16-bit half
// c % 8 of the four output words, low half first, and is kept when that half is at least the threshold.
#pragma once

#include <cstdint>

#include "core/host_device.h"

namespace peft_kernels::lora {

constexpr int kPhiloxRounds = 7;
constexpr int kDecisionsPerCall = 8;
constexpr uint32_t kDropoutLevels = 1u << 16;  // a decision is a 16-bit draw

constexpr uint32_t kMultiplier0 = 0xD2511F53u;
constexpr uint32_t kMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kWeyl0 = 0x9E3779B9u;
constexpr uint32_t kWeyl1 = 0xBB67AE85u;

struct Words {
  uint32_t word[4];
};

// `key_0` and `key_1` are the low and the high half of the seed.
PEFT_KERNELS_HOST_DEVICE Words philox4x32(Words counter, uint32_t key_0, uint32_t key_1) {
#ifdef __CUDA_ARCH__
#pragma unroll
#endif
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t product_0 = uint64_t{kMultiplier0} * counter.word[0];
    const uint64_t product_1 = uint64_t{kMultiplier1} * counter.word[2];
    counter = {{static_cast<uint32_t>(product_1 >> 32) ^ counter.word[1] ^ key_0, static_cast<uint32_t>(product_1),
                static_cast<uint32_t>(product_0 >> 32) ^ counter.word[3] ^ key_1, static_cast<uint32_t>(product_0)}};
    key_0 += kWeyl0;
    key_1 += kWeyl1;
  }
  return counter;
}

// The draws for columns 8 * group ... 8 * group + 7 of a row. Another lane of the same seed is another mask.
PEFT_KERNELS_HOST_DEVICE Words draw(int64_t seed, int64_t row, uint32_t group, uint32_t lane = 0) {
  const uint64_t key = static_cast<uint64_t>(seed);
  const uint64_t index = static_cast<uint64_t>(row);
  return philox4x32({{group, static_cast<uint32_t>(index), static_cast<uint32_t>(index >> 32), lane}},
                    static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32));
}

// Whether the group's column `j` (0 to 7) is kept.
PEFT_KERNELS_HOST_DEVICE bool keep(const Words& draws, int j, uint32_t threshold) {
  return ((draws.word[j / 2] >> (16 * (j % 2))) & 0xFFFFu) >= threshold;
}

}  // namespace peft_kernels::lora
