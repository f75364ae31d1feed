// What      dropout of the low-rank branch on a CPU
// Equation  out = factor D * x;  sum += factor D * product;  out = D          (D: recipe in dropout.h)
// Tensors   as in dropout_host.h: rows of any stride, elements of a row contiguous
// Bound     at AVX-512 the draws take about as long as a copy in cache; below it, they are what takes the time
// Refused   negative sizes, cols > 2^35, a threshold of more than 16 bits, types that DropParams does not pair
#include "lora/dropout_host.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "core/parallel.h"
#include "lora/dropout.h"
#include "lora/dropout_elements.h"

// Compilers that can give one function instructions which the rest of the file may not use.
#if defined(__x86_64__) && defined(__GNUC__)
#define PEFT_KERNELS_HAS_LEVELS 1
#if defined(__GNUC__) && !defined(__clang__)
// GCC 12's own header begins vectors with themselves where their content does not matter, and warns of it.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#else
#include <immintrin.h>
#endif
#else
#define PEFT_KERNELS_HAS_LEVELS 0
#endif

namespace peft_kernels::lora::host {

// Rows first ... last - 1 of each function, at one level.
struct Rows {
  void (*drop)(const DropParams& params, int64_t first, int64_t last);
  void (*add_dropped)(const AddDroppedParams& params, int64_t first, int64_t last);
  void (*keep)(const KeepParams& params, int64_t first, int64_t last);
};

namespace portable {
#define PEFT_KERNELS_TARGET
#define PEFT_KERNELS_LANES 0
#include "lora/dropout_rows.h"
#undef PEFT_KERNELS_TARGET
#undef PEFT_KERNELS_LANES
}  // namespace portable

#if PEFT_KERNELS_HAS_LEVELS

namespace avx2 {
#define PEFT_KERNELS_TARGET __attribute__((target("avx2")))
#define PEFT_KERNELS_LANES 4
using Lanes = __m256i;
PEFT_KERNELS_TARGET PEFT_KERNELS_INLINE Lanes all(uint64_t value) {
  return _mm256_set1_epi64x(static_cast<int64_t>(value));
}
PEFT_KERNELS_TARGET PEFT_KERNELS_INLINE Lanes multiplied(Lanes a, Lanes b) {
  return _mm256_mul_epu32(a, b);
}
PEFT_KERNELS_TARGET PEFT_KERNELS_INLINE Lanes upper(Lanes a) {
  return _mm256_srli_epi64(a, 32);
}
PEFT_KERNELS_TARGET PEFT_KERNELS_INLINE Lanes mixed(Lanes a, Lanes b, Lanes c) {
  return _mm256_xor_si256(_mm256_xor_si256(a, b), c);
}
PEFT_KERNELS_TARGET PEFT_KERNELS_INLINE Lanes joined(Lanes low, Lanes high) {
  return _mm256_blend_epi32(low, _mm256_slli_epi64(high, 32), 0xAA);
}
// `store` unpacks even lanes, then odd ones; this order of the groups makes that the order of memory.
PEFT_KERNELS_TARGET PEFT_KERNELS_INLINE Lanes groups_from(uint32_t first) {
  return _mm256_add_epi64(all(first), _mm256_set_epi64x(3, 1, 2, 0));
}
PEFT_KERNELS_TARGET PEFT_KERNELS_INLINE void store(uint16_t* to, Lanes first, Lanes second) {
  _mm256_store_si256(reinterpret_cast<Lanes*>(to), _mm256_unpacklo_epi64(first, second));
  _mm256_store_si256(reinterpret_cast<Lanes*>(to + 16), _mm256_unpackhi_epi64(first, second));
}
#include "lora/dropout_rows.h"
#undef PEFT_KERNELS_TARGET
#undef PEFT_KERNELS_LANES
}  // namespace avx2

namespace avx512 {
#ifdef __clang__
#define PEFT_KERNELS_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl")))
#else
#define PEFT_KERNELS_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")))
#endif
#define PEFT_KERNELS_LANES 8
using Lanes = __m512i;
PEFT_KERNELS_TARGET PEFT_KERNELS_INLINE Lanes all(uint64_t value) {
  return _mm512_set1_epi64(static_cast<int64_t>(value));
}
PEFT_KERNELS_TARGET PEFT_KERNELS_INLINE Lanes multiplied(Lanes a, Lanes b) {
  return _mm512_mul_epu32(a, b);
}
PEFT_KERNELS_TARGET PEFT_KERNELS_INLINE Lanes upper(Lanes a) {
  return _mm512_srli_epi64(a, 32);
}
PEFT_KERNELS_TARGET PEFT_KERNELS_INLINE Lanes mixed(Lanes a, Lanes b, Lanes c) {
  return _mm512_ternarylogic_epi64(a, b, c, 0x96);
}
PEFT_KERNELS_TARGET PEFT_KERNELS_INLINE Lanes joined(Lanes low, Lanes high) {
  return _mm512_mask_blend_epi32(0xAAAA, low, _mm512_slli_epi64(high, 32));
}
PEFT_KERNELS_TARGET PEFT_KERNELS_INLINE Lanes groups_from(uint32_t first) {
  return _mm512_add_epi64(all(first), _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0));
}
PEFT_KERNELS_TARGET PEFT_KERNELS_INLINE void store(uint16_t* to, Lanes first, Lanes second) {
  _mm512_store_si512(reinterpret_cast<Lanes*>(to), _mm512_unpacklo_epi64(first, second));
  _mm512_store_si512(reinterpret_cast<Lanes*>(to + 32), _mm512_unpackhi_epi64(first, second));
}
#include "lora/dropout_rows.h"
#undef PEFT_KERNELS_TARGET
#undef PEFT_KERNELS_LANES
}  // namespace avx512

