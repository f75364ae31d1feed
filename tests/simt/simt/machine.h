// The machine that a launch runs on: threads as fibers, CTAs and clusters of CTAs that are resident together, a
// scheduler that picks the next thread at random, barriers and gathers that say where threads diverge, deferred actions
// for asynchronous engines, and a report of who waits where when nobody can go on. See README.md beside this folder.
#pragma once

#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "simt/parts.h"

namespace simt {

class Random {
 public:
  explicit Random(uint64_t seed) : state_(mix(seed + 0x9E3779B97F4A7C15u)) {}
  uint64_t next() { return mix(state_ += 0x9E3779B97F4A7C15u); }
  uint64_t below(uint64_t bound) { return next() % bound; }
  static uint64_t mix(uint64_t z) {
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
  }

 private:
  uint64_t state_;
};

class Machine : public State {
 public:
  Machine(const Config& config, std::function<void()> body);
  ~Machine();
  void run();

  // For the running thread: go on later, in the order that the scheduler likes.
  void preempt(const Site& site);  // whatever it does next may come after anything else
  void spin(const Site& site);     // it looked, and what it waits for has not happened
  void park(std::vector<Thread*>& list, const Site& site);
  void wake(std::vector<Thread*>& list);
  void note_progress() { idle_ = 0; }  // something happened that a spinning thread may wait for

  void defer(const char* what, std::function<void()> action, const void* order);
  void finish_deferred(const void* order, size_t keep);

  [[noreturn]] void fail(const std::string& text);
  const Config& config() const { return config_; }
  Random& random() { return random_; }
  Thread* self() const { return running_; }

 private:
  struct Deferred {
    const char* what;
    std::function<void()> action;
    const void* order;
    Cta* cta;
  };
  enum class Favour { kNone, kCta, kWarp, kThread };

  static void entry();
  void dispatch();
  void start_cluster(unsigned cluster);
  void check_exit(Cta& cta);
  size_t pick();
  uint64_t rank(const Thread& thread) const;
  void run_deferred(size_t index);
  void leave();
  std::string waiting() const;

