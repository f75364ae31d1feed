"""The twins of core/sm90, held against what the PTX ISA says and against each other."""

from __future__ import annotations

import pytest
import torch

from tests.simt import build

pytestmark = pytest.mark.cpu_only

# Layouts that the PTX ISA 9.0 spells out, "Canonical Layouts": where elements lie before the swizzle, as its shapes and
# strides say, and the offsets that the descriptor then holds. All of bf16 with N- (or M-) major rows.
EXAMPLES = {
    32: {"shape": (8, 2, 2), "strides": (1, 8, 128), "k": (16, 256), "leading": 256, "stride": 512},
    64: {"shape": (8, 4, 2), "strides": (1, 8, 256), "k": (32, 512), "leading": 512, "stride": 1024},
}

ADDRESSES = r"""
#include "core/sm90/wgmma.cuh"

using namespace peft_kernels::sm90;

int main(int argc, char** argv) {
  return simt::main_of(argc, argv, [](const simt::Arguments& arguments) {
    const auto number = [&](const char* name) { return static_cast<uint64_t>(arguments.integer(name)); };
    const uint64_t mode = number("width") == 128 ? 1 : number("width") == 64 ? 2 : 3;
    const Operand operand(number("leading") >> 4 << 16 | number("stride") >> 4 << 32 | mode << 62);
    simt::Buffer addresses("addresses", 4 * 64 * 16);
    for (uint32_t mn = 0; mn < number("mn"); ++mn) {
      for (uint32_t k = 0; k < 16; ++k) {
        addresses.data<uint32_t>()[mn * 16 + k] = operand.at(mn, k, arguments.integer("k_major") != 0);
      }
    }
    arguments.write(addresses);
  });
}
"""


def _addresses(width: int, leading: int, stride: int, mn: int, k_major: bool) -> list[list[int]]:
    got = build.run(
        build.build(ADDRESSES),
        outputs={"addresses": ((64, 16), torch.int32)},
        width=width,
        leading=leading,
        stride=stride,
        mn=mn,
        k_major=int(k_major),
    )
    return got["addresses"][:mn].tolist()


def _swizzle(address: int, width: int) -> int:
    """Swizzle<log2(width / 16), 4, 3> on byte addresses."""
    bits = {32: 1, 64: 2, 128: 3}[width]
    return address ^ (address >> 3 & ((1 << bits) - 1) << 4)


