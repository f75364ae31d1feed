"""``lora_rows`` beyond the contract: random members and slots against autograd, rows without one, what is read."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import peft_kernels as pk
from peft_kernels._core.triton_tools import why_not_environment
from peft_kernels.lora.rows.op import SlotUpdate, rows_call, table_of
from python_ref import compare
from tests.contract.draw import Draw
from tests.lora.rows_cases import VARIANTS

SEED = 20240229
each_backend = pytest.mark.parametrize(
    "backend",
    [
        pytest.param(
            name,
            marks=pytest.mark.skipif(
                name == "triton" and why_not_environment() is not None, reason=str(why_not_environment())
            ),
        )
        for name in VARIANTS
    ],
)


@dataclasses.dataclass
class Problem:
    """A call in float64: P members, L updates, and the slot of each row."""

    x: Tensor
    weights: tuple[Tensor, ...]
    biases: tuple[Tensor | None, ...]
    members: list[int]
    lora_a: list[Tensor]
    lora_b: list[Tensor]
    ranks: list[list[int]]
    scales: list[list[float]]
    ps: list[list[float]]
    lanes: list[int]
    slot: list[int]
    slots: int

    @property
    def leaves(self) -> list[Tensor]:
        biases = [bias for bias in self.biases if bias is not None]
        return [self.x, *self.weights, *biases, *self.lora_a, *self.lora_b]

    def call(self, rows: pk.Rows | None = None, **options: Any) -> tuple[Tensor, ...]:
        rows = rows or pk.Rows.of(self.slot, known=self.slots)
        updates = [
            SlotUpdate(*each[:4], table_of(each[4], each[5], self.x.device), each[6])
            for each in zip(
                self.members, self.lora_a, self.lora_b, self.scales, self.ranks, self.ps, self.lanes, strict=True
            )
        ]
        return rows_call(self.x, self.weights, self.biases, updates, rows, SEED, **options)

    def by_definition(self) -> list[Tensor]:
        """Row by row by torch's own operations, with the masks that the package hands out."""
        ys = [list(F.linear(self.x, w, b)) for w, b in zip(self.weights, self.biases, strict=True)]
        for index, member in enumerate(self.members):
            a, b = self.lora_a[index].split(self.ranks[index]), self.lora_b[index].split(self.ranks[index], dim=1)
            for t, p in enumerate(self.ps[index]):
                keep = pk.lora_linear_dropout_mask(SEED, *self.x.shape, p, lane=self.lanes[index])
                for m, used in enumerate(self.slot):
                    if used == t:
                        dropped = torch.where(keep[m], self.x[m], 0.0) / (1.0 - round(p * 65536) / 65536)
                        ys[member][m] = ys[member][m] + self.scales[index][t] * (b[t] @ (a[t] @ dropped))
        empty = self.x.new_zeros(0)
        return [
            torch.stack(rows) if rows else empty.view(0, w.shape[0]) for rows, w in zip(ys, self.weights, strict=True)
        ]


@st.composite
def _problems(draw: st.DrawFn) -> Problem:
    sizes = st.integers(1, 9)
    m, k, count, slots = draw(st.integers(1, 24)), draw(sizes), draw(st.integers(1, 3)), draw(st.integers(1, 7))
    values = Draw(draw(st.integers(0, 1000)))

    def leaf(*shape: int) -> Tensor:
        return values.normal(*shape).requires_grad_()

    def of_slots(strategy: st.SearchStrategy[Any]) -> list[Any]:
        return draw(st.lists(strategy, min_size=slots, max_size=slots))

    n = [draw(sizes) for _ in range(count)]
    members = sorted(draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=2 * count)))
    ranks = [of_slots(st.integers(0, 5)) for _ in members]
    return Problem(
        leaf(m, k),
        tuple(leaf(each, k) for each in n),
        tuple(leaf(each) if draw(st.booleans()) else None for each in n),
        members,
        [leaf(sum(each), k) for each in ranks],
        [leaf(n[member], sum(each)) for member, each in zip(members, ranks, strict=True)],
        ranks,
        [of_slots(st.sampled_from([0.5, -2.0, 0.0])) for _ in members],
        [of_slots(st.sampled_from([0.0, 0.1, 0.5])) for _ in members],
        draw(st.lists(st.integers(0, 2**32 - 1), min_size=len(members), max_size=len(members), unique=True)),
        draw(st.lists(st.integers(-1, slots - 1), min_size=m, max_size=m)),
        slots,
    )


