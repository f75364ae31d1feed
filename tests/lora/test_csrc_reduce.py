"""The reduce kernel's device body in the emulator, and its index arithmetic."""

from __future__ import annotations

import dataclasses
import random
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from peft_kernels.lora.kernels import cuda_reduce, dropout
from python_ref import compare
from tests.compiled import UNDEFINED_BEHAVIOUR_FAILS, host_program
from tests.lora import simt_reduce
from tests.lora.simt_reduce import Operands, Results, Task
from tests.simt import build

pytestmark = pytest.mark.cpu_only

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CPU = torch.device("cpu")
DTYPES = ((BF16, BF16), (FP16, FP16), (BF16, FP32), (FP16, FP32))
SEED = 20240229

# Rows, columns and ranks at and around the edges of chunks, tiles, vectors and rank blocks; few columns for many blocks
# and many for few, so that units are shared by two blocks, by many, and by none.
TASKS = (
    Task(m=1, n=8, k=264, r=1, dtype=BF16, adapter_dtype=BF16),
    Task(m=33, n=257, k=24, r=16, dtype=FP16, adapter_dtype=FP16, threshold=20000),
    Task(m=300, n=40, k=72, r=32, dtype=BF16, adapter_dtype=BF16, multiprocessors=5),
    Task(m=130, n=24, k=260, r=33, dtype=FP16, adapter_dtype=FP16, threshold=6554),
    Task(m=70, n=264, k=64, r=130, dtype=BF16, adapter_dtype=BF16, multiprocessors=7),
    Task(m=290, n=520, k=8, r=20, dtype=FP16, adapter_dtype=FP16, da=False, ds=True, multiprocessors=4),
    Task(m=40, n=31, k=8, r=40, dtype=BF16, adapter_dtype=BF16, da=False, ds=True),
    Task(m=16, n=300, k=8, r=5, dtype=BF16, adapter_dtype=FP32, da=False, ds=True),
    Task(m=50, n=40, k=264, r=35, dtype=FP16, adapter_dtype=FP32),
)


def draw(task: Task, seed: int = 0, integers: bool = False) -> Operands:
    generator = torch.Generator().manual_seed(seed)

    def tensor(dtype: torch.dtype, *shape: int) -> Tensor:
        if integers:
            return torch.randint(-1, 2, shape, generator=generator).to(dtype)
        return torch.randn(shape, generator=generator).to(dtype)

    return Operands(
        dy=tensor(task.dtype, task.m, task.n),
        s=tensor(FP32, task.m, task.r),
        x=tensor(task.dtype, task.m, task.k),
        ds=tensor(FP32, task.m, task.r),
        lora_b=tensor(task.adapter_dtype, task.n, task.r),
        seed=SEED,
    )


