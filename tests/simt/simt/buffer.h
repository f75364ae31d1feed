// Global memory whose ends are guarded: pages that trap before and after it, canaries in what is left of its own pages.
#pragma once

#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstring>
#include <string>

#include "simt/machine.h"

namespace simt {

class Buffer {
 public:
  // `offset` moves the base off its 16-byte boundary.
  Buffer(std::string name, size_t bytes, size_t offset = 0) : name_(std::move(name)), bytes_(bytes) {
    const size_t used = (bytes + offset + 15) / 16 * 16;
    mapped_ = (used + kPage - 1) / kPage * kPage + 3 * kPage;  // a guard, a page of canary, the data, a guard
    void* base = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED) {
      throw Error("mmap of " + name_ + " failed");
    }
    base_ = static_cast<char*>(base);
    mprotect(base_, kPage, PROT_NONE);
    mprotect(base_ + mapped_ - kPage, kPage, PROT_NONE);
    // The data ends where the guard begins, or less than 16 bytes before.
    data_ = base_ + mapped_ - kPage - used + offset;
    fill(base_ + kPage, base_ + mapped_ - kPage);
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  Buffer(Buffer&& other) noexcept { *this = std::move(other); }
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(name_, other.name_);
    std::swap(bytes_, other.bytes_);
    std::swap(mapped_, other.mapped_);
    std::swap(base_, other.base_);
    std::swap(data_, other.data_);
    return *this;
  }
  ~Buffer() {
    if (base_) {
      munmap(base_, mapped_);
    }
  }

  template <typename T = void>
  T* data() const {
    return bytes_ ? reinterpret_cast<T*>(data_) : nullptr;
  }
  size_t bytes() const { return bytes_; }
  const std::string& name() const { return name_; }

  // Every byte becomes part of a nan.
  void poison() { fill(data_, data_ + bytes_); }

  void check() const {
    check(base_ + kPage, data_, "before");
    check(data_ + bytes_, base_ + mapped_ - kPage, "behind");
  }

 private:
  static constexpr size_t kPage = 4096;

  static char canary(const char* at) {
    return reinterpret_cast<const char*>(&kPoison)[reinterpret_cast<uintptr_t>(at) % 2];
  }
  static void fill(char* from, char* to) {
    for (; from < to; ++from) {
      *from = canary(from);
    }
  }
  void check(const char* from, const char* to, const char* side) const {
    for (; from < to; ++from) {
      if (*from != canary(from)) {
        throw Error("a write " + std::string(side) + " " + name_ + ", at byte " + std::to_string(from - data_) +
                    " of " + std::to_string(bytes_));
      }
    }
  }

  std::string name_;
  size_t bytes_ = 0;
  size_t mapped_ = 0;
  char* base_ = nullptr;
  char* data_ = nullptr;
};

// Say which thread it was that touched a guard, and end the program.
inline void report_traps() {
  static char stack[64 * 1024];
  stack_t alternate = {};
  alternate.ss_sp = stack;
  alternate.ss_size = sizeof(stack);
  sigaltstack(&alternate, nullptr);
  struct sigaction action = {};
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  action.sa_sigaction = [](int, siginfo_t*, void*) {
    std::string text = "simt: an access outside every buffer (or of a null pointer)";
    if (g_machine && g_machine->self()) {
      const Thread& thread = *g_machine->self();
      text += " by CTA " + std::to_string(thread.cta->index) + " thread " + std::to_string(thread.linear);
      text += thread.site.what ? ", after " + thread.site.text() : "";
    }
    text += "\n";
    if (write(2, text.data(), text.size()) < 0) {
      _exit(4);
    }
    _exit(3);
  };
  sigaction(SIGSEGV, &action, nullptr);
  sigaction(SIGBUS, &action, nullptr);
}

}  // namespace simt
