// What the emulator's machine is made of: its configuration, threads, CTAs, clusters, and what they wait at.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <typeindex>
#include <utility>
#include <vector>

#include "simt/fiber.h"

namespace simt {

constexpr int kWarpSize = 32;
constexpr uint16_t kPoison = 0x7FC5;  // nan in fp16 and bf16, and, repeated, in fp32

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
  unsigned count() const { return x * y * z; }
};

struct Config {
  Dim3 grid, block, cluster;
  size_t shared_bytes = 0;
  uint64_t seed = 0;           // of the schedule
  unsigned resident_ctas = 0;  // CTAs on the machine at a time, dispatched in the order of their index; 0: all
  uint64_t max_steps = 1 << 28;
};

// Where in the device code a thread waits.
struct Site {
  const char* what;
  const char* file;
  int line;
  bool operator==(const Site& other) const {
    return line == other.line && std::strcmp(what, other.what) == 0 && std::strcmp(file, other.file) == 0;
  }
  std::string text() const {
    const char* name = std::strrchr(file, '/');
    return std::string(what) + " (" + (name ? name + 1 : file) + ":" + std::to_string(line) + ")";
  }
};

// Room for what twins remember of a thread, CTA, cluster or launch: one value of each type, made when first asked for.
class State {
 public:
  template <typename T>
  T& state() {
    std::shared_ptr<void>& slot = slots_[std::type_index(typeid(T))];
    if (!slot) {
      slot = std::make_shared<T>();
    }
    return *static_cast<T*>(slot.get());
  }

 private:
  std::map<std::type_index, std::shared_ptr<void>> slots_;
};

struct Thread;
struct Cta;

struct Barrier {
  int arrived = 0;
  int expected = 0;
  uint64_t phase = 0;
  Site site = {};
  std::vector<Thread*> parked;
};

// One collective operation under way: what each participant brought, until all have read it.
struct Round {
  Site site;
  uint32_t mask;
  int missing;
  size_t bytes;
  std::vector<bool> arrived;
  std::vector<char> values;
  std::vector<Thread*> parked;
};

struct Cluster : State {
  std::vector<Cta*> ctas;
  Barrier barrier;
};

struct Cta : State {
  unsigned index = 0;
  Dim3 block_index;
  unsigned rank = 0;  // in its cluster
  Cluster* cluster = nullptr;
  unsigned live = 0;
  unsigned deferred = 0;
  std::vector<char> shared_storage;
  char* shared = nullptr;
  std::map<int, Barrier> barriers;
  std::map<std::pair<int, int>, std::vector<std::shared_ptr<Round>>> rounds;  // by group size and group
};

struct Thread : State {
  Fiber fiber;
  void* stack = nullptr;
  Cta* cta = nullptr;
  Dim3 index;
  unsigned linear = 0;
  bool done = false;
  bool parked = false;
  bool spinning = false;
  Site site = {};
  uint64_t cluster_phase = 0;  // the phase that its last arrival at the cluster's barrier belongs to
  bool cluster_arrived = false;
  unsigned lane() const { return linear % kWarpSize; }
  unsigned warp() const { return linear / kWarpSize; }
};

}  // namespace simt
