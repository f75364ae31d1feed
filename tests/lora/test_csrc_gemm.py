"""The Hopper GEMM without a GPU: its device body, compiled for the host, in the emulator of tests/simt.

Results against the float64 oracle under the error budget, the same bits from every schedule; faults that are put into
the code on purpose are seen; the order of tiles for many shapes and grids.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from python_ref import compare
from python_ref import lora as oracle
from tests.compiled import CSRC, UNDEFINED_BEHAVIOUR_FAILS, host_program
from tests.contract.operators import double
from tests.lora import cases, simt_gemm
from tests.lora.cases import Case, Tensors
from tests.simt import build

CPU = torch.device("cpu")
BF16, FP16 = torch.bfloat16, torch.float16

pytestmark = pytest.mark.cpu_only

# Case and grid. Sizes are multiples of 8, which TMA asks of rows, and of no tile; a last row block of one
# row, of less than a consumer's half, and of both halves; fewer, as many and more blocks than row blocks.
FORWARD = (
    (Case(m=300, n=520, k=200, r=3, dtype=BF16), 3),
    (Case(m=129, n=264, k=72, r=1, dtype=BF16, bias=False), 2),
    (Case(m=1100, n=264, k=64, r=16, dtype=BF16, scale=-3.0), 5),
    (Case(m=70, n=776, k=136, r=40, dtype=BF16), 1),
    (Case(m=200, n=24, k=8, r=25, dtype=FP16), 4),
    (Case(m=150, n=520, k=264, r=17, dtype=FP16), 3),
    (Case(m=260, n=392, k=328, r=128, dtype=FP16), 2),
    (Case(m=140, n=200, k=72, r=100, dtype=FP16, bias=False), 4),
)
BACKWARD = (
    (Case(m=300, n=200, k=520, r=11, dtype=BF16), 3),
    (Case(m=1, n=72, k=264, r=16, dtype=BF16, scale=0.0), 2),
    (Case(m=260, n=328, k=392, r=128, dtype=BF16), 2),
    (Case(m=200, n=136, k=200, r=72, dtype=BF16), 5),
    (Case(m=1100, n=64, k=264, r=20, dtype=FP16), 4),
    (Case(m=130, n=264, k=776, r=32, dtype=FP16, scale=-3.0), 1),
    (Case(m=150, n=72, k=520, r=40, dtype=FP16), 3),
)


@pytest.mark.slow
@pytest.mark.parametrize(("case", "grid"), FORWARD, ids=str)
def test_forward(case: Case, grid: int) -> None:
    tensors = cases.make(case, CPU)
    _check_forward(case, tensors, *simt_gemm.forward(case, tensors, grid, schedules=3))


@pytest.mark.parametrize(("case", "grid"), BACKWARD, ids=str)
def test_backward(case: Case, grid: int) -> None:
    tensors, dy = cases.make(case, CPU), cases.output_gradient(case, CPU)
    _check_backward(case, tensors, dy, *simt_gemm.backward(case, tensors, dy, grid, schedules=3))


def _check_forward(case: Case, tensors: Tensors, y: Tensor, s: Tensor) -> None:
    *factors, bias = double(tensors)
    exact = oracle.forward(*factors, case.scale, bias)
    compare.assert_close(f"{case} y", y, oracle.eager(*tensors[:4], case.scale, tensors.bias), exact[0])
    compare.assert_close(f"{case} S", s, tensors.x.float() @ tensors.lora_a.float().t(), exact[1])


def _check_backward(case: Case, tensors: Tensors, dy: Tensor, dx: Tensor, ds: Tensor) -> None:
    eager, exact = cases.run_eager(case, tensors, dy), cases.run_oracle(case, tensors, dy)
    compare.assert_close(f"{case} dX", dx, eager.x, exact.x)
    exact_ds = case.scale * (dy.double() @ tensors.lora_b.double())
    compare.assert_close(f"{case} dS", ds, case.scale * (dy.float() @ tensors.lora_b.float()), exact_ds)


@pytest.mark.parametrize("seed", range(3))
def test_exact(seed: int) -> None:
    """Small integers, whose every product and sum is exact: no tolerance hides an index."""
    case = Case(m=200, n=328, k=200, r=17, dtype=FP16, scale=2.0)
    tensors, _ = cases.make_exact(case, CPU, seed)
    y, s = simt_gemm.forward(case, tensors, 2, schedules=1)
    *factors, bias = double(tensors)
    exact = oracle.forward(*factors, case.scale, bias)
    compare.assert_bitwise_equal("y", y.double(), exact[0] + 0.0)
    compare.assert_bitwise_equal("S", s.double() + 0.0, exact[1] + 0.0)


@pytest.mark.parametrize(("scale", "a", "b"), [(4096.0, 1e2, 1e-3), (1e-5, 1e-3, 1e4)])
def test_float16_keeps_its_range(scale: float, a: float, b: float) -> None:
    """Scale times S is inf or zero in float16, and scale times S B^T is neither, as in eager."""
    case = Case(m=40, n=72, k=136, r=17, dtype=FP16, scale=scale, bias=False)
    tensors = cases.make(case, CPU)
    tensors.weight.zero_()
    tensors.lora_a.mul_(a)
    tensors.lora_b.mul_(b)
    _check_forward(case, tensors, *simt_gemm.forward(case, tensors, 1, schedules=1))


def test_infinite_x_stays_infinite() -> None:
    """0 * inf in the columns that pad the rank must not make nan of y's inf."""
    case = Case(m=140, n=264, k=72, r=3, dtype=BF16)
    tensors = _with_an_infinite_row(case)
    _check_forward(case, tensors, *simt_gemm.forward(case, tensors, 2, schedules=1))