@pytest.mark.parametrize("width", EXAMPLES)
def test_documented_layouts_of_transposed_operands(width: int) -> None:
    example = EXAMPLES[width]
    (t, units, blocks), strides, (row, group) = example["shape"], example["strides"], example["k"]
    got = _addresses(width, example["leading"], example["stride"], t * units * blocks, k_major=False)
    for mn, line in enumerate(got):
        for k, address in enumerate(line):
            where = (mn % t, mn // t % units, mn // t // units)
            element = sum(i * stride for i, stride in zip(where, strides, strict=True)) + k % 8 * row + k // 8 * group
            assert address == _swizzle(2 * element, width)


@pytest.mark.parametrize("width", [32, 64, 128])
def test_documented_layout_of_rows_of_k(width: int) -> None:
    """((8, m), (T, 2k)) : ((width / 16 T, SBO), (1, T)) with T = 8 elements."""
    stride = 8 * width
    for mn, line in enumerate(_addresses(width, 16, stride, 64, k_major=True)):
        for k, address in enumerate(line):
            assert address == _swizzle(mn % 8 * width + mn // 8 * stride + 2 * k, width)


# One warpgroup multiplies x (60, 32) by w, (64, 32) or (32, 64), both brought by TMA, rows of kWidth bytes.
PRODUCT = r"""
#include "core/sm90/barrier.cuh"
#include "core/sm90/tensor_map.h"
#include "core/sm90/tma.cuh"
#include "core/sm90/wgmma.cuh"

using namespace peft_kernels::sm90;

enum Fault { kNone, kNoWait, kWrongParity, kWaitsTwice, kNoFence, kFewBytes, kOrdinaryStore };
constexpr int kN = 64, kK = 32;

// How many boxes bring `cols` columns.
constexpr int boxes(int width, int cols) { return cols / (width / 2) > 1 ? cols / (width / 2) : 1; }

template <int kWidth, bool kTransposed, Fault kFault>
void body(const TensorMap& x, const TensorMap& w, float* y) {
  constexpr int kCols = kWidth / 2, kXBoxes = boxes(kWidth, kK), kWBoxes = boxes(kWidth, kTransposed ? kN : kK);
  constexpr int kXBytes = 64 * kWidth, kWBytes = (kTransposed ? kK : kN) * kWidth;
  auto* shared = static_cast<uint8_t*>(simt::shared_memory());
  uint8_t *sX = shared + 1024, *sW = sX + 16384;
  auto* full = reinterpret_cast<uint64_t*>(shared);
  if (threadIdx.x == 0) {
    barrier_init(full, 1);
    fence_barrier_init();
    barrier_expect(full, kFault == kFewBytes ? kWBytes : kXBoxes * kXBytes + kWBoxes * kWBytes);
    for (int block = 0; block < kXBoxes; ++block) {
      tma_load(sX + block * kXBytes, &x, full, 0, block * kCols);
    }
    for (int block = 0; block < kWBoxes; ++block) {
      tma_load(sW + block * kWBytes, &w, full, 0, block * kCols);
    }
  }
  __syncthreads();
  if (kFault != kNoWait) {
    barrier_wait(full, kFault == kWrongParity);
  }
  if (kFault == kWaitsTwice) {
    barrier_wait(full, 1);
  }
  if (kFault == kOrdinaryStore) {
    store_shared(shared_address(sX) + 4 * threadIdx.x, 0);
  }
  float d[kN / 2];
  if (kFault != kNoFence) {
    wgmma_fence();
  }
  for (int i = 0; i < kK / 16; ++i) {
    const int block = 16 * i / kCols, inside = 16 * i % kCols;
    const uint32_t aX = shared_address(sX) + block * kXBytes + 2 * inside;
    const uint32_t aW = shared_address(sW) + (kTransposed ? 16 * i * kWidth : block * kWBytes + 2 * inside);
    wgmma<HalfType::kBf16, kN, kTransposed>(d, operand_descriptor(aX, kWidth), operand_descriptor(aW, kWidth, kWBytes),
                                            i > 0);
  }
  wgmma_commit();
  wgmma_wait<0>();
  for (int i = 0; i < kN / 2; ++i) {
    const int thread = threadIdx.x, row = 16 * (thread / 32) + thread % 32 / 4 + 8 * (i / 2 % 2);
    y[row * kN + 8 * (i / 4) + 2 * (thread % 4) + i % 2] = d[i];
  }
}

template <int kWidth, bool kTransposed, Fault kFault>
void test(const simt::Arguments& arguments) {
  simt::Buffer x = arguments.input("x"), w = arguments.input("w"), y("y", 4 * 64 * kN);
  const TensorMap x_map = encode(HalfType::kBf16, {x.data(), 60, kK, kK, 64, kWidth / 2});
  const int64_t rows = kTransposed ? kK : kN, cols = kTransposed ? kN : kK;
  const TensorMap w_map =
      encode(HalfType::kBf16, {w.data(), rows, cols, cols, static_cast<uint32_t>(rows), kWidth / 2});
  simt::run_schedules(arguments, {&x, &w}, {&y}, [&](uint64_t seed) {
    simt::Config config;
    config.block = {128};
    config.shared_bytes = 1024 + 16384 + 8192;
    config.seed = seed;
    simt::launch(config, [&] { body<kWidth, kTransposed, kFault>(x_map, w_map, y.data<float>()); });
  });
}

int main(int argc, char** argv) {
  return simt::main_of(argc, argv, [](const simt::Arguments& arguments) {
    const std::map<std::string, void (*)(const simt::Arguments&)> tests = {
        {"32", test<32, false, kNone>},
        {"128", test<128, false, kNone>},
        {"64 transposed", test<64, true, kNone>},
        {"128 transposed", test<128, true, kNone>},
        {"no wait", test<64, true, kNoWait>},
        {"wrong parity", test<64, true, kWrongParity>},
        {"waits twice", test<64, true, kWaitsTwice>},
        {"no fence", test<64, true, kNoFence>},
        {"few bytes", test<64, true, kFewBytes>},
        {"ordinary store", test<64, true, kOrdinaryStore>}};
    tests.at(arguments.text("test"))(arguments);
  });
}
"""


def _product(test: str, transposed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(rows, 32, generator=generator).to(torch.bfloat16) for rows in (60, 64))
    got = build.run(
        build.build(PRODUCT),
        {"x": x, "w": w.t().contiguous() if transposed else w},
        {"y": ((64, 64), torch.float32)},
        schedules=4,
        test=test,
    )
    return got["y"], torch.cat((x.float() @ w.float().t(), torch.zeros(4, 64)))


@pytest.mark.slow
@pytest.mark.parametrize("test", ["32", "128", "64 transposed", "128 transposed"])
def test_tma_and_tensor_cores_agree(test: str) -> None:
    """Rows past the end of x read as zeros, and the permutation of one is undone by the other."""
    got, expected = _product(test, "transposed" in test)
    torch.testing.assert_close(got, expected)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("fault", "complaint"),
    [
        ("no wait", "bits of y differ|way has yet to read"),
        ("wrong parity", "bits of y differ|way has yet to read|deadlock"),
        ("waits twice", "deadlock"),
        ("no fence", "a wgmma without a wgmma.fence"),
        ("few bytes", "deadlock"),
        ("ordinary store", "did not fence for the asynchronous proxy"),
    ],
)
def test_faults_are_seen(fault: str, complaint: str) -> None:
    with pytest.raises(build.SimtError, match=complaint):
        _product(fault, True)