  Config config_;
  std::function<void()> body_;
  Random random_;
  Favour favour_;
  uint64_t deferred_odds_;
  uint64_t epoch_ = 0;
  Fiber scheduler_;
  Thread* running_ = nullptr;
  std::vector<std::unique_ptr<Thread>> threads_;
  std::vector<std::unique_ptr<Cta>> ctas_;
  std::vector<std::unique_ptr<Cluster>> clusters_;
  std::vector<Thread*> ready_;
  std::vector<Deferred> deferred_;
  unsigned next_cluster_ = 0, cluster_count_ = 0, resident_ = 0;
  uint64_t live_ = 0, steps_ = 0, idle_ = 0;
  std::string error_;
};

inline Machine* g_machine = nullptr;
inline StackPool g_stacks;

inline Machine::Machine(const Config& config, std::function<void()> body)
    : config_(config), body_(std::move(body)), random_(config.seed) {
  const Dim3 &grid = config.grid, &cluster = config.cluster;
  if (config.block.count() == 0 || config.block.count() > 1024 || grid.count() == 0) {
    throw Error("a launch needs 1 to 1024 threads a CTA and at least one CTA");
  }
  if (cluster.count() == 0 || grid.x % cluster.x || grid.y % cluster.y || grid.z % cluster.z) {
    throw Error("the grid is no multiple of the cluster");
  }
  cluster_count_ = grid.count() / cluster.count();
  // Which threads a schedule favours, and how far asynchronous engines lag, is drawn with it.
  favour_ = static_cast<Favour>(random_.below(4));
  constexpr uint64_t kOdds[] = {1, 4, 64, 1024};
  deferred_odds_ = kOdds[random_.below(4)];
}

inline Machine::~Machine() {
  for (const auto& thread : threads_) {
    if (thread->stack) {
      g_stacks.give(thread->stack);
    }
  }
}

inline void Machine::run() {
  Machine* const outer = g_machine;
  g_machine = this;
  dispatch();
  while (live_ > 0 && error_.empty()) {
    if (!deferred_.empty() && (ready_.empty() || idle_ > ready_.size() || random_.below(deferred_odds_) == 0)) {
      try {
        run_deferred(random_.below(deferred_.size()));
      } catch (const std::exception& error) {
        error_ = error.what();
      }
      continue;
    }
    if (ready_.empty() || idle_ > 64 * ready_.size() + 1024) {
      error_ = "deadlock: no thread can go on:" + waiting();
      break;
    }
    if (++steps_ > config_.max_steps) {
      error_ = "step bound reached:" + waiting();
      break;
    }
    epoch_ += random_.below(256) == 0;
    const size_t index = pick();
    running_ = ready_[index];
    ready_[index] = ready_.back();
    ready_.pop_back();
    running_->fiber.resume_from(scheduler_);
    running_ = nullptr;
    dispatch();
  }
  g_machine = outer;
  if (!error_.empty()) {
    throw Error(error_ + " [schedule " + std::to_string(config_.seed) + "]");
  }
}

inline void Machine::dispatch() {
  const unsigned size = config_.cluster.count();
  while (next_cluster_ < cluster_count_ &&
         (config_.resident_ctas == 0 || resident_ + size <= config_.resident_ctas || live_ == 0)) {
    start_cluster(next_cluster_++);
  }
}

inline void Machine::start_cluster(unsigned number) {
  const Dim3 &grid = config_.grid, &size = config_.cluster, &block = config_.block;
  const Dim3 clusters{grid.x / size.x, grid.y / size.y, grid.z / size.z};
  const Dim3 at{number % clusters.x, number / clusters.x % clusters.y, number / clusters.x / clusters.y};
  clusters_.push_back(std::make_unique<Cluster>());
  Cluster& cluster = *clusters_.back();
  cluster.barrier.expected = static_cast<int>(size.count() * block.count());
  for (unsigned rank = 0; rank < size.count(); ++rank) {
    ctas_.push_back(std::make_unique<Cta>());
    Cta& cta = *ctas_.back();
    cta.rank = rank;
    cta.cluster = &cluster;
    cta.block_index = {at.x * size.x + rank % size.x, at.y * size.y + rank / size.x % size.y,
                       at.z * size.z + rank / size.x / size.y};
    cta.index = cta.block_index.x + grid.x * (cta.block_index.y + grid.y * cta.block_index.z);
    // Dynamic shared memory starts as nan, between canaries of nan, on a boundary that every swizzle likes.
    constexpr size_t kAlign = 1024;
    cta.shared_storage.resize(config_.shared_bytes + 4 * kAlign);
    for (size_t i = 0; i + 1 < cta.shared_storage.size(); i += 2) {
      std::memcpy(&cta.shared_storage[i], &kPoison, 2);
    }
    const auto base = reinterpret_cast<uintptr_t>(cta.shared_storage.data());
    cta.shared = reinterpret_cast<char*>((base + 2 * kAlign - 1) / kAlign * kAlign);
    cluster.ctas.push_back(&cta);
    cta.live = block.count();
    for (unsigned linear = 0; linear < block.count(); ++linear) {
      threads_.push_back(std::make_unique<Thread>());
      Thread& thread = *threads_.back();
      thread.cta = &cta;
      thread.linear = linear;
      thread.index = {linear % block.x, linear / block.x % block.y, linear / block.x / block.y};
      thread.stack = g_stacks.take();
      thread.fiber.prepare(thread.stack, entry);
      ready_.push_back(&thread);
    }
    live_ += block.count();
    ++resident_;
  }
}

inline void Machine::entry() {
  Machine& machine = *g_machine;
  Thread& thread = *machine.running_;
  try {
    machine.body_();
  } catch (const std::exception& error) {
    machine.error_ = error.what();
  }
  thread.done = true;
  --machine.live_;
  machine.note_progress();
  if (--thread.cta->live == 0 && machine.error_.empty()) {
    machine.check_exit(*thread.cta);
  }
  machine.leave();
  std::abort();
}

inline void Machine::check_exit(Cta& cta) {
  --resident_;
  if (cta.deferred > 0) {
    error_ = "CTA " + std::to_string(cta.index) + " exits while an asynchronous operation of it is under way:";
    for (const Deferred& each : deferred_) {
      error_ += each.cta == &cta ? std::string(" ") + each.what : "";
    }
  }
  const char* const begin = cta.shared_storage.data();
  const char* const end = begin + cta.shared_storage.size() / 2 * 2;
  for (const char* at = begin; at < end; ++at) {
    if (at == cta.shared) {
      at += config_.shared_bytes;
    }
    if (*at != reinterpret_cast<const char*>(&kPoison)[(at - begin) % 2]) {
      error_ = "CTA " + std::to_string(cta.index) + " wrote outside its shared memory, at offset " +
               std::to_string(at - cta.shared) + " of " + std::to_string(config_.shared_bytes) + " bytes";
      return;
    }
  }
}

// A schedule that favours some CTAs, warps or threads over others for a while finds what a fair one hardly ever does.
inline uint64_t Machine::rank(const Thread& thread) const {
  const uint64_t cta = thread.cta->index;
  const uint64_t warp = favour_ == Favour::kCta ? 0 : thread.warp() + 1;
  const uint64_t linear = favour_ == Favour::kThread ? thread.linear + 1 : 0;
  const uint64_t mixed = Random::mix(((epoch_ * 4096 + cta) * 64 + warp) * 2048 + linear + config_.seed);
  return thread.spinning ? mixed >> 1 : mixed | uint64_t{1} << 63;
}

inline size_t Machine::pick() {
  size_t best = random_.below(ready_.size());
  const bool fair = favour_ == Favour::kNone || idle_ > 0;
  const int samples = fair ? 1 : 8;
  for (int i = 0; i < samples; ++i) {
    const size_t other = random_.below(ready_.size());
    if (fair ? ready_[best]->spinning && !ready_[other]->spinning : rank(*ready_[other]) > rank(*ready_[best])) {
      best = other;
    }
  }
  return best;
}

inline void Machine::leave() {
  scheduler_.resume_from(running_->fiber);
  if (!error_.empty()) {
    std::abort();  // a launch that failed resumes nobody
  }
}

inline void Machine::preempt(const Site& site) {
  note_progress();
  if (random_.next() & 1) {
    running_->site = site;
    running_->spinning = false;
    ready_.push_back(running_);
    leave();
  }
}

inline void Machine::spin(const Site& site) {
  ++idle_;
  running_->site = site;
  running_->spinning = true;
  ready_.push_back(running_);
  leave();
  running_->spinning = false;
}

inline void Machine::park(std::vector<Thread*>& list, const Site& site) {
  note_progress();
  running_->site = site;
  running_->parked = true;
  list.push_back(running_);
  leave();
}

inline void Machine::wake(std::vector<Thread*>& list) {
  note_progress();
  for (Thread* thread : list) {
    thread->parked = thread->spinning = false;
    ready_.push_back(thread);
  }
  list.clear();
}

inline void Machine::fail(const std::string& text) {
  std::string where;
  if (running_) {
    where = "CTA " + std::to_string(running_->cta->index) + " thread " + std::to_string(running_->linear) + ": ";
  }
  // Caught by the thread's entry, or by whoever called run() where the scheduler itself runs a deferred action.
  throw Error(where + text);
}

inline void Machine::defer(const char* what, std::function<void()> action, const void* order) {
  Cta* cta = running_ ? running_->cta : nullptr;
  if (cta) {
    ++cta->deferred;
  }
  deferred_.push_back({what, std::move(action), order, cta});
}

inline void Machine::run_deferred(size_t index) {
  // Of those with an order, the oldest comes first.
  for (size_t i = 0; deferred_[index].order && i < index; ++i) {
    if (deferred_[i].order == deferred_[index].order) {
      index = i;
    }
  }
  Deferred chosen = std::move(deferred_[index]);
  deferred_.erase(deferred_.begin() + static_cast<std::ptrdiff_t>(index));
  if (chosen.cta) {
    --chosen.cta->deferred;
  }
  note_progress();
  chosen.action();
}

inline void Machine::finish_deferred(const void* order, size_t keep) {
  size_t count = 0;
  for (const Deferred& each : deferred_) {
    count += each.order == order;
  }
  for (size_t i = 0; count > keep; count -= 1, i = 0) {
    while (deferred_[i].order != order) {
      ++i;
    }
    run_deferred(i);
  }
}

inline std::string Machine::waiting() const {
  std::string text;
  const auto place = [](const Thread& thread) {
    if (thread.done) {
      return std::string("exited");
    }
    return (thread.site.what ? (thread.parked ? "waits at " : "is at ") + thread.site.text() : "has not started");
  };
  for (size_t first = 0, lines = 0; first < threads_.size() && lines < 40; ++lines) {
    size_t last = first;
    while (last + 1 < threads_.size() && threads_[last + 1]->cta == threads_[first]->cta &&
           place(*threads_[last + 1]) == place(*threads_[first])) {
      ++last;
    }
    text += "\n  CTA " + std::to_string(threads_[first]->cta->index) + " threads " +
            std::to_string(threads_[first]->linear) + " to " + std::to_string(threads_[last]->linear) + ": " +
            place(*threads_[first]);
    first = last + 1;
  }
  if (next_cluster_ < cluster_count_) {
    text += "\n  " + std::to_string(cluster_count_ - next_cluster_) + " clusters of " +
            std::to_string(config_.cluster.count()) + " CTAs have not been dispatched";
  }
  return text;
}

}  // namespace simt