def _with_an_infinite_row(case: Case) -> Tensors:
    """Factors without signs, so that the row of y is inf and not nan."""
    tensors = cases.make(case, CPU)
    tensors.x[7, 5] = float("inf")
    for factor in (tensors.weight, tensors.lora_a, tensors.lora_b):
        factor.abs_()
    return tensors


# Faults: the text that is replaced, what replaces it, and which kernel must see it. In one program, each in a namespace
# of its own, because compiling one more costs a second and compiling another program five.
PLAIN, BACKWARD_CONFIG = "kBf16-16-kForward", "kBf16-16-kBackward"
ONE_BLOCK = "kBf16-16-kForward-1"  # whose block has more than one tile n = 0
FAULTS = {
    "no fault": ("", "", PLAIN),
    "no fault, backward": ("", "", BACKWARD_CONFIG),
    "consumers do not wait for a stage's copies": (
        "    sm90::barrier_wait(&shared.full[ring.slot], ring.parity);\n    sm90::wgmma_fence();",
        "    sm90::wgmma_fence();",
        PLAIN,
    ),
    "the producer does not wait for a free stage": (
        "sm90::barrier_wait(&shared.free[ring.slot], ring.parity ^ 1);",
        "",
        PLAIN,
    ),
    "the producer waits for the wrong parity": ("ring.parity ^ 1", "ring.parity", PLAIN),
    "a stage is freed before its products are done": (
        "    if (step > 0) {\n      sm90::wgmma_wait<1>();\n      free_stage(shared, previous);\n    }\n",
        "    if (step > 0) {\n      free_stage(shared, previous);\n      sm90::wgmma_wait<1>();\n    }\n",
        PLAIN,
    ),
    "the last stage is freed before its products are done": (
        "  sm90::wgmma_wait<0>();\n  sm90::wgmma_results(rY);\n  if constexpr (kMakesS) {",
        "  free_stage(shared, previous); sm90::wgmma_wait<0>(); return;\n  if constexpr (kMakesS) {",
        PLAIN,
    ),
    "a rank step does not wait for its copies": (
        "      sm90::barrier_wait(&shared.full[ring.slot], ring.parity);\n      sm90::wgmma_fence();",
        "      sm90::wgmma_fence();",
        PLAIN,
    ),
    "the rank steps' stages are freed before the rank product": (
        "  sm90::wgmma_commit();\n  sm90::wgmma_wait<0>();\n  sm90::wgmma_results(rY);\n  free_rank_steps(shared, slots);",
        "  sm90::wgmma_commit();\n  free_rank_steps(shared, slots);\n"
        "  sm90::wgmma_wait<0>();\n  sm90::wgmma_results(rY);\n",
        PLAIN,
    ),
    "S is not waited for": (
        "wait_until_published(&arguments.flags[Config::kConsumers * tile.m + consumer], arguments.nonce);",
        "",
        PLAIN,
    ),
    "one half of S is not waited for": (
        "for (int consumer = 0; consumer < Config::kConsumers; ++consumer) {\n        wait",
        "for (int consumer = 0; consumer < 1; ++consumer) {\n        wait",
        PLAIN,
    ),
    "S is published by a thread that does not wait for the others": (
        "  sm90::fence_async_shared();\n  sm90::named_barrier_sync(kConsumerBarrier + consumer, Config::kWarpgroup);\n"
        "  if (threadIdx.x % Config::kWarpgroup == 0) {\n    publish",
        "  sm90::fence_async_shared();\n  if (threadIdx.x % Config::kWarpgroup == 0) {\n    publish",
        PLAIN,
    ),
    "flags of an earlier launch count": ("arguments.nonce = params.nonce;", "arguments.nonce = 1;", PLAIN),
    "S is not fenced for TMA": (
        "  sm90::fence_async_global();\n  sm90::fence_async_shared();",
        "  sm90::fence_async_shared();",
        PLAIN,
    ),
    "S is not fenced for the tensor cores": (
        "  sm90::fence_async_global();\n  sm90::fence_async_shared();",
        "  sm90::fence_async_global();",
        PLAIN,
    ),
    "S is kept without the swizzle": (
        "sm90::swizzled(sS + tile_row * kLine + 2 * (col % Config::kRankChunk), kLine)",
        "sS + tile_row * kLine + 2 * (col % Config::kRankChunk)",
        PLAIN,
    ),
    "y is staged without the swizzle": (
        "sm90::swizzled(sY + 16 * (i / 4 + lane / 16), Config::kLineBytes)",
        "(sY + 16 * (i / 4 + lane / 16))",
        PLAIN,
    ),
    "y is staged while the last chunk but one is still read": (
        "    sm90::tma_store_wait_read<Config::kBuffers - 1>();\n",
        "",
        PLAIN,
    ),
    "one more buffer of y is taken to be free": (
        "tma_store_wait_read<Config::kBuffers - 1>",
        "tma_store_wait_read<Config::kBuffers>",
        PLAIN,
    ),
    "down comes while y is still read": (
        "      sm90::barrier_wait(&shared.drained, drained_parity);\n",
        "",
        ONE_BLOCK,
    ),
    "y is said to have left before it has": (
        "        sm90::tma_store_wait_read<0>();\n        sm90::barrier_arrive(&shared.drained);",
        "        sm90::barrier_arrive(&shared.drained);",
        ONE_BLOCK,
    ),
    "y is staged where the other consumer still multiplies by down": (
        "      sm90::named_barrier_sync(kBothConsumersBarrier, Config::kConsumers * Config::kWarpgroup);\n",
        "",
        PLAIN,
    ),
    "y is not fenced for TMA": (
        "  sm90::fence_async_shared();\n  __syncwarp();\n  if (lane == 0) {\n    sm90::tma_store(",
        "  __syncwarp();\n  if (lane == 0) {\n    sm90::tma_store(",
        PLAIN,
    ),
    "y leaves before the warp has staged it": (
        "  sm90::fence_async_shared();\n  __syncwarp();\n  if (lane == 0) {\n    sm90::tma_store(",
        "  sm90::fence_async_shared();\n  if (lane == 0) {\n    sm90::tma_store(",
        PLAIN,
    ),
    "the block exits before its stores are done": ("    sm90::tma_store_wait<0>();\n", "", PLAIN),
    "fewer bytes are announced than come": ("(makes_s ? Config::kDownBytes : 0)", "0", PLAIN),
    "columns past the rank are not cleared": ("col < arguments.r ? rS[i] : 0.0f", "rS[i]", PLAIN),
    "rows past the end are written": (
        "      if (row < arguments.m) {\n        if (col",
        "      {\n        if (col",
        PLAIN,
    ),
    "the tile n = 0 comes last": (
        "    const TileIndex tile = arguments.order.at(number);",
        "    TileIndex tile = arguments.order.at(number); tile.n = arguments.order.tiles_n - 1 - tile.n;",
        PLAIN,
    ),
    "W's blocks of columns are taken to be closer together": (
        "kWBlock = Config::kTransposed ? Config::kBlockK * kLine : 16",
        "kWBlock = 1024",
        BACKWARD_CONFIG,
    ),
    "steps along k are as far in transposed operands": (
        "kAlongW = Config::kTransposed ? 16 * kLine : 32",
        "kAlongW = 32",
        BACKWARD_CONFIG,
    ),
}
MUTATED = (
    "gemm_sm90_config.h",
    "tile_order.h",
    "gemm_sm90_producer.cuh",
    "gemm_sm90_products.cuh",
    "gemm_sm90_epilogue.cuh",
    "gemm_sm90.cuh",
    "gemm_sm90_arguments.h",
)


