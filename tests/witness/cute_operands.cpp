// How operands of wgmma lie in shared memory and its results in registers: this project's headers, and the emulator's
// twins of them, held against CuTe's layouts. Prints a line for each comparison, "same" or "differs" and what it was.
#include "cute_tile.h"

#include <cute/arch/mma_sm90.hpp>

// Behind CuTe's headers, which have no use for the emulator's threadIdx.
#include "simt.h"

#include <cxxabi.h>

#include <cstdio>
#include <cstdlib>

#include "adapter/forward_sm90.cuh"
#include "core/shared.cuh"
#include "lora/gemm_sm90.cuh"

using namespace peft_kernels;
using cute::Int;
using cute::Shape;
using lora::Direction;
using lora::GemmConfig;
using sm90::HalfType;
using witness::Tile;
using Element = cute::bfloat16_t;  // layouts depend on an element's width alone

void report(const std::string& what, int differences) {
  std::printf("%s %s\n", differences == 0 ? "same" : "differs", what.c_str());
}

// As the kernels compute it: where an operand's 16 columns of k number `step` begin.
template <typename Tile>
uint64_t descriptor(uint32_t start, int step) {
  constexpr uint32_t kAlong = Tile::kTransposed ? 16 * Tile::kWidth : 32;
  constexpr uint32_t kBlockBytes = Tile::kTransposed ? Tile::kLines * Tile::kWidth : 16;
  return sm90::operand_descriptor(start + kAlong * static_cast<uint32_t>(step), Tile::kWidth, kBlockBytes);
}

// The byte of each element, (mn, k) -> kK * mn + k, as CuTe places it.
template <typename Tile>
const std::vector<uint32_t>& addresses() {
  static const std::vector<uint32_t> all = [] {
    const auto placed = cute::as_position_independent_swizzle_layout(Tile::template layout<Element>());
    std::vector<uint32_t> bytes;
    for (int mn = 0; mn < Tile::kMn; ++mn) {
      for (int k = 0; k < Tile::kK; ++k) {
        bytes.push_back(2 * static_cast<uint32_t>(placed(mn, k)));
      }
    }
    return bytes;
  }();
  return all;
}

// Bits of the descriptors, all but the start address, which has no meaning on a host; and of that, how far it moves
// with k.
template <typename Tile>
int descriptor_differences() {
  const auto layout = Tile::template layout<Element>();
  const auto tensor = cute::make_tensor(cute::make_smem_ptr(static_cast<Element*>(nullptr)), layout);
  const auto plain = cute::get_nonswizzle_portion(layout);
  constexpr uint64_t kAddress = 0x3FFF;
  // Of a single block the leading offset leads nowhere, and CuTe leaves it zero.
  constexpr uint64_t kIgnored = kAddress | (Tile::kTransposed && Tile::kBlocks == 1 ? kAddress << 16 : 0);
  int differences = 0;
  for (int step = 0; step < Tile::kK / 16; ++step) {
    const auto slice = cute::local_tile(tensor, Shape<Int<Tile::kMn>, Int<16>>{}, cute::make_coord(0, step));
    const auto theirs = static_cast<uint64_t>(cute::SM90::GMMA::make_gmma_desc<Tile::kMajor>(slice));
    const uint64_t ours = descriptor<Tile>(0, step);
    differences += (ours & ~kIgnored) != (theirs & ~kIgnored);
    differences += (ours & kAddress) << 4 != 2 * static_cast<uint64_t>(plain(0, 16 * step));
  }
  return differences;
}

// Where the emulator's tensor cores read each element by our descriptor.
template <typename Tile>
int reading_differences() {
  int differences = 0;
  for (int mn = 0; mn < Tile::kMn; ++mn) {
    for (int k = 0; k < Tile::kK; ++k) {
      const sm90::Operand operand(descriptor<Tile>(0, k / 16));
      const uint32_t address = operand.at(static_cast<uint32_t>(mn), static_cast<uint32_t>(k % 16), !Tile::kTransposed);
      differences += address != addresses<Tile>()[static_cast<size_t>(mn * Tile::kK + k)];
    }
  }
  return differences;
}

