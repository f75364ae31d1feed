// Twin of csrc/core/sm80/matrix.cuh.
#pragma once

namespace peft_kernels {
namespace twin {

inline void load_four(uint32_t (&words)[4], const void* shared, bool transposed, const simt::Site& site) {
  simt::shared_address(shared);  // refuses what lies elsewhere
  if (reinterpret_cast<uintptr_t>(shared) % 16 != 0) {
    simt::fail("a row of a matrix off its 16-byte boundary");
  }
  const auto rows = simt::gather(static_cast<const uint16_t*>(shared), simt::kWarpSize, 0xFFFFFFFFu, site);
  const unsigned g = simt::self().lane() / 4, t = simt::self().lane() % 4;
  for (unsigned j = 0; j < 4; ++j) {
    const auto element = [&](unsigned pair) -> uint32_t {
      return transposed ? rows[8 * j + 2 * t + pair][g] : rows[8 * j + g][2 * t + pair];
    };
    words[j] = element(0) | element(1) << 16;
  }
}

}  // namespace twin

inline void load_matrices(uint32_t (&words)[4], const void* shared, SIMT_CALLER) {
  twin::load_four(words, shared, false, SIMT_SITE("load_matrices"));
}

inline void load_matrices_transposed(uint32_t (&words)[4], const void* shared, SIMT_CALLER) {
  twin::load_four(words, shared, true, SIMT_SITE("load_matrices_transposed"));
}

}  // namespace peft_kernels
