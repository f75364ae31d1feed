// Elements of the host's dropout in the type that its arithmetic has, and back. Plain C++, each function one that a
// loop over elements can be vectorised with: no branch, no table.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__GNUC__)
#define PEFT_KERNELS_INLINE inline __attribute__((always_inline))
#else
#define PEFT_KERNELS_INLINE inline
#endif

namespace peft_kernels::lora::host {

struct Bfloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <typename To, typename From>
PEFT_KERNELS_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// The type in which values of T are multiplied and added.
template <typename T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

PEFT_KERNELS_INLINE float widen(float value) {
  return value;
}
PEFT_KERNELS_INLINE double widen(double value) {
  return value;
}
PEFT_KERNELS_INLINE float widen(Bfloat16 value) {
  return bit_cast<float>(static_cast<uint32_t>(value.bits) << 16);
}
PEFT_KERNELS_INLINE float widen(Float16 value) {
  constexpr uint32_t kRebias = (127 - 15) << 23;
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(value.bits & 0x7FFFu) << 13;
  const uint32_t exponent = magnitude & 0x0F800000u;
  const uint32_t normal = magnitude + kRebias;
  // inf and nan need a float's largest exponent; of a subnormal number, one exponent more and 2^-14 less is exact, and
  // no step of it is subnormal in float, which a processor may be told to flush.
  const uint32_t special = normal + kRebias;
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(normal + (1u << 23)) - 0x1p-14f);
  const uint32_t bits = exponent == 0x0F800000u ? special : exponent == 0 ? subnormal : normal;
  return bit_cast<float>(bits | sign);
}

// Rounded to nearest, ties to even.
template <typename T>
PEFT_KERNELS_INLINE T narrow(Wide<T> value);

template <>
PEFT_KERNELS_INLINE float narrow<float>(float value) {
  return value;
}
template <>
PEFT_KERNELS_INLINE double narrow<double>(double value) {
  return value;
}
template <>
PEFT_KERNELS_INLINE Bfloat16 narrow<Bfloat16>(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  return {static_cast<uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded)};
}
template <>
PEFT_KERNELS_INLINE Float16 narrow<Float16>(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint32_t sign = bits & 0x80000000u, magnitude = bits ^ sign;
  // The last bit of a subnormal half is 2^-24, and that of a float in [0.5, 1) too: the sum with 0.5 rounds to it.
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - bit_cast<uint32_t>(0.5f);
  const uint32_t normal = (magnitude - ((127u - 15u) << 23) + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t infinite_or_nan = magnitude > 0x7F800000u ? 0x7E00u : 0x7C00u;
  // From 65520 on a value rounds to inf, which `normal` would reach by its carry, but not beyond.
  const uint32_t rounded = magnitude >= 0x47800000u ? infinite_or_nan : magnitude < 0x38800000u ? subnormal : normal;
  return {static_cast<uint16_t>(rounded | (sign >> 16))};
}

// The value where it is kept, else zero.
template <typename T>
PEFT_KERNELS_INLINE T selected(bool kept, T value) {
  return kept ? value : T{0};
}
template <>
PEFT_KERNELS_INLINE Bfloat16 selected(bool kept, Bfloat16 value) {
  return {static_cast<uint16_t>(kept ? value.bits : 0)};
}
template <>
PEFT_KERNELS_INLINE Float16 selected(bool kept, Float16 value) {
  return {static_cast<uint16_t>(kept ? value.bits : 0)};
}

}  // namespace peft_kernels::lora::host
