// What CUDA C++ brings along and a host compiler does not: the index variables, barriers, warp operations, atomics.
// Every operation that waits or orders takes the place it is called from, for reports and to tell divergence.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "simt/machine.h"

#define SIMT_SITE(what) \
  simt::Site {          \
    what, file, line    \
  }
#define SIMT_CALLER const char *file = __builtin_FILE(), int line = __builtin_LINE()

namespace simt {

inline Thread& self() {
  return *g_machine->self();
}

inline void launch(const Config& config, std::function<void()> body) {
  Machine(config, std::move(body)).run();
}

// Call this in every turn of a loop that waits for what another thread or an asynchronous engine does.
inline void yield(const char* what, SIMT_CALLER) {
  g_machine->spin(SIMT_SITE(what));
}

template <typename Predicate>
void block_until(Predicate happened, const char* what, SIMT_CALLER) {
  while (!happened()) {
    yield(what, file, line);
  }
}

// Let any other thread go first, or not: before whatever other threads may see or be seen by.
inline void preempt(const char* what, SIMT_CALLER) {
  g_machine->preempt(SIMT_SITE(what));
}

// Leave work to an asynchronous engine, which does it at a later step; actions of one non-null `order` stay in order.
inline void defer(const char* what, std::function<void()> action, const void* order = nullptr) {
  g_machine->defer(what, std::move(action), order);
}

// Do what was deferred under `order`, but for the `keep` youngest actions.
inline void finish_deferred(const void* order, size_t keep = 0) {
  g_machine->finish_deferred(order, keep);
}

[[noreturn]] inline void fail(const std::string& text) {
  g_machine->fail(text);
}

// Values of all lanes of a group, read after all have brought theirs.
template <typename T>
class Gathered {
 public:
  explicit Gathered(std::shared_ptr<Round> round) : round_(std::move(round)) {}
  T operator[](unsigned lane) const {
    T value;
    std::memcpy(&value, &round_->values[lane * sizeof(T)], sizeof(T));
    return value;
  }
  bool has(unsigned lane) const { return round_->arrived[lane]; }