// Where TMA puts each element, in boxes of `lines` lines each: as the emulator does, and by the kernels' swizzle.
template <typename Tile>
int box_differences(int lines) {
  constexpr int kColumns = Tile::kColumns;
  int differences = 0;
  for (int mn = 0; mn < Tile::kMn; ++mn) {
    for (int k = 0; k < Tile::kK; ++k) {
      const int line = Tile::kTransposed ? k : mn, column = Tile::kTransposed ? mn : k;
      const int block = column / kColumns * Tile::kLines * Tile::kWidth;
      const auto start = static_cast<uint32_t>(block + line / lines * lines * Tile::kWidth);
      const int offset = line % lines * Tile::kWidth + 2 * (column % kColumns);
      const uint32_t theirs = addresses<Tile>()[static_cast<size_t>(mn * Tile::kK + k)];
      differences += sm90::tma_address(start, offset, Tile::kWidth) != theirs;
      differences += sm90::swizzled(start + static_cast<uint32_t>(offset), Tile::kWidth) != theirs;
    }
  }
  return differences;
}

template <typename Tile>
void check_tile() {
  static bool done = false;
  if (std::exchange(done, true)) {
    return;
  }
  report("descriptors of " + Tile::name(), descriptor_differences<Tile>());
  report("elements of " + Tile::name(), reading_differences<Tile>());
  report("boxes of " + Tile::name(), box_differences<Tile>(Tile::kLines));
  report("half boxes of " + Tile::name(), box_differences<Tile>(Tile::kLines / 2));
}

constexpr int kThreads = 128;

// An operand's value, a small integer that depends on where it is.
float value_of(int mn, int k, int salt) {
  return static_cast<float>((5 * mn + 3 * k + salt) % 13 - 6);
}

template <typename Tile>
void fill(uint8_t* shared, int salt) {
  for (int mn = 0; mn < Tile::kMn; ++mn) {
    for (int k = 0; k < Tile::kK; ++k) {
      const Element value(value_of(mn, k, salt));
      std::memcpy(shared + addresses<Tile>()[static_cast<size_t>(mn * Tile::kK + k)], &value, 2);
    }
  }
}

// On a warpgroup of the emulator: body(shared memory).
template <typename Body>
void on_warpgroup(Body body) {
  simt::Config config;
  config.block.x = kThreads;
  config.shared_bytes = 128 * 1024;
  simt::launch(config, [&] { body(static_cast<uint8_t*>(shared_memory())); });
}

// What the lane that CuTe says holds it must have: x (64, kDepth) times the transpose of the operand's rows.
template <typename Layout>
int wrong_sums(Layout layout, const float* sums, int count, int depth) {
  int differences = 0;
  for (int i = 0; i < count; ++i) {
    const int at = layout(static_cast<int>(threadIdx.x), i), row = at % 64, col = at / 64;
    float expected = 0.0f;
    for (int k = 0; k < depth; ++k) {
      expected += value_of(row, k, 1) * value_of(col, k, 2);
    }
    differences += sums[i] != expected;
    differences += lora::row_of(i) != row || lora::col_of(i) != col;
    const adapter::Fragment at_first = adapter::fragment_of(static_cast<int>(threadIdx.x));
    differences += at_first.row + 8 * (i / 2 % 2) != row || at_first.col + 8 * (i / 4) + i % 2 != col;
  }
  return differences;
}

