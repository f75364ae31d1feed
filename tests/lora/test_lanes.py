"""Launches on several lanes at once, against the masks of dropout.py and sums that are exact, and against float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from benchmarks import aot
from peft_kernels._core.triton_tools import why_not_environment
from peft_kernels.lora.kernels import config, dropout
from peft_kernels.lora.kernels.dropout import NO_DROPOUT, Dropout, Lanes

if reason := why_not_environment():
    pytest.skip(reason, allow_module_level=True)

from peft_kernels.lora.kernels import triton_bwd, triton_dropout, triton_fwd

pytestmark = pytest.mark.usefixtures("poison")

H100 = aot.HARDWARE[90]
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
PAIRS = [(BF16, BF16), (FP16, FP16), (FP32, FP32), (BF16, FP32), (FP16, FP32)]
RANKS = [(16, 16, 16), (5, 1, 33), (64, 8), (130, 3), (2, 70, 1, 20), (0, 4, 0, 1)]
NUMBERS = (3, 2**32 - 1, 0, 2**31)  # neither in order nor all of 31 bits
M, K = 70, 203  # more than one block of rows, and columns that fill neither blocks nor calls of Philox


class Problem(NamedTuple):
    """x (M, K), A (r, K), S and dY (M, r), y and bias of a rank product, which has K columns; one dropout."""

    x: Tensor
    a: Tensor
    s: Tensor
    y: Tensor
    bias: Tensor
    lanes: Lanes
    drop: Dropout

    @property
    def exact(self) -> bool:
        return self.a.dtype != self.x.dtype

    def keeps(self) -> list[Tensor]:
        seed, limit = self.drop.seed, self.drop.threshold
        assert seed is not None
        return [dropout.keep_mask(seed, M, K, limit, number) for number in self.lanes.numbers]

    def columns(self, of: Tensor, dim: int = 1) -> tuple[Tensor, ...]:
        return of.split(self.lanes.ranks, dim)


def make(
    ranks: tuple[int, ...], dtype: torch.dtype, adapter: torch.dtype, device: torch.device, integers: bool = True
) -> Problem:
    """Half is dropped, and the kept half doubled: of small integers every sum is exact, in float32 and in any order."""
    generator = torch.Generator().manual_seed(sum(ranks))
    r, limit = sum(ranks), 32768

    def drawn(dtype: torch.dtype, *shape: int) -> Tensor:
        if integers:
            return torch.randint(-2, 3, shape, generator=generator).to(device, dtype)
        return torch.randn(*shape, generator=generator).to(device, dtype)

    return Problem(
        x=drawn(dtype, M, K),
        a=drawn(adapter, r, K),
        s=drawn(FP32, M, r),
        y=drawn(dtype, M, K),
        bias=drawn(dtype, K),
        lanes=Lanes(ranks, NUMBERS[: len(ranks)]),
        drop=Dropout(torch.tensor(20240229, device=device), limit, dropout.keep_scale(limit)),
    )


# Each launch, and what it should return, in float64: problem, a scale, and splits where there are any.


def narrow(problem: Problem, factor: float | Tensor = 2.0, splits: int = 1, out: Tensor | None = None) -> Tensor:
    r = problem.a.shape[0]
    chosen = config.narrow_product_config(M, K, r, problem.x.dtype, problem.exact, H100, problem.lanes)
    chosen = dataclasses.replace(chosen, splits=splits)
    x, a, drop = problem.x, problem.a, problem.drop
    return triton_fwd.narrow_product(x, a, factor, drop, problem.exact, chosen, out, problem.lanes)


def narrow_expected(problem: Problem) -> Tensor:
    x, rows = problem.x.double(), problem.columns(problem.a.double(), 0)
    parts = [torch.where(keep, x, 0.0) @ a.t() for keep, a in zip(problem.keeps(), rows, strict=True)]
    return 2.0 * torch.cat(parts, 1)


def reduce(problem: Problem, factor: float | Tensor = 2.0, splits: int = 1) -> Tensor:
    r = problem.s.shape[1]
    chosen = config.reduce_rows_config(M, K, r, problem.x.dtype, problem.exact, H100, problem.lanes)
    chosen = dataclasses.replace(chosen, splits=splits)
    x, s, drop = problem.x, problem.s, problem.drop
    return triton_bwd.reduce_rows(x, s, factor, drop, problem.exact, chosen, problem.lanes)


def reduce_expected(problem: Problem) -> Tensor:
    x, columns = problem.x.double(), problem.columns(problem.s.double())
    parts = [s.t() @ torch.where(keep, x, 0.0) for keep, s in zip(problem.keeps(), columns, strict=True)]
    return 2.0 * torch.cat(parts)


def rank(problem: Problem, factor: float | Tensor = 2.0) -> Tensor:
    chosen = config.rank_product_config(problem.x.dtype, H100, problem.lanes)
    term = triton_fwd.RankProduct(problem.s, problem.a.t(), factor)
    return triton_fwd.rank_product(term, problem.bias, problem.drop, problem.x.dtype, chosen, problem.lanes)


def rank_update(problem: Problem) -> Tensor:
    """Factor and keep_scale are 2."""
    columns, rows = problem.columns(problem.s.double()), problem.columns(problem.a.double(), 0)
    parts = zip(problem.keeps(), columns, rows, strict=True)
    return sum((torch.where(keep, s @ a, 0.0) * 4.0 for keep, s, a in parts), torch.zeros(()))


def rank_expected(problem: Problem) -> Tensor:
    return rank_update(problem) + problem.bias.double()


def add_rank(problem: Problem, factor: float | Tensor = 2.0) -> Tensor:
    chosen, y = config.rank_product_config(problem.x.dtype, H100, problem.lanes), problem.y.clone()
    term = triton_fwd.RankProduct(problem.s, problem.a.t(), factor)
    triton_fwd.add_rank_product(y, term, problem.drop, chosen, problem.lanes)
    return y


def add_rank_expected(problem: Problem) -> Tensor:
    return rank_update(problem) + problem.y.double()


LAUNCHES: dict[str, tuple[Callable[..., Tensor], Callable[[Problem], Tensor]]] = {
    "narrow_product": (narrow, narrow_expected),
    "reduce_rows": (reduce, reduce_expected),
    "rank_product": (rank, rank_expected),
    "add_rank_product": (add_rank, add_rank_expected),
}
SPLIT = ("narrow_product", "reduce_rows")


@pytest.mark.parametrize("name", LAUNCHES)
@pytest.mark.parametrize(
    ("dtype", "adapter"),
    [
        (BF16, FP32),
        (FP16, FP16),
        *(pytest.param(*pair, marks=pytest.mark.thorough) for pair in ((BF16, BF16), (FP32, FP32), (FP16, FP32))),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "ranks",
    [pytest.param(ranks, marks=[pytest.mark.thorough] * (index % 2)) for index, ranks in enumerate(RANKS)],
    ids=str,
)
def test_integers_are_exact(
    ranks: tuple[int, ...], dtype: torch.dtype, adapter: torch.dtype, name: str, device: torch.device
) -> None:
    """To the bit, where the sum of all lanes is rounded once."""
    problem = make(ranks, dtype, adapter, device)
    launch, expected = LAUNCHES[name]
    got, rounded = launch(problem), expected(problem)
    assert torch.equal(got, rounded.to(got.dtype))
    assert torch.equal(launch(problem, torch.tensor(2.0, device=device)), got)


@pytest.mark.parametrize("name", SPLIT)
@pytest.mark.parametrize("ranks", [(5, 1, 33), (130, 3)], ids=str)
def test_sums_of_several_ranges(ranks: tuple[int, ...], name: str, device: torch.device) -> None:
    problem = make(ranks, BF16, FP32, device)
    launch, expected = LAUNCHES[name]
    for splits in (2, 3):
        assert torch.equal(launch(problem, splits=splits).double(), expected(problem))


@pytest.mark.parametrize("name", LAUNCHES)
@pytest.mark.parametrize(("dtype", "adapter"), PAIRS, ids=str)
def test_real_numbers_are_near(dtype: torch.dtype, adapter: torch.dtype, name: str, device: torch.device) -> None:
    """In the norm. Sums of some 200 float32 products round by less than 16 units of 2^-24; S is rounded to the dtype of
    an x that is as wide as A, by at most half a unit, and a half-precision result likewise; TF32 has 11 bits.
    """
    problem = make((5, 1, 33), dtype, adapter, device, integers=False)
    launch, expected = LAUNCHES[name]
    got, exact = launch(problem).double(), expected(problem)
    roundings = 16 * 2.0**-24
    if name not in SPLIT and dtype != FP32:
        roundings += torch.finfo(dtype).eps / 2 + 2.0**-11
    if name == "reduce_rows" and not problem.exact and dtype != FP32:
        roundings += torch.finfo(dtype).eps / 2
    error = float((got - exact).norm() / exact.norm())
    assert error <= roundings, error


@pytest.mark.parametrize("name", LAUNCHES)
def test_two_runs_have_the_same_bits(name: str, device: torch.device) -> None:
    problem = make((16, 16, 16), BF16, FP32, device, integers=False)
    launch, _ = LAUNCHES[name]
    several = {"splits": 3} if name in SPLIT else {}
    assert torch.equal(launch(problem, **several), launch(problem, **several))


@pytest.mark.parametrize("splits", [1, 3])
def test_s_may_be_columns_of_a_wider_matrix(splits: int, device: torch.device) -> None:
    problem = make((5, 1, 33), BF16, BF16, device)
    wide = torch.full((M, 50), 7.0, device=device)
    assert narrow(problem, splits=splits, out=wide[:, 4:43]).data_ptr() == wide[:, 4:].data_ptr()
    assert torch.equal(wide[:, 4:43].double(), narrow_expected(problem))
    assert (wide[:, :4] == 7).all() and (wide[:, 43:] == 7).all()


def _among_nan(matrix: Tensor) -> Tensor:
    rows, cols = matrix.shape
    wide = torch.full((rows, cols + 7), torch.nan, dtype=matrix.dtype, device=matrix.device)
    wide[:, 3 : 3 + cols] = matrix
    return wide[:, 3 : 3 + cols]


@pytest.mark.parametrize("name", LAUNCHES)
def test_strided_rows(name: str, device: torch.device) -> None:
    """Nothing beside a tensor's own columns counts; x and A by columns too."""
    problem = make((5, 1, 33), BF16, FP32, device)
    launch, expected = LAUNCHES[name]
    exact = expected(problem)
    among = problem._replace(x=_among_nan(problem.x), a=_among_nan(problem.a), s=_among_nan(problem.s))
    by_columns = problem._replace(x=problem.x.t().contiguous().t(), a=problem.a.t().contiguous().t())
    for laid_out in (among, by_columns):
        got = launch(laid_out)
        assert torch.equal(got, exact.to(got.dtype))