#endif

namespace {

constexpr int64_t kLeastPerThread = 1 << 18;  // elements; fewer are not worth a thread's start

void check(const Mask& mask) {
  if (mask.first_row < 0 || mask.rows < 0 || mask.cols < 0) {
    throw std::invalid_argument("lora_linear: first_row, rows and cols must not be negative, got (" +
                                std::to_string(mask.first_row) + ", " + std::to_string(mask.rows) + ", " +
                                std::to_string(mask.cols) + ")");
  }
  if (mask.cols > int64_t{kDecisionsPerCall} << 32) {
    throw std::invalid_argument("lora_linear: cols must be at most 2^35, got " + std::to_string(mask.cols));
  }
  if (mask.threshold >= kDropoutLevels) {
    throw std::invalid_argument("lora_linear: threshold must be below 65536, got " + std::to_string(mask.threshold));
  }
  if (!has_level(mask.level)) {
    throw std::invalid_argument("lora_linear: this processor or this build has not the instructions of that level");
  }
}

// Refuse types that do not go with each other.
void check_pair(Element dtype, Element other) {
  const bool is_half = dtype == Element::kBfloat16 || dtype == Element::kFloat16;
  if (dtype != other && !(is_half && other == Element::kFloat32)) {
    throw std::invalid_argument("lora_linear: the other dtype must be the same, or float32 beside half precision");
  }
}

const Rows& rows_at(Level level) {
#if PEFT_KERNELS_HAS_LEVELS
  switch (level) {
    case Level::kPortable:
      return portable::kRows;
    case Level::kAvx2:
      return avx2::kRows;
    case Level::kAvx512:
      return avx512::kRows;
  }
#endif
  (void)level;
  return portable::kRows;
}

template <typename Params>
void run(const Params& params, void (*rows)(const Params&, int64_t, int64_t)) {
  const Mask& mask = params.mask;
  if (mask.rows == 0 || mask.cols == 0) {
    return;
  }
  const int64_t worth = std::max<int64_t>(1, mask.rows * mask.cols / kLeastPerThread);
  for_ranges(mask.rows, std::min<int64_t>(mask.threads, worth),
             [&](int64_t first, int64_t last) { rows(params, first, last); });
}

}  // namespace

bool has_level(Level level) {
#if PEFT_KERNELS_HAS_LEVELS
  switch (level) {
    case Level::kPortable:
      return true;
    case Level::kAvx2:
      return __builtin_cpu_supports("avx2") != 0;
    case Level::kAvx512:
      return __builtin_cpu_supports("avx512f") != 0 && __builtin_cpu_supports("avx512bw") != 0 &&
             __builtin_cpu_supports("avx512dq") != 0 && __builtin_cpu_supports("avx512vl") != 0;
  }
#endif
  return level == Level::kPortable;
}

void drop(const DropParams& params) {
  check(params.mask);
  check_pair(params.dtype, params.out_dtype);
  run(params, rows_at(params.mask.level).drop);
}

void add_dropped(const AddDroppedParams& params) {
  check(params.mask);
  check_pair(params.dtype, params.product_dtype);
  run(params, rows_at(params.mask.level).add_dropped);
}

void keep(const KeepParams& params) {
  check(params.mask);
  run(params, rows_at(params.mask.level).keep);
}

}  // namespace peft_kernels::lora::host