def _results(problem: Problem, ys: Any, used: list[bool]) -> list[Tensor | None]:
    kept = [y for y, is_used in zip(ys, used, strict=True) if is_used]
    draw = Draw(1)
    dys = [draw.normal(*y.shape) for y in kept]
    return [*kept, *torch.autograd.grad(kept, problem.leaves, dys, allow_unused=True)]


@settings(max_examples=150, deadline=None)
@given(problem=_problems(), data=st.data())
def test_random_problems_are_autograd_s(problem: Problem, data: st.DataObject) -> None:
    """Values and gradients in float64; also where only the device knows the rows, and some outputs are unused."""
    used = data.draw(st.lists(st.booleans(), min_size=len(problem.weights), max_size=len(problem.weights)).filter(any))
    rows = pk.Rows.of(problem.slot, known=problem.slots)
    if data.draw(st.booleans()):
        rows = dataclasses.replace(rows, runs=None)
    ours = _results(problem, problem.call(rows), used)
    wanted = _results(problem, problem.by_definition(), used)
    for got, expected in zip(ours, wanted, strict=True):
        # Zeros of an adapter without rows are None to autograd, which sees no use of it.
        if expected is None:
            assert got is None or not got.any()
        else:
            assert got is not None
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def _layer(
    dtype: torch.dtype, ranks: tuple[int, ...] = (5, 0, 16), m: int = 37, n: int = 24, k: int = 40
) -> dict[str, Any]:
    draw, r = Draw(0), sum(ranks)
    return {
        "x": draw.normal(m, k).to(dtype),
        "weight": draw.normal(n, k, std=k**-0.5).to(dtype),
        "lora_a": draw.normal(r, k, std=k**-0.5).to(dtype),
        "lora_b": draw.normal(n, r, std=0.25).to(dtype),
        "scale": [0.5 + t for t in range(len(ranks))],
        "bias": draw.normal(n).to(dtype),
        "ranks": ranks,
        "seed": SEED,
    }


def _slots(m: int, count: int) -> list[int]:
    return torch.randint(-1, count, (m,), generator=torch.Generator().manual_seed(m)).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("p", [0.0, 0.3])
@each_backend
def test_rows_without_an_adapter_have_the_bits_of_the_base(backend: str, p: float, dtype: torch.dtype) -> None:
    """In y and in dX; a slot of rank 0 is no adapter either."""
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("refused")
    layer = _layer(dtype)
    layer["x"].requires_grad_()
    slot = _slots(37, 3)
    y = pk.lora_linear(**layer, rows=pk.Rows.of(slot, known=3), dropout_p=p, backend=backend)
    base = F.linear(layer["x"], layer["weight"], layer["bias"])
    dy = Draw(1).normal(*y.shape).to(dtype)
    (dx,), (expected,) = (torch.autograd.grad(each, layer["x"], dy) for each in (y, base))
    plain = torch.tensor([t in (-1, 1) for t in slot])
    assert 5 < plain.sum() < 32
    compare.assert_bitwise_equal("y", y[plain].detach(), base[plain].detach())
    compare.assert_bitwise_equal("dx", dx[plain], expected[plain])
    assert not torch.isclose(y, base, rtol=1e-2).all(1)[~plain].any()


