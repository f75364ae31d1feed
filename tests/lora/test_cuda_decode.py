"""The decode kernel's device body in the emulator, its index arithmetic, and the choice of its splits."""

from __future__ import annotations

import dataclasses
import random
import subprocess
from pathlib import Path

import pytest
import torch

from peft_kernels._core.device import Hardware
from peft_kernels.lora.kernels import config, cuda_decode
from python_ref import compare
from tests.compiled import UNDEFINED_BEHAVIOUR_FAILS, host_program
from tests.lora import simt_decode
from tests.lora.cases import Case, make, make_exact, output_gradient, run_eager, run_oracle
from tests.simt import build

pytestmark = pytest.mark.cpu_only

CPU = torch.device("cpu")
HALVES = (
    (torch.bfloat16, None),
    (torch.float16, None),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
)

# Tokens, rows and columns at and around the edges of tiles, vectors and chunks; ranks below, at and beyond a tile of A
# and a block of ranks. With them splits of W and of A, and blocks: fewer than units, as many, and more.
SHAPES = (
    (Case(m=1, n=33, k=8, r=1), (1, 1, 1)),
    (Case(m=2, n=64, k=56, r=5), (1, 1, 2)),
    (Case(m=7, n=63, k=72, r=16), (2, 2, 3)),
    (Case(m=8, n=130, k=1096, r=32), (3, 5, 7)),
    (Case(m=9, n=1, k=512, r=33), (2, 4, 6)),
    (Case(m=13, n=65, k=328, r=64), (5, 6, 30)),
    (Case(m=16, n=64, k=520, r=65), (4, 2, 5)),
    (Case(m=16, n=40, k=136, r=128), (1, 3, 4)),
    (Case(m=16, n=96, k=64, r=130), (2, 2, 3)),  # more splits than chunks: empty ranges
    # More steps than the loop over k has in a turn, and an end within one.
    (Case(m=5, n=40, k=2376, r=3), (1, 1, 3)),
    (Case(m=16, n=40, k=2888, r=20), (1, 1, 2)),
)
GRID = [
    (dataclasses.replace(case, dtype=dtype, adapter_dtype=adapter, bias=index % 2 == 0), split)
    for index, (case, split) in enumerate(SHAPES)
    for dtype, adapter in HALVES
]