 private:
  std::shared_ptr<Round> round_;
};

// Wait until every lane of `mask` in the group of `size` consecutive threads has brought its value; groups wider than a
// warp ignore the mask. Lanes that come with another mask, or from another place in the code, have diverged.
template <typename T>
Gathered<T> gather(const T& value, int size, uint32_t mask, const Site& site) {
  Thread& thread = self();
  const int lane = static_cast<int>(thread.linear) % size;
  auto& rounds = thread.cta->rounds[{size, static_cast<int>(thread.linear) / size}];
  if (size == kWarpSize && !(mask >> lane & 1)) {
    fail(site.text() + " with a mask that leaves out the calling lane " + std::to_string(lane));
  }
  std::shared_ptr<Round> round;
  for (const auto& each : rounds) {
    if (each->mask & mask) {
      if (each->mask != mask || !(each->site == site) || each->arrived[static_cast<size_t>(lane)]) {
        fail("divergence: lane " + std::to_string(lane) + " comes to " + site.text() + " while others wait at " +
             each->site.text());
      }
      round = each;
    }
  }
  if (!round) {
    const int count = size == kWarpSize ? __builtin_popcount(mask) : size;
    const auto lanes = static_cast<size_t>(size);
    round = std::make_shared<Round>(
        Round{site, mask, count, sizeof(T), std::vector<bool>(lanes), std::vector<char>(lanes * sizeof(T)), {}});
    rounds.push_back(round);
  }
  std::memcpy(&round->values[static_cast<size_t>(lane) * sizeof(T)], &value, sizeof(T));
  round->arrived[static_cast<size_t>(lane)] = true;
  if (--round->missing > 0) {
    g_machine->park(round->parked, site);
  } else {
    rounds.erase(std::find(rounds.begin(), rounds.end(), round));
    g_machine->wake(round->parked);
    g_machine->preempt(site);
  }
  return Gathered<T>(std::move(round));
}

// Arrive at a barrier for `expected` threads; the last one releases the others.
inline void arrive(Barrier& barrier, int expected, bool wait, bool same_place, const Site& site) {
  if (barrier.arrived > 0 && (barrier.expected != expected || (same_place && !(barrier.site == site)))) {
    fail("divergence: comes to " + site.text() + " for " + std::to_string(expected) + " threads while others wait at " +
         barrier.site.text() + " for " + std::to_string(barrier.expected));
  }
  barrier.expected = expected;
  barrier.site = site;
  if (++barrier.arrived == expected) {
    barrier.arrived = 0;
    ++barrier.phase;
    g_machine->wake(barrier.parked);
    g_machine->preempt(site);
  } else if (wait) {
    g_machine->park(barrier.parked, site);
  }
}

// bar.sync and bar.arrive with an id; 0 is that of __syncthreads. `threads` is a multiple of a warp.
inline void barrier_sync(int id, int threads, SIMT_CALLER) {
  arrive(self().cta->barriers[id], threads, true, false, SIMT_SITE("named barrier"));
}
inline void barrier_arrive(int id, int threads, SIMT_CALLER) {
  arrive(self().cta->barriers[id], threads, false, false, SIMT_SITE("named barrier"));
}

inline unsigned cluster_rank() {
  return self().cta->rank;
}
inline unsigned cluster_size() {
  return static_cast<unsigned>(self().cta->cluster->ctas.size());
}

inline void cluster_arrive(SIMT_CALLER) {
  Thread& thread = self();
  if (thread.cluster_arrived) {
    fail("arrives at the cluster's barrier a second time without a wait");
  }
  Barrier& barrier = thread.cta->cluster->barrier;
  thread.cluster_arrived = true;
  thread.cluster_phase = barrier.phase;
  arrive(barrier, barrier.expected, false, false, SIMT_SITE("cluster arrive"));
}
inline void cluster_wait(SIMT_CALLER) {
  Thread& thread = self();
  if (!thread.cluster_arrived) {
    fail("waits at the cluster's barrier without having arrived");
  }
  Barrier& barrier = thread.cta->cluster->barrier;
  while (barrier.phase == thread.cluster_phase) {
    g_machine->park(barrier.parked, SIMT_SITE("cluster wait"));
  }
  thread.cluster_arrived = false;
}

// Dynamic shared memory of the running CTA, and of a CTA of its cluster (whose threads must still be there).
inline void* shared_memory() {
  return self().cta->shared;
}
inline void* shared_memory_of(unsigned rank) {
  const auto& ctas = self().cta->cluster->ctas;
  if (rank >= ctas.size()) {
    fail("there is no CTA " + std::to_string(rank) + " in the cluster");
  }
  if (ctas[rank]->live == 0) {
    fail("touches the shared memory of CTA " + std::to_string(rank) + " of its cluster, which has exited");
  }
  return ctas[rank]->shared;
}

// 32-bit addresses of the cluster's shared memory: the CTA's rank in the high byte, the offset below.
inline uint32_t shared_address(const void* pointer) {
  const auto& ctas = self().cta->cluster->ctas;
  for (size_t rank = 0; rank < ctas.size(); ++rank) {
    const auto offset = static_cast<const char*>(pointer) - ctas[rank]->shared;
    if (offset >= 0 && static_cast<size_t>(offset) <= g_machine->config().shared_bytes) {
      return static_cast<uint32_t>(rank << 24 | static_cast<size_t>(offset));
    }
  }
  fail("a pointer into shared memory points elsewhere");
}
inline void* shared_pointer(uint32_t address) {
  return static_cast<char*>(shared_memory_of(address >> 24)) + (address & 0xFFFFFFu);
}

template <typename T>
T atomic(T* address, const char* what, const char* file, int line, const std::function<T(T)>& update) {
  g_machine->preempt(SIMT_SITE(what));
  const T old = *address;
  *address = update(old);
  return old;
}

}  // namespace simt

#define threadIdx (simt::self().index)
#define blockIdx (simt::self().cta->block_index)
#define blockDim (simt::g_machine->config().block)
#define gridDim (simt::g_machine->config().grid)
constexpr int warpSize = simt::kWarpSize;

// Static shared memory would be a variable of one thread here. Take dynamic shared memory, by core/shared.cuh.
#undef __shared__
#define __shared__ static_assert(false, "the emulator has dynamic shared memory alone: core/shared.cuh");
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __grid_constant__
#define __grid_constant__
#undef __cluster_dims__
#define __cluster_dims__(...)

using std::max;
using std::min;

inline void __syncthreads(SIMT_CALLER) {
  arrive(simt::self().cta->barriers[0], static_cast<int>(blockDim.count()), true, true, SIMT_SITE("__syncthreads"));
}
inline void __syncwarp(unsigned mask = 0xFFFFFFFFu, SIMT_CALLER) {
  simt::gather(0, simt::kWarpSize, mask, SIMT_SITE("__syncwarp"));
}

