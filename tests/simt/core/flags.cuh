// Twin of csrc/core/flags.cuh: before a flag is written or read, any other thread may go first.
#pragma once

namespace peft_kernels {

inline void publish(uint64_t* flag, uint64_t nonce) {
  simt::preempt("publish");
  *flag = nonce;
  simt::preempt("publish");
}

inline bool is_published(const uint64_t* flag, uint64_t nonce) {
  simt::preempt("is_published");
  return *flag == nonce;
}

inline void wait_until_published(const uint64_t* flag, uint64_t nonce) {
  simt::block_until([&] { return *flag == nonce; }, "wait_until_published");
}

}  // namespace peft_kernels
