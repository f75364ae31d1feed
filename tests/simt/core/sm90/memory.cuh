// Twin of csrc/core/sm90/memory.cuh. Words that an ordinary store wrote are remembered with their thread until it
// fences; TMA and the tensor cores refuse to touch them before.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>
#include <list>
#include <unordered_map>
#include <vector>

#include "core/sm90/arch.cuh"
#include "core/sm90/dtype.h"

namespace peft_kernels::sm90 {

// Of a CTA for shared memory, of the launch for global memory.
template <int kSpace>
struct Unfenced {
  std::unordered_map<uintptr_t, const simt::Thread*> words;

  void check(const void* pointer, size_t bytes, const char* who) const {
    if (words.empty()) {
      return;
    }
    for (uintptr_t at = reinterpret_cast<uintptr_t>(pointer) / 4; at * 4 < reinterpret_cast<uintptr_t>(pointer) + bytes;
         ++at) {
      const auto found = words.find(at);
      if (found != words.end()) {
        simt::fail(std::string(who) + " touches memory that thread " + std::to_string(found->second->linear) +
                   " of CTA " + std::to_string(found->second->cta->index) +
                   " wrote by an ordinary store and did not fence for the asynchronous proxy");
      }
    }
  }
};
using UnfencedShared = Unfenced<0>;
using UnfencedGlobal = Unfenced<1>;

// Shared memory that asynchronous operations under way will read, as ranges of offsets: nobody may write there.
struct PendingReads {
  struct Range {
    uint32_t begin, end;
    const char* reader;
  };
  std::list<Range> ranges;

  std::list<Range>::iterator add(uint32_t begin, uint32_t end, const char* reader) {
    return ranges.insert(ranges.end(), {begin, end, reader});
  }
  void check(uint32_t begin, uint32_t end, const char* writer) const {
    for (const Range& range : ranges) {
      if (begin < range.end && range.begin < end) {
        simt::fail(std::string(writer) + " to shared memory that " + range.reader + " under way has yet to read");
      }
    }
  }
};

template <int kSpace>
struct Written {
  std::vector<uintptr_t> words;
};

template <int kSpace>
void write_word(Unfenced<kSpace>& unfenced, void* pointer, uint32_t word) {
  *static_cast<uint32_t*>(pointer) = word;
  const uintptr_t at = reinterpret_cast<uintptr_t>(pointer) / 4;
  unfenced.words[at] = &simt::self();
  simt::self().state<Written<kSpace>>().words.push_back(at);
}

template <int kSpace>
void fence_words(Unfenced<kSpace>& unfenced) {
  auto& written = simt::self().state<Written<kSpace>>().words;
  for (const uintptr_t at : written) {
    const auto found = unfenced.words.find(at);
    if (found != unfenced.words.end() && found->second == &simt::self()) {
      unfenced.words.erase(found);
    }
  }
  written.clear();
}

inline uint32_t shared_address(const void* pointer) {
  return simt::shared_address(pointer);
}

template <HalfType kType>
uint32_t pack_halves(float low, float high) {
  uint16_t halves[2];
  for (int i = 0; i < 2; ++i) {
    const float value = i == 0 ? low : high;
    if constexpr (kType == HalfType::kBf16) {
      const __nv_bfloat16 half = __float2bfloat16_rn(value);
      std::memcpy(&halves[i], &half, 2);
    } else {
      const __half half = __float2half_rn(value);
      std::memcpy(&halves[i], &half, 2);
    }
  }
  return halves[0] | static_cast<uint32_t>(halves[1]) << 16;
}

template <HalfType kType>
float half_to_float(uint16_t bits) {
  if constexpr (kType == HalfType::kBf16) {
    return __uint_as_float(static_cast<uint32_t>(bits) << 16);
  } else {
    __half half;
    std::memcpy(&half, &bits, 2);
    return __half2float(half);
  }
}

template <HalfType kType>
float2 unpack_halves(uint32_t word) {
  return {half_to_float<kType>(static_cast<uint16_t>(word)), half_to_float<kType>(static_cast<uint16_t>(word >> 16))};
}

inline void store_shared(uint32_t address, uint32_t word) {
  const uint32_t offset = address & 0xFFFFFFu;
  simt::self().cta->state<PendingReads>().check(offset, offset + 4, "an ordinary store");
  write_word(simt::self().cta->state<UnfencedShared>(), simt::shared_pointer(address), word);
}

inline void store_matrices(uint32_t address, uint32_t m0, uint32_t m1, uint32_t m2, uint32_t m3, SIMT_CALLER) {
  struct Fragment {
    uint32_t word[4];
  };
  const auto all = simt::gather(Fragment{{m0, m1, m2, m3}}, 32, 0xFFFFFFFFu, SIMT_SITE("stmatrix"));
  if (address % 16 != 0) {
    simt::fail("stmatrix to an address that is no multiple of 16");
  }
  const unsigned lane = simt::self().lane();
  for (unsigned i = 0; i < 4; ++i) {
    store_shared(address + 4 * i, all[4 * (lane % 8) + i].word[lane / 8]);
  }
}

inline void store_global(void* address, uint32_t word) {
  simt::preempt("store_global");
  write_word(simt::g_machine->state<UnfencedGlobal>(), address, word);
}

inline void fence_async_shared() {
  fence_words(simt::self().cta->state<UnfencedShared>());
  simt::preempt("fence_async_shared");
}

inline void fence_async_global() {
  fence_words(simt::g_machine->state<UnfencedGlobal>());
  simt::preempt("fence_async_global");
}

}  // namespace peft_kernels::sm90
