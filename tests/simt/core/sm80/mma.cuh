// Twin of csrc/core/sm80/mma.cuh: products are exact, each accumulator is rounded to float32 once an instruction.
#pragma once

namespace peft_kernels {
namespace twin {

struct Operands {
  uint32_t a[4], b[2];
};

template <typename T>
double half_of(uint32_t word, int half) {
  const auto bits = static_cast<uint16_t>(word >> (16 * half));
  T value;
  std::memcpy(&value, &bits, sizeof(bits));
  return static_cast<double>(static_cast<float>(value));
}

// `per_word` elements lie in a word, of which `element` gives one as a double. Words 0 and 1 of a are rows g and g + 8
// of the first half of k, words 2 and 3 of the second; word 0 of b is the first half, word 1 the second.
template <typename Element>
void multiply(float (&acc)[4],
              const uint32_t (&a)[4],
              const uint32_t (&b)[2],
              int per_word,
              Element element,
              const simt::Site& site) {
  Operands own;
  std::copy(a, a + 4, own.a);
  std::copy(b, b + 2, own.b);
  const auto all = simt::gather(own, simt::kWarpSize, 0xFFFFFFFFu, site);
  const unsigned g = simt::self().lane() / 4, t = simt::self().lane() % 4;
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned row = i / 2, column = 2 * t + i % 2;
    double sum = acc[i];
    for (unsigned k = 0; k < 4; ++k) {
      const Operands left = all[4 * g + k], right = all[4 * column + k];
      for (unsigned half = 0; half < 2; ++half) {
        for (int e = 0; e < per_word; ++e) {
          sum += element(left.a[2 * half + row], e) * element(right.b[half], e);
        }
      }
    }
    acc[i] = static_cast<float>(sum);
  }
}

}  // namespace twin

template <typename T>
void mma_16x8x16(float (&acc)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], SIMT_CALLER) {
  twin::multiply(acc, a, b, 2, twin::half_of<T>, SIMT_SITE("mma_16x8x16"));
}

inline void mma_16x8x8_tf32(float (&acc)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], SIMT_CALLER) {
  const auto upper_bits = [](uint32_t word, int) { return static_cast<double>(__uint_as_float(word & 0xFFFFE000u)); };
  twin::multiply(acc, a, b, 1, upper_bits, SIMT_SITE("mma_16x8x8_tf32"));
}

}  // namespace peft_kernels