// The emulator's product of operands that lie as CuTe says, read where CuTe says the accumulators are.
template <typename Tile>
void check_product() {
  static bool done = false;
  if (std::exchange(done, true)) {
    return;
  }
  using namespace cute;
  constexpr int kN = Tile::kMn;
  using Rows = witness::Tile<64, 64, 128, false>;
  using Instruction =
      decltype(GMMA::ss_op_selector<Element, Element, float, Shape<_64, Int<kN>, _16>, GMMA::Major::K, Tile::kMajor>());
  static_assert(size<1>(typename MMA_Traits<Instruction>::Shape_MNK{}) == kN, "one instruction");
  int differences = 0;
  on_warpgroup([&](uint8_t* shared) {
    constexpr uint32_t kTileAt = 64 * 128;
    if (threadIdx.x == 0) {
      fill<Rows>(shared, 1);
      fill<Tile>(shared + kTileAt, 2);
    }
    __syncthreads();
    const uint32_t start = sm90::shared_address(shared);
    float sums[kN / 2];
    sm90::wgmma_fence();
    for (int step = 0; step < Tile::kK / 16; ++step) {
      sm90::wgmma<HalfType::kBf16, kN, Tile::kTransposed>(sums, descriptor<Rows>(start, step),
                                                          descriptor<Tile>(start + kTileAt, step), step > 0);
    }
    sm90::wgmma_commit();
    sm90::wgmma_wait<0>();
    differences += wrong_sums(typename MMA_Traits<Instruction>::CLayout{}, sums, kN / 2, Tile::kK);
  });
  report("accumulators of " + Tile::name(), differences);
}

// The same with x in registers.
template <int kN>
void check_product_from_registers() {
  using namespace cute;
  using Up = witness::Tile<kN, 64, 128, false>;
  using Instruction = decltype(GMMA::rs_op_selector<Element, Element, float, Shape<_64, Int<kN>, _16>, GMMA::Major::K,
                                                    GMMA::Major::K>());
  int differences = 0;
  on_warpgroup([&](uint8_t* shared) {
    if (threadIdx.x == 0) {
      fill<Up>(shared, 2);
    }
    __syncthreads();
    uint32_t words[4] = {};
    for (int i = 0; i < 8; ++i) {
      const int at = typename MMA_Traits<Instruction>::ALayout{}(static_cast<int>(threadIdx.x), i);
      const Element value(value_of(at % 64, at / 64, 1));
      std::memcpy(reinterpret_cast<uint8_t*>(words) + 2 * i, &value, 2);
      // Where load_hidden of the adapter takes it from.
      const adapter::Fragment first = adapter::fragment_of(static_cast<int>(threadIdx.x));
      differences += first.row + i / 2 % 2 * 8 != at % 64 || first.col + i / 4 * 8 + i % 2 != at / 64;
    }
    float sums[kN / 2];
    sm90::wgmma_fence();
    sm90::wgmma_registers<HalfType::kBf16>(sums, words, descriptor<Up>(sm90::shared_address(shared), 0), false);
    sm90::wgmma_commit();
    sm90::wgmma_wait<0>();
    differences += wrong_sums(typename MMA_Traits<Instruction>::CLayout{}, sums, kN / 2, 16);
  });
  report("operand in registers of 64x" + std::to_string(kN), differences);
}

// Tiles of W: those of the kernel, and as wide as others may take them.
template <int kN, bool kTransposed>
void check_w() {
  using W = Tile<kN, 64, 128, kTransposed>;
  check_tile<W>();
  check_product<W>();
}

