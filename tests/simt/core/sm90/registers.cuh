// Twin of csrc/core/sm90/registers.cuh: nobody gets registers that nobody gave back.
#pragma once

#include "core/sm90/arch.cuh"

namespace peft_kernels::sm90 {

// Registers of a CTA's pool; a thread enters with an even share of the multiprocessor's 65536, a multiple of 8.
struct RegisterPool {
  int free = 0;
};

inline int registers_at_entry() {
  return static_cast<int>(65536 / simt::g_machine->config().block.count() / 8 * 8);
}

template <int kCount>
void release_registers(SIMT_CALLER) {
  simt::gather(kCount, 128, 0xFFFFFFFFu, SIMT_SITE("setmaxnreg.dec"));
  if (kCount > registers_at_entry()) {
    simt::fail("setmaxnreg.dec to more registers than the thread has");
  }
  simt::self().cta->state<RegisterPool>().free += registers_at_entry() - kCount;
}

template <int kCount>
void acquire_registers(SIMT_CALLER) {
  simt::gather(kCount, 128, 0xFFFFFFFFu, SIMT_SITE("setmaxnreg.inc"));
  const int wanted = kCount - registers_at_entry();
  if (wanted < 0) {
    simt::fail("setmaxnreg.inc to fewer registers than the thread has");
  }
  auto& pool = simt::self().cta->state<RegisterPool>();
  simt::block_until([&] { return pool.free >= wanted; }, "setmaxnreg.inc", file, line);
  pool.free -= wanted;
}

}  // namespace peft_kernels::sm90