FAULT_CASE = Case(m=200, n=520, k=200, r=3, dtype=BF16)
FAULT_CASE_BACKWARD = Case(m=200, n=200, k=520, r=3, dtype=BF16)


@pytest.fixture(scope="module")
def faulty() -> Path:
    """One program with every faulty version of the kernel, by its number."""
    kernel = "".join((CSRC / "lora" / name).read_text() for name in MUTATED).replace("#pragma once", "")
    for name in MUTATED:
        kernel = kernel.replace(f'#include "lora/{name}"\n', "")
    includes, main = simt_gemm.PROGRAM.split("TESTS")
    test = includes.split("using namespace peft_kernels::lora;")[1]
    unused = ("parameter", "value", "but-set-variable", "variable")
    text = "".join(f'#pragma GCC diagnostic ignored "-Wunused-{what}"\n' for what in unused)
    text += '#include "lora/params.h"\nusing namespace peft_kernels;\n'
    entries = []
    for number, (fault, (old, new, config)) in enumerate(FAULTS.items()):
        assert old in kernel, f"{fault}: there is nothing to replace"
        space, (kind, rank, direction) = f"peft_kernels::fault_{number}", config.split("-")[:3]
        text += f"namespace {space} {{ using lora::GemmParams; }}\n"
        text += (kernel.replace(old, new) if old else kernel).replace("peft_kernels::lora", space)
        text += f"namespace {space} {{\n{test}}}\n"
        types = f"sm90::HalfType::{kind}, {rank}, {space}::Direction::{direction}"
        entries.append(f'{{"{number}", {space}::test<{space}::GemmConfig<{types}>>}}')
    tests = f"const std::map<std::string, void (*)(const simt::Arguments&)> tests = {{{', '.join(entries)}}};"
    return build.build(text + tests + main)


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_seen(faulty: Path, fault: str) -> None:
    backward, grid = FAULTS[fault][2] == BACKWARD_CONFIG, 1 if FAULTS[fault][2] == ONE_BLOCK else 3
    case = FAULT_CASE_BACKWARD if backward else FAULT_CASE
    tensors, dy = _with_an_infinite_row(case), cases.output_gradient(case, CPU)
    x, weight, lora_a, lora_b, bias = tensors

    def check(schedules: int) -> None:
        number = str(list(FAULTS).index(fault))
        if backward:
            operands, sizes = {"x": dy, "w": weight, "down": lora_b, "up": lora_a}, (case.m, case.k, case.n)
            got = simt_gemm.run(faulty, number, operands, None, case, sizes, grid=grid, schedules=schedules)
            _check_backward(case, tensors, dy, *got)
        else:
            operands, sizes = {"x": x, "w": weight, "down": lora_a, "up": lora_b}, (case.m, case.n, case.k)
            got = simt_gemm.run(faulty, number, operands, bias, case, sizes, grid=grid, schedules=schedules)
            _check_forward(case, tensors, *got)

    if fault.startswith("no fault"):
        check(4)
        return
    # What is wrong under every schedule is seen by one; a race by one of many.
    with pytest.raises(AssertionError):
        check(1)
        check(100)


