// A tile of an operand of wgmma as CuTe lays it out in shared memory.
#pragma once

#include <cute/tensor.hpp>

// Behind tensor.hpp, without which they do not compile.
#include <cute/atom/copy_traits_sm90_tma.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <string>
#include <type_traits>

namespace witness {

namespace gmma = cute::GMMA;

template <typename Element, int kWidth, bool kTransposed>
auto atom() {
  if constexpr (kTransposed) {
    return std::conditional_t<
        kWidth == 128, gmma::Layout_MN_SW128_Atom<Element>,
        std::conditional_t<kWidth == 64, gmma::Layout_MN_SW64_Atom<Element>, gmma::Layout_MN_SW32_Atom<Element>>>{};
  } else {
    return std::conditional_t<
        kWidth == 128, gmma::Layout_K_SW128_Atom<Element>,
        std::conditional_t<kWidth == 64, gmma::Layout_K_SW64_Atom<Element>, gmma::Layout_K_SW32_Atom<Element>>>{};
  }
}

// (kMn, kK) elements in lines of kWidth bytes, the swizzle's width: of k, or transposed of mn. Transposed lines make
// blocks of kWidth / 2 columns, one block after another.
template <int kMn_, int kK_, int kWidth_, bool kTransposed_>
struct Tile {
  static constexpr int kMn = kMn_, kK = kK_, kWidth = kWidth_;
  static constexpr bool kTransposed = kTransposed_;
  static constexpr int kLines = kTransposed ? kK : kMn, kColumns = kWidth / 2;
  static constexpr int kBlocks = kTransposed ? (kMn + kColumns - 1) / kColumns : 1;
  static_assert(kTransposed || kK == kColumns, "a line is a row of k");

  using Shape = cute::Shape<cute::Int<kMn>, cute::Int<kK>>;
  static constexpr auto kMajor = kTransposed ? gmma::Major::MN : gmma::Major::K;

  template <typename Element>
  static auto layout() {
    if constexpr (kTransposed) {
      return cute::tile_to_shape(atom<Element, kWidth, kTransposed>(), Shape{}, cute::Step<cute::_2, cute::_1>{});
    } else {
      return cute::tile_to_shape(atom<Element, kWidth, kTransposed>(), Shape{});
    }
  }

  static std::string name() {
    return std::to_string(kMn) + "x" + std::to_string(kK) + " " + std::to_string(kWidth) +
           (kTransposed ? " transposed" : "");
  }
};

}  // namespace witness
