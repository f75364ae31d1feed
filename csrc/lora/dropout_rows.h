// Loops of the host's dropout over rows. No header: dropout_host.cpp includes it once for each level of instructions,
// in a namespace of that level, with
//
//   PEFT_KERNELS_TARGET   the attribute that lets the compiler use them
//   PEFT_KERNELS_LANES    calls of Philox in a vector, and before it Lanes and its functions; or 0: plain C++
//
// A lambda would not inherit the attribute, and a function of another level may not be inlined: hence only templates.
//
// What comes out is kRows, the functions of the level.

constexpr int kBlockGroups = 64;  // what is drawn at a time: 1 KB on the stack
constexpr int kBlock = kBlockGroups * kDecisionsPerCall;

#if PEFT_KERNELS_LANES > 0

// As `draw`, for all groups of a block. A product of 32-bit words fills 64 bits and reads their lower halves alone, so
// the words stay in 64-bit lanes whose upper halves are nobody's.
PEFT_KERNELS_TARGET PEFT_KERNELS_INLINE void draw_block(
    int64_t seed, int64_t row, uint32_t first, uint32_t lane, uint16_t* halves) {
  const uint64_t key = static_cast<uint64_t>(seed), index = static_cast<uint64_t>(row);
  const Lanes multiplier_0 = all(kMultiplier0), multiplier_1 = all(kMultiplier1);
  for (int i = 0; i < kBlockGroups; i += PEFT_KERNELS_LANES) {
    Lanes c0 = groups_from(first + static_cast<uint32_t>(i)), c1 = all(index), c2 = all(index >> 32), c3 = all(lane);
    uint32_t key_0 = static_cast<uint32_t>(key), key_1 = static_cast<uint32_t>(key >> 32);
    for (int round = 0; round < kPhiloxRounds; ++round) {
      const Lanes product_0 = multiplied(c0, multiplier_0), product_1 = multiplied(c2, multiplier_1);
      c0 = mixed(upper(product_1), c1, all(key_0));
      c2 = mixed(upper(product_0), c3, all(key_1));
      c1 = product_1;
      c3 = product_0;
      key_0 += kWeyl0;
      key_1 += kWeyl1;
    }
    store(halves + i * kDecisionsPerCall, joined(c0, c1), joined(c2, c3));
  }
}

#else

PEFT_KERNELS_TARGET PEFT_KERNELS_INLINE void draw_block(
    int64_t seed, int64_t row, uint32_t first, uint32_t lane, uint16_t* halves) {
  for (int i = 0; i < kBlockGroups; ++i) {
    const Words words = draw(seed, row, first + static_cast<uint32_t>(i), lane);
    for (int j = 0; j < kDecisionsPerCall; ++j) {
      halves[i * kDecisionsPerCall + j] = static_cast<uint16_t>(words.word[j / 2] >> (16 * (j % 2)));
    }
  }
}

#endif

// What is done with `count` columns of a row and their draws: `row` is the same with its pointers at a row's first
// element.

template <typename In, typename Out>
struct Drop {
  const In* x;
  Out* out;
  int64_t x_stride, out_stride;
  Wide<Out> factor;

  PEFT_KERNELS_TARGET PEFT_KERNELS_INLINE Drop row(int64_t row) const {
    return {x + row * x_stride, out + row * out_stride, x_stride, out_stride, factor};
  }

  PEFT_KERNELS_TARGET PEFT_KERNELS_INLINE void columns(const uint16_t* halves,
                                                       uint32_t threshold,
                                                       int64_t first,
                                                       int count) const {
    const In* from = x + first;
    Out* to = out + first;
    for (int i = 0; i < count; ++i) {
      to[i] = selected(halves[i] >= threshold, narrow<Out>(static_cast<Wide<Out>>(widen(from[i])) * factor));
    }
  }
};

// The factor is 1: no value is computed with, and a nan keeps its bits.
template <typename Bits>
struct Select {
  const Bits* x;
  Bits* out;
  int64_t x_stride, out_stride;

  PEFT_KERNELS_TARGET PEFT_KERNELS_INLINE Select row(int64_t row) const {
    return {x + row * x_stride, out + row * out_stride, x_stride, out_stride};
  }

  PEFT_KERNELS_TARGET PEFT_KERNELS_INLINE void columns(const uint16_t* halves,
                                                       uint32_t threshold,
                                                       int64_t first,
                                                       int count) const {
    const Bits* from = x + first;
    Bits* to = out + first;
    for (int i = 0; i < count; ++i) {
      to[i] = selected(halves[i] >= threshold, from[i]);
    }
  }
};

template <typename Sum, typename Product>
struct AddDropped {
  Sum* sum;
  const Product* product;
  int64_t sum_stride, product_stride;
  Wide<Sum> factor;

  PEFT_KERNELS_TARGET PEFT_KERNELS_INLINE AddDropped row(int64_t row) const {
    return {sum + row * sum_stride, product + row * product_stride, sum_stride, product_stride, factor};
  }

