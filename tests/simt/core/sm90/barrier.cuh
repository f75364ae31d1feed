// Twin of csrc/core/sm90/barrier.cuh: phases, pending arrivals and announced bytes as the PTX ISA has them.
#pragma once

#include <cstdint>
#include <unordered_map>

#include "core/sm90/arch.cuh"
#include "core/sm90/memory.cuh"

namespace peft_kernels::sm90 {

struct Mbarrier {
  uint32_t arrivals = 0;
  uint32_t pending = 0;
  int64_t bytes = 0;
  uint32_t phase = 0;

  void settle() {
    if (pending == 0 && bytes == 0) {
      pending = arrivals;
      ++phase;
    }
  }
  void arrive() {
    if (pending == 0) {
      simt::fail("more arrivals at an mbarrier than a phase has");
    }
    --pending;
    settle();
  }
  void complete(uint32_t count) {
    bytes -= count;
    settle();
  }
};

struct Mbarriers {
  std::unordered_map<const uint64_t*, Mbarrier> by_address;
};

inline Mbarrier& mbarrier_at(simt::Cta& cta, const uint64_t* address) {
  const auto found = cta.state<Mbarriers>().by_address.find(address);
  if (found == cta.state<Mbarriers>().by_address.end()) {
    simt::fail("use of an mbarrier that nobody initialised");
  }
  return found->second;
}

inline void barrier_init(uint64_t* barrier, uint32_t arrivals) {
  if (!simt::self().cta->state<Mbarriers>().by_address.emplace(barrier, Mbarrier{arrivals, arrivals}).second) {
    simt::fail("a second mbarrier.init");
  }
}

inline void fence_barrier_init() {
  simt::preempt("fence_barrier_init");
}

inline void barrier_arrive(uint64_t* barrier) {
  simt::preempt("barrier_arrive");
  mbarrier_at(*simt::self().cta, barrier).arrive();
  simt::preempt("barrier_arrive");
}

inline void barrier_arrive_remote(uint64_t* barrier, uint32_t rank) {
  simt::preempt("barrier_arrive_remote");
  const uint32_t address = (simt::shared_address(barrier) & 0xFFFFFFu) | rank << 24;
  mbarrier_at(*simt::self().cta->cluster->ctas.at(rank), static_cast<uint64_t*>(simt::shared_pointer(address)))
      .arrive();
  simt::preempt("barrier_arrive_remote");
}

inline void barrier_hand_back(uint64_t* barrier, uint32_t rank) {
  barrier_arrive_remote(barrier, rank);
}

inline void barrier_expect(uint64_t* barrier, uint32_t bytes) {
  simt::preempt("barrier_expect");
  Mbarrier& state = mbarrier_at(*simt::self().cta, barrier);
  state.bytes += bytes;
  state.arrive();
  simt::preempt("barrier_expect");
}

inline void barrier_wait(uint64_t* barrier, uint32_t parity, SIMT_CALLER) {
  if (parity > 1) {
    simt::fail("a parity is 0 or 1");
  }
  simt::preempt("barrier_wait", file, line);
  const Mbarrier& state = mbarrier_at(*simt::self().cta, barrier);
  simt::block_until([&] { return (state.phase & 1) != parity; }, "barrier_wait", file, line);
}

inline void barrier_wait_cluster(uint64_t* barrier, uint32_t parity, SIMT_CALLER) {
  barrier_wait(barrier, parity, file, line);
}

inline void named_barrier_sync(uint32_t id, uint32_t threads, SIMT_CALLER) {
  simt::barrier_sync(static_cast<int>(id), static_cast<int>(threads), file, line);
}

inline void named_barrier_arrive(uint32_t id, uint32_t threads, SIMT_CALLER) {
  simt::barrier_arrive(static_cast<int>(id), static_cast<int>(threads), file, line);
}

}  // namespace peft_kernels::sm90