@pytest.mark.parametrize("host_knows", [True, False])
@pytest.mark.parametrize("p", [0.0, 0.3])
@each_backend
def test_what_a_row_does_not_use_reaches_nothing(backend: str, p: float, host_knows: bool) -> None:
    """Neither nan in adapters without rows, nor inf in other rows."""
    layer = _layer(torch.float32, (4, 3, 6))
    slot = [0, 2] * 18 + [-1]
    rows = pk.Rows.of(slot, known=3)
    if not host_knows:
        rows = dataclasses.replace(rows, runs=None)

    def run(**changed: Tensor) -> dict[str, Tensor]:
        given = layer | changed
        leaves = {name: given[name].detach().requires_grad_() for name in ("x", "lora_a", "lora_b")}
        y = pk.lora_linear(**given | leaves, rows=rows, dropout_p=p, backend=backend)
        gradients = torch.autograd.grad(y[::2].sum(), list(leaves.values()))
        return {"y": y.detach(), **dict(zip(leaves, gradients, strict=True))}

    expected = run()
    lora_a, lora_b, x = layer["lora_a"].clone(), layer["lora_b"].clone(), layer["x"].clone()
    lora_a[4:7], lora_b[:, 4:7] = math.nan, math.nan
    got = run(lora_a=lora_a, lora_b=lora_b)
    for name, value in got.items():
        compare.assert_bitwise_equal(name, value, expected[name])
    assert not got["lora_a"][4:7].any() and not got["lora_b"][:, 4:7].any()
    x[1::2] = math.inf
    got = run(x=x)
    compare.assert_bitwise_equal("y", got["y"][::2], expected["y"][::2])
    compare.assert_bitwise_equal("dx", got["x"][::2], expected["x"][::2])
    compare.assert_bitwise_equal("da", got["lora_a"][:4], expected["lora_a"][:4])


@pytest.mark.parametrize("p", [0.0, 0.3])
@each_backend
def test_a_row_s_mask_is_its_own(backend: str, p: float) -> None:
    """A mixed batch is made of what each adapter does to all rows alone."""
    layer = _layer(torch.float32, (4, 3, 6))
    slot = _slots(37, 3)
    y = pk.lora_linear(**layer, rows=pk.Rows.of(slot, known=3), dropout_p=[p, p / 2, 0.0], backend=backend)
    first = 0
    for t, rank in enumerate(layer["ranks"]):
        ranks = slice(first, first := first + rank)
        x, weight, bias, seed = (layer[name] for name in ("x", "weight", "bias", "seed"))
        a, b, scale = layer["lora_a"][ranks], layer["lora_b"][:, ranks], layer["scale"][t]
        p_t = (p, p / 2, 0.0)[t]
        alone = pk.lora_linear(x, weight, a, b, scale, bias, dropout_p=p_t, seed=seed, backend=backend)
        mine = torch.tensor([used == t for used in slot])
        torch.testing.assert_close(y[mine], alone[mine], rtol=1e-5, atol=1e-5)


@each_backend
def test_work_is_that_of_the_rows_own_adapters(backend: str) -> None:
    """FLOPs of the torch backend, counted: a batch of T adapters costs what one adapter does."""
    if backend != "torch":
        pytest.skip("torch counts no kernel's")

    def flops(slots: int) -> int:
        layer = _layer(torch.float32, (4,) * slots, m=36)
        leaves = [layer[name].requires_grad_() for name in ("x", "lora_a", "lora_b")]
        rows = pk.Rows.of([row % slots for row in range(36)], known=slots)
        with FlopCounterMode(display=False) as counter:
            y = pk.lora_linear(**layer, rows=rows)
            torch.autograd.grad(y.sum(), leaves)
        return counter.get_total_flops()

    assert flops(1) == flops(6) > 0