def wild(task: Task) -> Operands:
    """Numbers from 1 to 2^40, and in the second half of the rows their negatives: what is left of a sum is what its
    order has rounded away."""
    operands = draw(task)
    generator = torch.Generator().manual_seed(1)

    def mirrored(matrix: Tensor) -> Tensor:
        half = matrix[: -(-task.m // 2)]
        size = 2.0 ** torch.randint(0, 41, half.shape, generator=generator)
        return torch.cat((half.sign() * size, (-half.sign() * size).flip(0)))[: task.m].to(task.dtype)

    half = operands.s[: -(-task.m // 2)]
    s = torch.cat((half, half.flip(0)))[: task.m]
    return operands._replace(dy=mirrored(operands.dy), x=mirrored(operands.x), s=s)


def unit_rows(task: Task) -> Operands:
    """As many rows as columns: a column that is 1 in one row takes a row of float32 as it is."""
    unit = torch.eye(task.m, dtype=task.dtype)
    return draw(task)._replace(dy=unit, x=unit)


def expected(task: Task, operands: Operands, scale: float, keep_scale: float, dtype: torch.dtype) -> Results:
    """The same in one dtype: float64, or the adapters', which is what eager torch computes in."""
    dy, s, x, ds, lora_b = (tensor.to(dtype) for tensor in operands[:5])
    if task.threshold:
        keep = dropout.keep_mask(torch.tensor(operands.seed), task.m, task.k, task.threshold)
        x = torch.where(keep, x * keep_scale, torch.zeros_like(x))
    return Results(
        db=(dy * scale).t() @ s if task.db else None,
        dbias=dy.sum(0) if task.dbias else None,
        da=ds.t() @ x if task.da else None,
        ds=(dy * scale) @ lora_b if task.ds else None,
    )


def assert_exact(task: Task, seed: int, resident: int = 0) -> None:
    operands = draw(task, seed, integers=True)
    keep_scale = 2.0 if task.threshold else 1.0
    scale = torch.tensor(0.5) if seed % 2 else 0.5
    got = simt_reduce.run(task, operands, scale, keep_scale, first_seed=seed, resident=resident)
    assert_as_expected(task, operands, keep_scale, got)


def assert_as_expected(task: Task, operands: Operands, keep_scale: float, got: Results) -> None:
    """What was asked for is the oracle's with a scale of 0.5, to the last bit."""
    oracles = expected(task, operands, 0.5, keep_scale, torch.float64)
    for name, ours, oracle in zip(Results._fields, got, oracles, strict=True):
        assert (ours is None) == (oracle is None), (name, task)
        assert ours is None or torch.equal(ours.double(), oracle), (name, task)


@pytest.mark.parametrize("task", TASKS, ids=str)
def test_exact_at_edges(task: Task) -> None:
    """Integers leave nothing to round, so nothing may differ from the oracle; what is not asked for is not written."""
    assert_exact(task, seed=3)
    assert_exact(dataclasses.replace(task, dbias=False, db=not task.da), seed=4, resident=2)


@pytest.mark.slow
def test_exact_in_random_shapes() -> None:
    random_draw = random.Random(0)
    for seed in range(24):
        dtype, adapter = random_draw.choice(DTYPES)
        task = Task(
            m=random_draw.randint(1, 150),
            n=random_draw.randint(1, 560),
            k=random_draw.randint(1, 560),
            r=random_draw.randint(1, 140),
            dtype=dtype,
            adapter_dtype=adapter,
            ds=random_draw.random() < 0.3,
            threshold=random_draw.choice((0, 0, 30000)),
            multiprocessors=random_draw.randint(1, 9),
        )
        assert_exact(task, seed)


@pytest.mark.parametrize("task", TASKS, ids=str)
def test_error_budget(task: Task) -> None:
    keep_scale = dropout.keep_scale(task.threshold)
    draws: dict[str, list[tuple[Tensor, ...]]] = {name: [] for name in Results._fields}
    for seed in range(3):
        operands = draw(task, seed)
        got = simt_reduce.run(task, operands, 0.75, keep_scale, first_seed=seed)
        eager = expected(task, operands, 0.75, keep_scale, task.adapter_dtype)
        oracle = expected(task, operands, 0.75, keep_scale, torch.float64)
        for name, three in zip(Results._fields, zip(got, eager, oracle, strict=True), strict=True):
            if three[0] is not None:
                draws[name].append((three[0], three[1].to(three[0].dtype), three[2]))
    for name, several in draws.items():
        if several:
            ours, eager, oracle = (torch.cat([three[i].flatten() for three in several]) for i in range(3))
            compare.assert_close(f"{task} {name}", ours, eager, oracle)


@pytest.mark.parametrize(("r", "adapter", "resident"), [(20, BF16, 0), (20, BF16, 1), (40, FP32, 0)])
def test_every_schedule_gives_the_same_bits(r: int, adapter: torch.dtype, resident: int) -> None:
    """Also where a block comes and goes before the next: nobody may wait for a later one. Units of one tile are cut in
    other places, so that what several of them wrote would have each one's bits."""
    task = Task(m=330, n=40, k=24, r=r, dtype=BF16, adapter_dtype=adapter, threshold=6554, multiprocessors=7)
    simt_reduce.run(task, wild(task), schedules=6, first_seed=100, resident=resident)


def test_replays_need_their_tickets_zeroed() -> None:
    """A launch with the nonce of the one before goes on counting from it, unless tickets are zeroed in between."""
    task = Task(m=330, n=24, k=24, r=8, dtype=BF16, adapter_dtype=BF16, multiprocessors=3)
    simt_reduce.run(task, draw(task), schedules=5, repeat_nonce=True, zero_tickets=True)
    with pytest.raises(build.SimtError, match=r"bits of \w+ differ between schedules"):
        simt_reduce.run(task, draw(task), schedules=5, repeat_nonce=True)


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_float32_adapters_lose_no_bit(dtype: torch.dtype) -> None:
    """A column that is 1 in one row takes S's row there, in three pieces, to the last bit; likewise B."""
    task = Task(m=16, n=16, k=16, r=35, dtype=dtype, adapter_dtype=FP32, ds=True)
    operands = unit_rows(task)
    got = simt_reduce.run(task, operands, scale=1.0)
    for name, ours, whole in zip(
        ("db", "da", "ds"), (got.db, got.da, got.ds), (operands.s, operands.ds.t(), operands.lora_b), strict=True
    ):
        compare.assert_bitwise_equal(name, ours, whole.contiguous())


@pytest.mark.parametrize("r", [5, 40])
def test_infinite_elements_stay_where_they_are(r: int) -> None:
    """An inf of dY reaches its row of dB and its element of dbias, a dropped one of x nothing."""
    task = Task(m=40, n=20, k=264, r=r, dtype=FP16, adapter_dtype=FP16, threshold=32768)
    operands = draw(task)
    operands.dy[39, 17] = torch.inf
    keep = dropout.keep_mask(torch.tensor(SEED), task.m, task.k, task.threshold)
    columns = [int(column) for column in (~keep[38]).nonzero()[[0, -1], 0]]
    operands.x[38, columns] = torch.inf
    got = simt_reduce.run(task, operands)
    finite = torch.arange(20) != 17
    assert got.db is not None and got.dbias is not None and got.da is not None
    assert torch.equal(got.db.isfinite(), finite[:, None].expand(20, r))
    assert torch.equal(got.dbias.isfinite(), finite)
    assert got.da.isfinite().all()


ARITHMETIC = r"""
#include <cstdio>
#include <cstdlib>
#include <set>
#include <vector>

#include "lora/reduce_config.h"

using namespace peft_kernels::lora::reduce;

#define CHECK(condition)                                                                                     \
  if (!(condition)) {                                                                                        \
    std::printf("line %d: %s, tiles %d %d, rank blocks %d, chunks %d, ctas %d\n", __LINE__, #condition, plan.up_tiles, \
                plan.down_tiles, plan.rank_blocks, plan.chunks, plan.ctas);                                  \
    std::exit(1);                                                                                            \
  }

void check(int64_t m, int64_t n, int64_t k, int64_t r, bool exact, bool narrow, int multiprocessors) {
  const Variant variant = variant_for(r, exact, narrow);
  const Plan plan = plan_for(m, n, k, r, variant, multiprocessors);
  CHECK(plan.ctas >= 1 && plan.ctas <= multiprocessors * variant.ctas_per_sm());
  CHECK(plan.ctas <= plan.all_chunks() && plan.first_chunk(0) == 0 && plan.first_chunk(plan.ctas) == plan.all_chunks());
  CHECK(plan.rank_blocks * variant.ranks >= r && (plan.rank_blocks - 1) * variant.ranks < r);
  CHECK(plan.chunks * variant.rows() >= m && (plan.chunks - 1) * variant.rows() < m);
  std::vector<int> first(plan.units(), -1), last(plan.units(), -1);
  std::set<int> slots;
  for (int cta = 0; cta < plan.ctas; ++cta) {
    CHECK(plan.first_chunk(cta) < plan.first_chunk(cta + 1));
    for (int64_t chunk = plan.first_chunk(cta); chunk < plan.first_chunk(cta + 1); ++chunk) {
      CHECK(plan.cta_of(chunk) == cta);
      const int unit = static_cast<int>(chunk / plan.chunks);
      if (last[unit] < cta) {  // the pair's first chunk
        const int slot = plan.slot(cta, unit);
        CHECK(slot >= 0 && slot < plan.slots() && slots.insert(slot).second);
        last[unit] = cta;
        first[unit] = first[unit] < 0 ? cta : first[unit];
      }
    }
  }
  std::set<std::vector<int>> seen;
  for (int unit = 0; unit < plan.units(); ++unit) {
    CHECK(plan.first_cta(unit) == first[unit] && plan.last_cta(unit) == last[unit]);
    const Unit at = plan.unit_at(unit);
    CHECK(at.tile >= 0 && at.tile < (at.job == kUp ? plan.up_tiles : plan.down_tiles));
    CHECK(at.rank_block >= 0 && at.rank_block < plan.rank_blocks);
    CHECK(seen.insert({at.job, at.tile, at.rank_block}).second);
  }
  CHECK(workspace_bytes(plan, variant) % 16 == 0 && ticket_count(plan) >= plan.units());
  CHECK(variant.shared_bytes() <= 99 * 1024 && variant.half_s() % 16 == 0 && variant.stage_s() % 16 == 0);
}

int main(int argc, char** argv) {
  std::printf("%d\n", kColumns);
  std::srand(7);
  for (int i = 0; i < std::atoi(argv[argc - 1]); ++i) {
    const bool is_up = std::rand() % 4 > 0, is_down = !is_up || std::rand() % 2 > 0;
    check(1 + std::rand() % 3000, is_up * (1 + std::rand() % 5000), is_down * (1 + std::rand() % 5000),
          1 + std::rand() % 200, std::rand() % 2 > 0, std::rand() % 2 > 0, 1 + std::rand() % 150);
  }
  // Sizes whose products leave 32 bits.
  const Variant variant = variant_for(16, false, false);
  const Plan plan = plan_for(kMaxSize, kMaxSize, kMaxSize, 16, variant, 132);
  CHECK(plan.all_chunks() == int64_t{plan.units()} * plan.chunks && plan.ctas == 264);
  CHECK(plan.last_cta(plan.units() - 1) == 263 && plan.first_chunk(264) == plan.all_chunks());
}
"""


def test_index_arithmetic(tmp_path: Path) -> None:
    program = host_program(tmp_path, ARITHMETIC, *UNDEFINED_BEHAVIOUR_FAILS)
    result = subprocess.run([program, "300"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.split() == [str(cuda_reduce.TILE_COLUMNS)]
