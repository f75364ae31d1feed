// Twin of csrc/core/sm80/async_copy.cuh: a group's copies are done at a random step after it has ended.
#pragma once

#include <functional>
#include <vector>

namespace peft_kernels {
namespace twin {

// A thread's copies that are in no group yet; its address names the thread's groups.
struct Copies {
  std::vector<std::function<void()>> open;
};

inline void copy(void* shared, const void* global, int bytes, int size) {
  simt::shared_address(shared);  // refuses what lies elsewhere
  if (bytes < 0 || bytes > size) {
    simt::fail("a copy of " + std::to_string(bytes) + " of " + std::to_string(size) + " bytes");
  }
  const auto misaligned = [&](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % size != 0; };
  if (misaligned(shared) || misaligned(global)) {
    simt::fail("a copy of " + std::to_string(size) + " bytes off its boundary");
  }
  simt::self().state<Copies>().open.push_back([=] {
    std::memcpy(shared, global, static_cast<size_t>(bytes));
    std::memset(static_cast<char*>(shared) + bytes, 0, static_cast<size_t>(size - bytes));
  });
}

}  // namespace twin

inline void copy_async_16(void* shared, const void* global, int bytes) {
  twin::copy(shared, global, bytes, 16);
}

inline void copy_async_4(void* shared, const void* global, int bytes) {
  twin::copy(shared, global, bytes, 4);
}

inline void end_copies() {
  auto& copies = simt::self().state<twin::Copies>();
  simt::defer(
      "cp.async",
      [group = std::move(copies.open)] {
        for (const auto& copy : group) {
          copy();
        }
      },
      &copies);
  copies.open.clear();
  simt::preempt("end_copies");
}

template <int kLeft>
void wait_for_copies() {
  simt::preempt("wait_for_copies");
  simt::finish_deferred(&simt::self().state<twin::Copies>(), kLeft);
}

}  // namespace peft_kernels