@pytest.mark.parametrize(("case", "split"), GRID, ids=str)
def test_error_budget(case: Case, split: tuple[int, int, int]) -> None:
    splits, down_splits, grid = split
    draws = []
    for seed in range(max(1, min(8, 256 // (case.m * case.n)))):
        tensors = make(case, CPU, seed)
        y, s = simt_decode.run(case, tensors, splits, down_splits, grid, schedules=2, first_seed=10 * seed)
        dy = output_gradient(case, CPU)
        wide = [tensor.float() for tensor in (tensors.x, tensors.lora_a)]
        exact = [tensor.double() for tensor in (tensors.x, tensors.lora_a)]
        draws.append(
            (
                (y, run_eager(case, tensors, dy).y, run_oracle(case, tensors, dy).y),
                (s, wide[0] @ wide[1].t(), exact[0] @ exact[1].t()),
            )
        )
    for index, name in enumerate(("y", "S")):
        ours, eager, oracle = (torch.cat([draw[index][which].flatten() for draw in draws]) for which in range(3))
        compare.assert_close(f"{case} {name}", ours, eager, oracle)


def test_exact_in_random_shapes_splits_and_blocks() -> None:
    """Integers leave nothing to round, so nothing may differ from the oracle."""
    draw = random.Random(0)
    for seed in range(60):
        dtype, adapter = draw.choice(HALVES)
        case = Case(
            m=draw.randint(1, 16),
            n=draw.randint(1, 200),
            k=8 * draw.randint(1, draw.choice((90, 400))),
            r=draw.randint(1, 140),
            dtype=dtype,
            adapter_dtype=adapter,
            bias=draw.random() < 0.5,
            scale=0.5,
        )
        split = (draw.randint(1, 6), draw.randint(1, 6), draw.randint(1, 12))
        tensors, dy = make_exact(case, CPU, seed)
        scale_tensor = draw.random() < 0.5
        y, s = simt_decode.run(case, tensors, *split, schedules=1, first_seed=seed, scale_tensor=scale_tensor)
        assert torch.equal(y.double(), run_oracle(case, tensors, dy).y), f"{case} {split}"
        assert torch.equal(s.double(), tensors.x.double() @ tensors.lora_a.double().t()), f"{case} {split}"


@pytest.mark.parametrize("grid", [1, 2, 9, 25])
def test_every_schedule_and_grid_give_the_same_bits(grid: int) -> None:
    case = Case(m=11, n=70, k=584, r=40, dtype=torch.bfloat16)
    tensors = make(case, CPU)
    first = simt_decode.run(case, tensors, splits=4, down_splits=3, grid=4)
    got = simt_decode.run(case, tensors, splits=4, down_splits=3, grid=grid, schedules=40, first_seed=100)
    for name, one, other in zip(("y", "S"), first, got, strict=True):
        compare.assert_bitwise_equal(name, one, other)


def test_replays_need_their_flags_zeroed() -> None:
    """A launch with the nonce of the one before takes its flags for its own, unless they are zeroed in between."""
    case = Case(m=3, n=70, k=520, r=20, dtype=torch.bfloat16)
    tensors = make(case, CPU)
    repeats = {"splits": 3, "down_splits": 2, "grid": 8, "schedules": 20, "repeat_nonce": True}
    expected = simt_decode.run(case, tensors, splits=3, down_splits=2)
    got = simt_decode.run(case, tensors, zero_flags=True, **repeats)
    for name, one, other in zip(("y", "S"), expected, got, strict=True):
        compare.assert_bitwise_equal(name, one, other)
    with pytest.raises(build.SimtError, match=r"bits of . differ between schedules"):
        simt_decode.run(case, tensors, **repeats)


@pytest.mark.parametrize("m", [5, 16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_adapters_lose_no_bit(dtype: torch.dtype, m: int) -> None:
    """A token that is 1 in one place takes A's column there: in three pieces, to the last bit."""
    case = Case(m=m, n=8, k=64, r=70, dtype=dtype, adapter_dtype=torch.float32, bias=False)
    tensors = make(case, CPU)
    columns = torch.randperm(case.k, generator=torch.Generator().manual_seed(0))[: case.m]
    x = torch.zeros_like(tensors.x).scatter_(1, columns[:, None], 1.0)
    _, s = simt_decode.run(case, tensors._replace(x=x))
    compare.assert_bitwise_equal("S", s, tensors.lora_a[:, columns].t())


def test_infinite_elements_stay_where_they_are() -> None:
    """An inf or nan in a row of W reaches its column of y and no other; one of x its token."""
    case = Case(m=5, n=40, k=72, r=3, dtype=torch.float16, bias=False)
    tensors = make(case, CPU)
    tensors.weight[37, 70] = torch.inf
    tensors.x[2, 3] = torch.nan
    y, s = simt_decode.run(case, tensors)
    finite = torch.ones(case.m, case.n, dtype=torch.bool)
    finite[:, 37] = False
    finite[2] = False
    assert torch.equal(y.isfinite(), finite)
    assert torch.equal(s.isnan(), torch.tensor([row == 2 for row in range(5)])[:, None].expand(5, 3))


ARITHMETIC = r"""
#include <cstdio>
#include <cstdlib>
#include <map>
#include <set>
#include <vector>

#include "lora/decode_config.h"

using namespace peft_kernels::lora::decode;

#define CHECK(condition)                                                                                      \
  if (!(condition)) {                                                                                         \
    std::printf("line %d: %s, shape %d %d %d %d splits %d %d\n", __LINE__, #condition, shape.m, shape.n, shape.k, \
                shape.r, shape.splits, shape.down_splits);                                                    \
    std::exit(1);                                                                                             \
  }

void check(const Shape& shape) {
  std::set<int> slots;
  std::map<std::pair<bool, int>, std::vector<int>> covered;  // by tile: how often each chunk
  for (int index = 0; index < units(shape); ++index) {
    const Unit unit = unit_at(shape, index);
    CHECK(unit.split >= 0 && unit.split < unit.splits);
    CHECK(unit.splits == (unit.is_down ? shape.down_splits : shape.splits));
    CHECK(unit.tile >= 0 && unit.tile < tiles(unit.is_down ? shape.r : shape.n));
    auto& times = covered[{unit.is_down, unit.tile}];
    times.resize(static_cast<size_t>(chunks(shape.k)));
    const Range range = chunks_of(shape, unit);
    CHECK(range.begin >= 0 && range.begin <= range.end && range.end <= chunks(shape.k));
    for (int chunk = range.begin; chunk < range.end; ++chunk) {
      ++times[static_cast<size_t>(chunk)];
    }
    if (!unit.is_last()) {
      const int slot = partial_of(shape, unit);
      CHECK(slot >= 0 && slot < partials(shape) && slots.insert(slot).second);
      if (unit.split > 0) {
        const Unit before = unit_at(shape, index - 1);
        CHECK(partial_of(shape, before) == slot - 1);
      }
    }
    // Whom it waits for: earlier splits of its tile, and, as the last of a tile of W, all of S.
    for (int other = 1; unit.is_last() && other <= unit.split; ++other) {
      const Unit earlier = unit_at(shape, index - other);
      CHECK(earlier.is_down == unit.is_down && earlier.tile == unit.tile && earlier.split == unit.split - other);
    }
    for (int tile = 0; !unit.is_down && tile < tiles(shape.r); ++tile) {
      const Unit of_s = unit_at(shape, unit_of_s(shape, tile));
      CHECK(of_s.is_down && of_s.is_last() && of_s.tile == tile && unit_of_s(shape, tile) < index);
    }
  }
  CHECK(static_cast<int>(slots.size()) == partials(shape));
  CHECK(covered.size() == static_cast<size_t>(tiles(shape.n) + tiles(shape.r)));
  for (const auto& [tile, times] : covered) {
    for (const int count : times) {
      CHECK(count == 1);
    }
  }
  CHECK(tiles(shape.n) * kTileRows >= shape.n && (tiles(shape.n) - 1) * kTileRows < shape.n);
  CHECK(chunks(shape.k) * kChunkK >= shape.k && (chunks(shape.k) - 1) * kChunkK < shape.k);
  CHECK(workspace_bytes(shape) == 8 * int64_t{units(shape)} + int64_t{partials(shape)} * shape.m * kTileRows * 4);
}

int main(int argc, char** argv) {
  std::printf("%d %d %d %d %d\n", kTileRows, kChunkK, kWarpsOfK, kCtasPerSm, kMaxTokens);
  std::srand(7);
  for (int i = 0; i < std::atoi(argv[argc - 1]); ++i) {
    check({1 + std::rand() % 16, 1 + std::rand() % 700, 8 * (1 + std::rand() % 300), 1 + std::rand() % 300,
           1 + std::rand() % 9, 1 + std::rand() % 9});
  }
  // Sizes whose products leave 32 bits.
  const Shape shape = {16, 1 << 30, 1 << 30, 16, 2, 4};
  const Unit last = unit_at(shape, units(shape) - 1);
  CHECK(last.tile == (1 << 24) - 1 && last.is_last() && chunks_of(shape, last).end == 1 << 24);
  CHECK(partial_of(shape, unit_at(shape, units(shape) - 2)) == partials(shape) - 1);
  CHECK(workspace_bytes(shape) == 8 * int64_t{units(shape)} + ((int64_t{1} << 24) + 3) * 16 * 64 * 4);
}
"""


def test_index_arithmetic(tmp_path: Path) -> None:
    program = host_program(tmp_path, ARITHMETIC, *UNDEFINED_BEHAVIOUR_FAILS)
    result = subprocess.run([program, "2000"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    constants = [
        config.DECODE_TILE_ROWS,
        config.DECODE_CHUNK_K,
        config.DECODE_WARPS_OF_K,
        config.DECODE_BLOCKS_PER_SM,
        cuda_decode.MAX_TOKENS,
    ]
    assert result.stdout.split() == [str(constant) for constant in constants]


H100 = Hardware(arch=90, sm_count=132)


@pytest.mark.parametrize(("n", "k"), [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336), (512, 2048), (1, 8)])
@pytest.mark.parametrize("r", [1, 16, 128, 300])
def test_config_fills_one_grid(n: int, k: int, r: int) -> None:
    chosen = config.decode_config(n, k, r, H100)
    chunks = -(-k // config.DECODE_CHUNK_K)
    assert 1 <= chosen.SPLITS <= max(1, -(-chunks // config.DECODE_WARPS_OF_K))
    assert 1 <= chosen.DOWN_SPLITS <= chunks
    units = -(-n // 64) * chosen.SPLITS + -(-r // 64) * chosen.DOWN_SPLITS
    assert min(units, 2 * H100.sm_count) == chosen.GRID  # which the launch bounds leave room for


def test_config_splits_where_tiles_are_few() -> None:
    assert config.decode_config(4096, 4096, 16, H100) == config.DecodeConfig(SPLITS=4, DOWN_SPLITS=8, GRID=264)
    assert config.decode_config(14336, 4096, 16, H100).SPLITS == 1