@pytest.mark.parametrize("name", LAUNCHES)
def test_one_lane_is_the_dropout_s_own(name: str, device: torch.device) -> None:
    """By its number, and then by a dropout that has it; a lane other than 0 without lanes."""
    launch, expected = LAUNCHES[name]
    problem = make((33,), BF16, BF16, device)
    for number in (0, 5, 2**32 - 1):
        one = problem._replace(lanes=Lanes((33,), (number,)))
        got = launch(one)
        assert torch.equal(got, expected(one).to(got.dtype))
        assert triton_dropout.lane_constants(problem.drop, one.lanes) == triton_dropout.lane_constants(
            problem.drop._replace(lane=number), None
        )


def test_without_a_mask_there_is_one_product() -> None:
    assert triton_dropout.lane_constants(NO_DROPOUT, Lanes((4, 4), (0, 1))) == ((), (0,))
    assert triton_dropout.lane_constants(NO_DROPOUT, None) == ((), (0,))


def test_programs_of_one_tile_follow_each_other() -> None:
    """A block of ranks for each lane, or several, on the first axis, which alone has room for all rows."""
    assert triton_dropout.grid_of(70000, 40, (), 16, 2) == (70000, 3, 2)
    assert triton_dropout.grid_of(70000, 40, (5, 1, 34), 16, 2) == (5 * 70000, 1, 2)