  PEFT_KERNELS_TARGET PEFT_KERNELS_INLINE void columns(const uint16_t* halves,
                                                       uint32_t threshold,
                                                       int64_t first,
                                                       int count) const {
    Sum* to = sum + first;
    const Product* from = product + first;
    for (int i = 0; i < count; ++i) {
      const Wide<Sum> value = static_cast<Wide<Sum>>(widen(from[i])) * factor;
      to[i] = narrow<Sum>(widen(to[i]) + selected(halves[i] >= threshold, value));
    }
  }
};

struct Keep {
  uint8_t* out;
  int64_t cols;

  PEFT_KERNELS_TARGET PEFT_KERNELS_INLINE Keep row(int64_t row) const { return {out + row * cols, cols}; }

  PEFT_KERNELS_TARGET PEFT_KERNELS_INLINE void columns(const uint16_t* halves,
                                                       uint32_t threshold,
                                                       int64_t first,
                                                       int count) const {
    uint8_t* to = out + first;
    for (int i = 0; i < count; ++i) {
      to[i] = halves[i] >= threshold;
    }
  }
};

// Rows first ... last - 1 of the mask. The draws past a row's end are made and not used; a threshold that every draw
// reaches needs none, and no seed.
template <typename ActionOf>
PEFT_KERNELS_TARGET void walk(const Mask& mask, int64_t first, int64_t last, const ActionOf& action_of) {
  alignas(64) uint16_t halves[kBlock] = {};
  for (int64_t row = first; row < last; ++row) {
    const auto action = action_of.row(row);
    for (int64_t col = 0; col < mask.cols; col += kBlock) {
      if (mask.threshold > 0) {
        const uint32_t group = static_cast<uint32_t>(col / kDecisionsPerCall);
        draw_block(*mask.seed, mask.first_row + row, group, mask.lane, halves);
      }
      if (mask.cols - col >= kBlock) {
        action.columns(halves, mask.threshold, col, kBlock);
      } else {
        action.columns(halves, mask.threshold, col, static_cast<int>(mask.cols - col));
      }
    }
  }
}

PEFT_KERNELS_TARGET void keep_rows(const KeepParams& params, int64_t first, int64_t last) {
  walk(params.mask, first, last, Keep{params.out, params.mask.cols});
}

template <typename Bits>
PEFT_KERNELS_TARGET void select(const DropParams& params, int64_t first, int64_t last) {
  const Select<Bits> all_rows{static_cast<const Bits*>(params.x), static_cast<Bits*>(params.out), params.x_stride,
                              params.out_stride};
  walk(params.mask, first, last, all_rows);
}

template <typename In, typename Out>
PEFT_KERNELS_TARGET void drop(const DropParams& params, int64_t first, int64_t last) {
  const Drop<In, Out> all_rows{static_cast<const In*>(params.x), static_cast<Out*>(params.out), params.x_stride,
                               params.out_stride, static_cast<Wide<Out>>(params.factor)};
  walk(params.mask, first, last, all_rows);
}

template <typename Sum, typename Product>
PEFT_KERNELS_TARGET void add_dropped(const AddDroppedParams& params, int64_t first, int64_t last) {
  const AddDropped<Sum, Product> all_rows{static_cast<Sum*>(params.sum), static_cast<const Product*>(params.product),
                                          params.sum_stride, params.product_stride,
                                          static_cast<Wide<Sum>>(params.factor)};
  walk(params.mask, first, last, all_rows);
}

void drop_rows(const DropParams& params, int64_t first, int64_t last) {
  const bool same = params.dtype == params.out_dtype;
  if (same && params.factor == 1.0) {
    switch (params.dtype) {
      case Element::kBfloat16:
      case Element::kFloat16:
        return select<uint16_t>(params, first, last);
      case Element::kFloat32:
        return select<uint32_t>(params, first, last);
      case Element::kFloat64:
        return select<uint64_t>(params, first, last);
    }
  }
  switch (params.dtype) {
    case Element::kBfloat16:
      return same ? drop<Bfloat16, Bfloat16>(params, first, last) : drop<Bfloat16, float>(params, first, last);
    case Element::kFloat16:
      return same ? drop<Float16, Float16>(params, first, last) : drop<Float16, float>(params, first, last);
    case Element::kFloat32:
      return drop<float, float>(params, first, last);
    case Element::kFloat64:
      return drop<double, double>(params, first, last);
  }
}

void add_dropped_rows(const AddDroppedParams& params, int64_t first, int64_t last) {
  const bool same = params.dtype == params.product_dtype;
  switch (params.dtype) {
    case Element::kBfloat16:
      return same ? add_dropped<Bfloat16, Bfloat16>(params, first, last)
                  : add_dropped<Bfloat16, float>(params, first, last);
    case Element::kFloat16:
      return same ? add_dropped<Float16, Float16>(params, first, last)
                  : add_dropped<Float16, float>(params, first, last);
    case Element::kFloat32:
      return add_dropped<float, float>(params, first, last);
    case Element::kFloat64:
      return add_dropped<double, double>(params, first, last);
  }
}

constexpr Rows kRows{drop_rows, add_dropped_rows, keep_rows};
