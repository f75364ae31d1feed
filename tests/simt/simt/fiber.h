// Stacks that one OS thread switches between: what the emulator's CUDA threads run on.
//
// Hand-rolled on x86-64, where swapcontext would make two system calls a switch; ucontext elsewhere, and where
// SIMT_UCONTEXT asks for it.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#if !defined(__x86_64__) && !defined(SIMT_UCONTEXT)
#define SIMT_UCONTEXT
#endif
#ifdef SIMT_UCONTEXT
#include <ucontext.h>
#endif

namespace simt {

constexpr size_t kStackBytes = 128 * 1024;  // reserved, not touched: a page is there when a thread writes to it

#ifndef SIMT_UCONTEXT

// Save the registers that a call preserves on the running stack, leave its pointer in *from, and go on at `to`.
__attribute__((naked, noipa)) inline void switch_stack(void** /*from*/, void* /*to*/) {
  asm volatile(
      "pushq %rbp\n\tpushq %rbx\n\tpushq %r12\n\tpushq %r13\n\tpushq %r14\n\tpushq %r15\n\t"
      "movq %rsp, (%rdi)\n\tmovq %rsi, %rsp\n\t"
      "popq %r15\n\tpopq %r14\n\tpopq %r13\n\tpopq %r12\n\tpopq %rbx\n\tpopq %rbp\n\tret");
}

class Fiber {
 public:
  // `entry` must never return.
  void prepare(void* stack, void (*entry)()) {
    auto* top = reinterpret_cast<uint64_t*>(static_cast<char*>(stack) + kStackBytes);
    *--top = 0;  // where entry would return to; it also leaves the stack aligned as at a function's first instruction
    *--top = reinterpret_cast<uint64_t>(entry);
    for (int i = 0; i < 6; ++i) {
      *--top = 0;
    }
    pointer_ = top;
  }
  void resume_from(Fiber& running) { switch_stack(&running.pointer_, pointer_); }

 private:
  void* pointer_ = nullptr;
};

#else

class Fiber {
 public:
  void prepare(void* stack, void (*entry)()) {
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack;
    context_.uc_stack.ss_size = kStackBytes;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
  }
  void resume_from(Fiber& running) { swapcontext(&running.context_, &context_); }

 private:
  ucontext_t context_;
};

#endif

// Stacks are reused by later launches of the program; their pages stay.
class StackPool {
 public:
  void* take() {
    if (free_.empty()) {
      void* stack =
          mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (stack == MAP_FAILED) {
        std::perror("simt: mmap of a stack");
        std::abort();
      }
      // The lowest page is a guard: a stack that overflows stops the program instead of writing into its neighbour.
      mprotect(stack, 4096, PROT_NONE);
      return stack;
    }
    void* stack = free_.back();
    free_.pop_back();
    return stack;
  }
  void give(void* stack) { free_.push_back(stack); }

 private:
  std::vector<void*> free_;
};

}  // namespace simt
