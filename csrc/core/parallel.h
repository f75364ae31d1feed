// Ranges of a loop on several threads of the host. Plain C++.
#pragma once

#include <algorithm>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

namespace peft_kernels {

// Call run(first, last) for ranges that make up 0 ... count, on at most `threads` threads, this one among them. Ranges
// are multiples of nothing: what is computed must not depend on where they begin. `run` must not throw.
template <typename Run>
void for_ranges(int64_t count, int64_t threads, const Run& run) {
  const int64_t parts = std::max<int64_t>(1, std::min(threads, count));
  const auto part = [&](int64_t i) { run(count * i / parts, count * (i + 1) / parts); };
  std::vector<std::thread> others;
  others.reserve(static_cast<size_t>(parts - 1));
  int64_t started = 1;
  try {
    for (; started < parts; ++started) {
      others.emplace_back(part, started);
    }
  } catch (const std::system_error&) {
    // The system has no thread left: this one does what nobody has begun.
  }
  part(0);
  for (int64_t i = started; i < parts; ++i) {
    part(i);
  }
  for (std::thread& other : others) {
    other.join();
  }
}

}  // namespace peft_kernels