@each_backend
def test_a_group_by_rows_is_its_members_by_rows(backend: str) -> None:
    """With a mask for each member, and ranks that differ between members and slots."""
    draw, k = Draw(0), 40
    x = draw.normal(30, k).float()
    ranks = [(3, 0, 5), (2, 4, 1)]
    members = [
        pk.Member(
            draw.normal(n, k, std=k**-0.5).float(),
            draw.normal(sum(r), k, std=k**-0.5).float(),
            draw.normal(n, sum(r), std=0.3).float(),
            [1.0, 2.0, 0.5],
        )
        for n, r in zip((16, 9), ranks, strict=True)
    ]
    rows = pk.Rows.of(_slots(30, 3), known=3)
    ys = pk.lora_group(x, members, rows=rows, ranks=ranks, backend=backend)
    for y, member, of_member in zip(ys, members, ranks, strict=True):
        alone = pk.lora_linear(x, *member[:4], rows=rows, ranks=of_member, backend=backend)
        torch.testing.assert_close(y, alone, rtol=1e-6, atol=1e-6)
    dropped = pk.lora_group(x, members, rows=rows, ranks=ranks, dropout_p=0.5, seed=SEED, backend=backend)
    first = pk.lora_linear(x, *members[0][:4], rows=rows, ranks=ranks[0], dropout_p=0.5, seed=SEED, backend=backend)
    torch.testing.assert_close(dropped[0], first, rtol=1e-6, atol=1e-6)
    second = pk.lora_linear(x, *members[1][:4], rows=rows, ranks=ranks[1], dropout_p=0.5, seed=SEED, backend=backend)
    assert not torch.allclose(dropped[1], second)


@pytest.mark.parametrize("ranks", [(3, 4), ((3, 4), (5, 1))], ids=str)
def test_ranks_of_all_members_or_of_each(ranks: Any) -> None:
    of_each = ranks if isinstance(ranks[0], tuple) else [ranks] * 2
    members = [pk.Member(torch.ones(4, 6), torch.ones(sum(r), 6), torch.ones(4, sum(r))) for r in of_each]
    rows = pk.Rows.of([1, 0, -1], known=2)
    ys = pk.lora_group(torch.ones(3, 6), members, rows=rows, ranks=ranks)
    for y, (first, second) in zip(ys, of_each, strict=True):
        assert y[:, 0].tolist() == [6 + 6 * second, 6 + 6 * first, 6]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, m, rows: pk.lora_group(x, [m, m], rows=rows), "ranks must be a sequence of each slot's, got None"),
        (lambda x, m, rows: pk.lora_group(x, [m], ranks=(1,)), "ranks are those of the slots of rows, which is None"),
        (lambda x, m, rows: pk.lora_linear(x, *m, ranks=(1,)), "ranks are those of the slots of rows, which is None"),
        (lambda x, m, rows: pk.lora_linear(x, *m, dropout_p=[0.1]), "dropout_p must be one number but with rows"),
        (lambda x, m, rows: pk.lora_group(x, [m], rows=rows, ranks=[(1,), (1,)]), "or 1 such, as there are members"),
    ],
)
def test_wrong_use_of_ranks_is_named(call: Any, message: str) -> None:
    member = pk.Member(torch.ones(4, 6), torch.ones(1, 6), torch.ones(4, 1))
    with pytest.raises(ValueError, match=message):
        call(torch.ones(3, 6), member, pk.Rows.of([0, 0, -1]))


def test_tables_and_scales_are_made_once() -> None:
    """Layers whose slots are alike have one table, and inference mode leaves none that a backward pass cannot keep."""
    with torch.inference_mode():
        made = table_of((3, 4), (0.5, 0.0), torch.device("cpu"))
    again = table_of([3, 4], [0.5, 0.0], torch.device("cpu"))
    assert made.device is again.device and not made.device.is_inference()
    assert table_of((3, 4), 0.5, torch.device("cpu")).device is not made.device


@each_backend
def test_other_plans_are_other_results(backend: str) -> None:
    """Of calls that differ in the rows' slots alone, whose plans have one key."""
    layer = _layer(torch.float32, (4, 3))
    plans = [pk.Rows.of(slot, known=2) for slot in ([0] * 37, [1] * 37, [-1] * 37)]
    ys = [pk.lora_linear(**layer, rows=rows, backend=backend) for rows in plans]
    assert not any(torch.equal(one, other) for one, other in itertools.combinations(ys, 2))