#define SIMT_SHUFFLE(name, from)                                                                \
  template <typename T>                                                                         \
  T name(unsigned mask, T value, int operand, int width = simt::kWarpSize, SIMT_CALLER) {       \
    const auto all = simt::gather(value, simt::kWarpSize, mask, SIMT_SITE(#name));              \
    const int lane = static_cast<int>(simt::self().lane()), first = lane / width * width;       \
    const int source = from;                                                                    \
    if (source < first || source >= first + width) {                                            \
      return value;                                                                             \
    }                                                                                           \
    if (!all.has(static_cast<unsigned>(source))) {                                              \
      simt::fail(#name " reads lane " + std::to_string(source) + ", which is not in the mask"); \
    }                                                                                           \
    return all[static_cast<unsigned>(source)];                                                  \
  }
SIMT_SHUFFLE(__shfl_sync, first + operand % width)
SIMT_SHUFFLE(__shfl_up_sync, lane - operand)
SIMT_SHUFFLE(__shfl_down_sync, lane + operand)
SIMT_SHUFFLE(__shfl_xor_sync, lane ^ operand)
#undef SIMT_SHUFFLE

inline unsigned __ballot_sync(unsigned mask, int predicate, SIMT_CALLER) {
  const auto all = simt::gather(predicate, simt::kWarpSize, mask, SIMT_SITE("__ballot_sync"));
  unsigned votes = 0;
  for (unsigned lane = 0; lane < simt::kWarpSize; ++lane) {
    votes |= static_cast<unsigned>(all.has(lane) && all[lane]) << lane;
  }
  return votes;
}
inline int __any_sync(unsigned mask, int predicate, SIMT_CALLER) {
  return __ballot_sync(mask, predicate, file, line) != 0;
}
inline int __all_sync(unsigned mask, int predicate, SIMT_CALLER) {
  return __ballot_sync(mask, predicate, file, line) == mask;
}

#define SIMT_REDUCE(name, combine)                                                 \
  template <typename T>                                                            \
  T name(unsigned mask, T value, SIMT_CALLER) {                                    \
    const auto all = simt::gather(value, simt::kWarpSize, mask, SIMT_SITE(#name)); \
    T result = value;                                                              \
    for (unsigned lane = 0; lane < simt::kWarpSize; ++lane) {                      \
      if (all.has(lane) && lane != simt::self().lane()) {                          \
        const T other = all[lane];                                                 \
        result = combine;                                                          \
      }                                                                            \
    }                                                                              \
    return result;                                                                 \
  }
SIMT_REDUCE(__reduce_add_sync, result + other)
SIMT_REDUCE(__reduce_min_sync, std::min(result, other))
SIMT_REDUCE(__reduce_max_sync, std::max(result, other))
#undef SIMT_REDUCE

#define SIMT_ATOMIC(name, result)                                                               \
  template <typename T, typename V>                                                             \
  T name(T* address, V operand, SIMT_CALLER) {                                                  \
    const T value = static_cast<T>(operand);                                                    \
    return simt::atomic<T>(address, #name, file, line, [value](T old) -> T { return result; }); \
  }
SIMT_ATOMIC(atomicAdd, old + value)
SIMT_ATOMIC(atomicSub, old - value)
SIMT_ATOMIC(atomicExch, ((void)old, value))
SIMT_ATOMIC(atomicMin, std::min(old, value))
SIMT_ATOMIC(atomicMax, std::max(old, value))
SIMT_ATOMIC(atomicOr, old | value)
SIMT_ATOMIC(atomicAnd, old& value)
#undef SIMT_ATOMIC
template <typename T, typename U, typename V>
T atomicCAS(T* address, U compare, V operand, SIMT_CALLER) {
  const T expected = static_cast<T>(compare), value = static_cast<T>(operand);
  return simt::atomic<T>(address, "atomicCAS", file, line, [=](T old) -> T { return old == expected ? value : old; });
}

inline void __threadfence_block(SIMT_CALLER) {
  simt::preempt("__threadfence_block", file, line);
}
inline void __threadfence(SIMT_CALLER) {
  simt::preempt("__threadfence", file, line);
}
inline void __threadfence_system(SIMT_CALLER) {
  simt::preempt("__threadfence_system", file, line);
}
inline void __nanosleep(unsigned, SIMT_CALLER) {
  simt::yield("__nanosleep", file, line);
}

template <typename T>
T __ldg(const T* pointer) {
  return *pointer;
}
inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
inline float __int_as_float(int bits) {
  return __uint_as_float(static_cast<unsigned>(bits));
}
inline int __float_as_int(float value) {
  return static_cast<int>(__float_as_uint(value));
}
// The host's compiler has no instruction that would make one rounding of two.
inline float __fmul_rn(float a, float b) {
  return a * b;
}
inline float __fadd_rn(float a, float b) {
  return a + b;
}
inline float __fdividef(float a, float b) {
  return a / b;
}
inline float __frcp_rn(float a) {
  return 1.0f / a;
}
inline float rsqrtf(float a) {
  return 1.0f / std::sqrt(a);
}
// Of a selector's nibbles the lower three bits alone; the fourth would ask for a sign.
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  unsigned result = 0;
  for (unsigned i = 0; i < 4; ++i) {
    result |= static_cast<unsigned>(bytes >> 8 * (selector >> 4 * i & 7) & 0xFF) << 8 * i;
  }
  return result;
}
inline int __popc(unsigned bits) {
  return __builtin_popcount(bits);
}
inline int __clz(int bits) {
  return bits ? __builtin_clz(static_cast<unsigned>(bits)) : 32;
}
inline int __ffs(int bits) {
  return __builtin_ffs(bits);
}