@pytest.mark.parametrize("name", SPLIT)
def test_a_program_writes_its_own_lane_alone(name: str, monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """The first one, launched by itself: where it wrote the next lane's ranks, that lane's program may come before."""
    problem = make((5, 1, 33), BF16, BF16, device)
    launch, expected = LAUNCHES[name]
    for module in (triton_fwd, triton_bwd):
        monkeypatch.setattr(module, "grid_of", lambda *sizes: (1, 1, 1))
    got, exact = launch(problem), expected(problem)
    if name == "reduce_rows":
        got, exact = got.t(), exact.t()
    written = ~got.isnan()
    assert written[0, :5].all() and not written[:, 5:].any()
    assert torch.equal(got[written].double(), exact[written])


@pytest.mark.thorough
@pytest.mark.parametrize("name", LAUNCHES)
@pytest.mark.parametrize("fault", ["another lane's mask", "one mask for all lanes", "the call's lane", "last block"])
def test_each_fault_is_seen(fault: str, name: str, monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """Two lanes; the first has two blocks of ranks, so its last one is not the launch's."""
    problem = make((130, 3), BF16, BF16, device)
    launch, expected = LAUNCHES[name]
    assert _is_right(launch(problem), expected(problem))
    numbers = {
        "another lane's mask": problem.lanes.numbers[::-1],
        "one mask for all lanes": problem.lanes.numbers[:1] * 2,
        "the call's lane": (0, 0),
        "last block": problem.lanes.numbers,
    }[fault]
    wrong = problem._replace(lanes=Lanes(problem.lanes.ranks, numbers))
    if fault == "last block":
        if name not in SPLIT:
            wrong = problem._replace(lanes=Lanes((128, 5), numbers))
        for module in (triton_fwd, triton_bwd):
            monkeypatch.setattr(module, "grid_of", _one_block_less)
    assert not _is_right(launch(wrong), expected(problem))


def _one_block_less(tiles: int, r: int, ranks: tuple[int, ...], block_r: int, splits: int) -> tuple[int, int, int]:
    programs, *others = triton_dropout.grid_of(tiles, r, ranks, block_r, splits)
    return programs - 1, *others


def _is_right(got: Tensor, expected: Tensor) -> bool:
    return torch.equal(got, expected.to(got.dtype))