TILE_ORDER_PROGRAM = r"""
#include <algorithm>
#include <cstdio>
#include <vector>

#include "lora/ORDER"

using peft_kernels::lora::TileIndex;
using peft_kernels::lora::TileOrder;

#define DEMAND(condition)                                                                              \
  if (!(condition)) {                                                                                  \
    std::printf("%s: %d x %d tiles, %d blocks\n", #condition, order.tiles_m, order.tiles_n, blocks);   \
    return 1;                                                                                          \
  }

int main() {
  int blocks = 0;
  for (int tiles_m = 1; tiles_m <= 40; ++tiles_m) {
    for (int tiles_n = 1; tiles_n <= 12; ++tiles_n) {
      const TileOrder order = {tiles_m, tiles_n};
      std::vector<int> seen(tiles_m * tiles_n, 0), first(tiles_m, -1);
      std::vector<TileIndex> tiles;
      for (int64_t number = 0; number < order.count(); ++number) {
        const TileIndex tile = order.at(number);
        DEMAND(tile.m >= 0 && tile.m < tiles_m && tile.n >= 0 && tile.n < tiles_n);
        DEMAND(seen[tile.m * tiles_n + tile.n]++ == 0);
        if (tile.n == 0) {
          first[tile.m] = static_cast<int>(number);
        }
        DEMAND(first[tile.m] >= 0);
        // From the second group on, S is made a whole group's rest before it is needed.
        const int rest = TileOrder::kGroup * (tiles_n - 1);
        DEMAND(tile.n == 0 || tile.m < TileOrder::kGroup || number - first[tile.m] >= rest);
        tiles.push_back(tile);
      }
      // Blocks in lockstep, each stuck where it waits: everybody gets through, however many blocks there are.
      for (blocks = 1; blocks <= static_cast<int>(tiles.size()) + 1 && blocks <= 140; ++blocks) {
        std::vector<size_t> at(blocks);
        std::vector<bool> raised(tiles_m, false);
        size_t done = 0;
        for (int block = 0; block < blocks; ++block) {
          at[block] = block;
        }
        for (bool moved = true; moved;) {
          moved = false;
          for (int block = blocks - 1; block >= 0; --block) {
            if (at[block] < tiles.size() && (tiles[at[block]].n == 0 || raised[tiles[at[block]].m])) {
              raised[tiles[at[block]].m] = raised[tiles[at[block]].m] || tiles[at[block]].n == 0;
              at[block] += blocks;
              ++done;
              moved = true;
            }
          }
        }
        DEMAND(done == tiles.size());
      }
    }
  }
  // Numbers past 2^31.
  const TileOrder order = {1 << 20, 1 << 12};
  const TileIndex last = order.at(order.count() - 1);
  DEMAND(last.m == (1 << 20) - 1 && last.n == (1 << 12) - 1);
  return 0;
}
"""


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("", "", None),
        ("return {static_cast<int>(number), 0};", "return {static_cast<int>(number), tiles_n - 1};", "first"),
        ("1 + static_cast<int>(inside / rows)", "static_cast<int>(inside / rows)", "seen"),
        ("last > 0 ? last - 1 : 0", "last", "seen|tile.m"),
    ],
    ids=["right", "tile n = 0 late", "a tile twice", "the last group alone"],
)
def test_tile_order(tmp_path: Path, old: str, new: str, complaint: str | None) -> None:
    """Each tile once, the tile n = 0 of a row block first and early, no deadlock for any number of blocks."""
    header = (CSRC / "lora" / "tile_order.h").read_text()
    assert old in header
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "changed.h").write_text(header.replace(old, new) if old else header)
    source = TILE_ORDER_PROGRAM.replace("ORDER", "changed.h", 1)
    program = host_program(tmp_path, source, *UNDEFINED_BEHAVIOUR_FAILS)
    result = subprocess.run([program], capture_output=True, text=True, check=False)
    if complaint is None:
        assert result.returncode == 0, result.stdout + result.stderr
    else:
        assert result.returncode != 0 and re.search(complaint, result.stdout), result.stdout + result.stderr