template <typename Config>
void check_gemm() {
  constexpr bool kTransposed = Config::kTransposed;
  constexpr int kDownWidth = kTransposed ? Config::kRankLineBytes : Config::kLineBytes;
  constexpr int kUpWidth = kTransposed ? Config::kLineBytes : Config::kRankLineBytes;
  using Down = Tile<Config::kRank, Config::kBlockK, kDownWidth, kTransposed>;
  using Up = Tile<Config::kBlockN, Config::kRankChunk, kUpWidth, kTransposed>;
  using UpChunk = Tile<Config::kChunkN, Config::kRankChunk, kUpWidth, kTransposed>;
  check_tile<Tile<Config::kBlockM, Config::kBlockK, Config::kLineBytes, false>>();
  check_tile<Tile<Config::kConsumerRows, Config::kBlockK, Config::kLineBytes, false>>();
  check_w<Config::kBlockN, kTransposed>();
  check_tile<Down>();
  check_product<Down>();
  check_tile<Tile<Config::kConsumerRows, Config::kRankChunk, Config::kRankLineBytes, false>>();
  check_tile<Up>();
  check_product<Up>();
  check_tile<UpChunk>();
  check_product<UpChunk>();
  check_tile<Tile<Config::kConsumerRows, Config::kChunkN, Config::kLineBytes, false>>();  // y on its way out
  char* name = abi::__cxa_demangle(typeid(Config).name(), nullptr, nullptr, nullptr);
  std::printf("config %s\n", name);
  std::free(name);
}

// The tiles that the launcher chooses from.
template <HalfType kType, int kRank, Direction kDirection>
void check_gemm_widths() {
  constexpr int kWide = lora::gemm_wide(kRank, lora::gemm_folds(kType, kDirection, false), false);
  constexpr int kDropping = lora::gemm_wide(kRank, lora::gemm_folds(kType, kDirection, true), true);
  check_gemm<GemmConfig<kType, kRank, kDirection, kWide, false>>();
  check_gemm<GemmConfig<kType, kRank, kDirection, lora::kGemmNarrow, false>>();
  check_gemm<GemmConfig<kType, kRank, kDirection, kDropping, true>>();
}

template <int kRank>
void check_gemm_rank() {
  check_gemm_widths<HalfType::kBf16, kRank, Direction::kForward>();
  check_gemm_widths<HalfType::kFp16, kRank, Direction::kForward>();
  check_gemm_widths<HalfType::kBf16, kRank, Direction::kBackward>();
  check_gemm_widths<HalfType::kFp16, kRank, Direction::kBackward>();
}

template <int kRank>
void check_adapter() {
  using namespace adapter;
  check_tile<Tile<kBlockM, kBlockC, kRowBytes, false>>();
  check_tile<Tile<kRank, kBlockC, kRowBytes, false>>();
  check_product<Tile<kRank, kBlockC, kRowBytes, false>>();
  check_product<Tile<kBlockC, kBlockC, kRowBytes, false>>();
  // h, tiles of 64 columns beside each other.
  const auto hidden = cute::as_position_independent_swizzle_layout(
      cute::tile_to_shape(cute::GMMA::Layout_K_SW128_Atom<Element>{}, Shape<Int<kBlockM>, Int<kRank>>{}));
  int differences = 0;
  for (int row = 0; row < kBlockM; ++row) {
    for (int col = 0; col < kRank; ++col) {
      differences += tile_offset(row, col) != 2 * hidden(row, col);
    }
  }
  report("the adapter's hidden " + std::to_string(kBlockM) + "x" + std::to_string(kRank), differences);
  std::printf("config adapter %d\n", kRank);
}

int main(int argc, char** argv) {
  return simt::main_of(argc, argv, [](const simt::Arguments&) {
    check_gemm_rank<16>();
    check_gemm_rank<32>();
    check_gemm_rank<64>();
    check_gemm_rank<128>();
    check_adapter<64>();
    check_adapter<adapter::kMaxRank>();
    check_w<128, false>();
    check_w<128, true>();
    check_product_from_registers<16>();
    check_product_from_registers<32>();
    check_product_from_registers<64>();
    check_product_from_registers<128>();
    int differences = 0;
    for (uint32_t byte = 0; byte < 65536; ++byte) {
      differences += sm90::swizzled(byte, 128) != cute::Swizzle<3, 4, 3>::apply(byte);
      differences += sm90::swizzled(byte, 64) != cute::Swizzle<2, 4, 3>::apply(byte);
      differences += sm90::swizzled(byte, 32) != cute::Swizzle<1, 4, 3>::apply(byte);
    }
    report("swizzles", differences);
  });
}
