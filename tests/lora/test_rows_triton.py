"""``lora_rows`` on Triton, against the oracle row by row and eager torch: spans, lanes, what nobody reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from peft_kernels import UnsupportedError
from peft_kernels._core.device import INTERPRETER
from peft_kernels._core.triton_tools import why_not_environment
from peft_kernels.lora.kernels import config
from peft_kernels.lora.members import Needs
from peft_kernels.lora.rows import triton_impl
from peft_kernels.lora.rows.op import OPERATOR, rows_call, table_of
from peft_kernels.lora.rows.problem import Inputs
from python_ref import compare
from tests.contract.draw import MATRIX_LAYOUTS, laid_out
from tests.lora.slot_calls import BF16, DTYPES, FP16, FP32, SEED, Call, Case, assert_exact, make, shuffled

if reason := why_not_environment():
    pytest.skip(reason, allow_module_level=True)

from peft_kernels.lora.kernels import triton_rows, triton_rows_bwd

_P = (0.3, 0.0, 0.5)
BUDGET = (
    *(
        Case(shuffled(20, 13, 1, base=9), k=50, n=(35,), ps=(ps,), dtype=dtype, adapters=(adapter,))
        for dtype, adapter in DTYPES
        for ps in ((0.0,) * 3, _P)
    ),
    # Members that share x, of which one has two updates and one none; ranks beyond a block, and none.
    *(
        Case(
            shuffled(30, 0, 21, 19, base=6), 72, (40, 24, 9), (0, 0, 2), ((5, 16, 0, 8), (140, 3, 8, 33), (16,) * 4),
            ((0.3, 0.1, 0.0, 0.5), (0.0, 0.3, 0.3, 0.1), (0.1,) * 4), dtype, (adapter,) * 3,
        )
        for dtype, adapter in ((BF16, FP32),)
    ),
    # Few rows and a long reduction: K is split between programs.
    *(
        Case(shuffled(5, 4, 2), 1100, (24, 8), (0, 1), ((5, 20, 8),) * 2, (_P,) * 2, dtype, (adapter,) * 2)
        for dtype, adapter in ((BF16, FP32),)
    ),
    Case(shuffled(30, 3, 9, base=5), ps=(_P,), layout="columns", dtype=BF16, adapters=(BF16,)),
    Case(shuffled(30, 3, 9, base=5), ps=(_P,), layout="strided", dtype=BF16, adapters=(FP32,)),
    Case(shuffled(30, 3, 9, base=5), ps=(_P,), layout="expanded", dtype=BF16, adapters=(BF16,)),
)  # fmt: skip


@pytest.mark.parametrize("case", BUDGET, ids=str)
def test_error_budget(case: Case, device: torch.device, poison: None) -> None:
    calls = [make(case, device, seed) for seed in range(3)]
    ours, eager, exact = ([getattr(call, run)() for call in calls] for run in ("run", "eager", "exact"))
    assert ours[0].keys() == exact[0].keys()
    for name in ours[0]:
        stacked = (torch.stack([results[name] for results in each]) for each in (ours, eager, exact))
        compare.assert_close(name, *stacked)


@st.composite
def _cases(draw: st.DrawFn) -> Case:
    """Up to 7 slots, 3 members, 4 updates; rows sorted, shuffled, one a slot, without adapters, or none at all."""
    slots, count, m = draw(st.integers(1, 7)), draw(st.integers(1, 3)), draw(st.integers(0, 45))
    slot = draw(
        st.one_of(
            st.lists(st.integers(-1, slots - 1), min_size=m, max_size=m),
            st.lists(st.integers(-1, slots - 1), min_size=m, max_size=m).map(sorted),
            st.permutations(range(slots)),
            st.just([-1] * m),
            st.just([slots - 1] * m),
        )
    )
    owners = sorted(draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=4)))
    updates = range(len(owners))

    def of_slots(values: Any) -> tuple[Any, ...]:
        return tuple(tuple(draw(st.sampled_from(values)) for _ in range(slots)) for _ in updates)

    return Case(
        tuple(slot),
        k=draw(st.integers(1, 70)),
        n=tuple(draw(st.integers(1, 70)) for _ in range(count)),
        owners=tuple(owners),
        ranks=of_slots((0, 1, 3, 8, 16, 17, 33, 140)),
        ps=of_slots((0.0, 0.5)) if draw(st.booleans()) else ((0.0,) * slots,) * len(owners),
        dtype=draw(st.sampled_from((FP32, BF16, FP16))),
        adapters=tuple(draw(st.sampled_from((None, FP32))) for _ in updates),
        layout=draw(st.sampled_from(MATRIX_LAYOUTS)),
    )


@settings(max_examples=6, deadline=None)
@given(case=_cases(), seed=st.integers(0, 1000))
def test_integers_are_exact_to_the_bit(case: Case, seed: int) -> None:
    """Whatever the slots, so every index is right."""
    assert_exact(case, torch.device("cuda" if torch.cuda.is_available() else "cpu"), seed)


@pytest.mark.parametrize("slots", [1, 16, 17, 300, config.MOST_SLOTS])
def test_however_many_slots(slots: int, device: torch.device) -> None:
    """The first, the last and some between, in vectors of every length; the slots' ranks vary."""
    used = sorted({0, slots // 3, slots // 2, slots - 1})
    slot = (*used, -1, *reversed(used))
    ranks = tuple((5, 0, 8, 3)[(slots - 1 - t) % 4] for t in range(slots))
    assert_exact(Case(slot, k=9, n=(5,), ranks=(ranks,), ps=((0.5,) * slots,)), device)


def test_too_many_slots_are_refused(device: torch.device) -> None:
    slots = config.MOST_SLOTS + 1
    call = make(Case((0, 1), k=3, n=(2,), ranks=((1,) * slots,), ps=((0.0,) * slots,)), device)
    with pytest.raises(UnsupportedError, match="among 4096 at most, got 4097"):
        call.run()


def test_float64_is_refused(device: torch.device) -> None:
    with pytest.raises(UnsupportedError, match="float64"):
        make(Case((0, 1, 2), dtype=torch.float64), device).run()


@pytest.mark.parametrize("r", [8, pytest.param(40, marks=pytest.mark.thorough)])
@pytest.mark.parametrize("beyond", [-1, 0, 1])
def test_ends_of_tiles_and_spans(beyond: int, r: int, device: torch.device) -> None:
    """Slots of a span's rows and one more or less, which is a last span of one row; and of a tile's, and of several.

    The narrow rank takes one pass over dY, the other two.
    """
    m, slots = 330, 3
    facts = slots, FP32, False, INTERPRETER
    spans = {
        triton_rows_bwd.rows_of_span(m, config.rows_narrow_and_reduce_config(m, 24, r, *facts)),
        triton_rows_bwd.rows_of_span(m, config.rows_reduce_config(m, 40, r, *facts)),
    }
    tiles = {
        config.rows_narrow_product_config(m, 40, r, *facts).BLOCK_M,
        config.rows_rank_product_config(m, slots, FP32, INTERPRETER).BLOCK_M,
    }
    for rows in spans | tiles:
        assert rows < m / 2, "a slot of several"
        counts = rows + beyond, 2 * rows + beyond if 3 * rows + 2 < m else 7
        slot = shuffled(*counts, 2, base=m - sum(counts) - 2)
        assert_exact(Case(slot, ranks=((r, 3, r),), ps=((0.5, 0.0, 0.5),)), device)


def _inputs(call: Call) -> Inputs:
    """What an implementation takes."""
    found: list[Inputs] = []
    keep = mock.Mock(side_effect=lambda given, backend: found.append(given) or (call.x,))
    with mock.patch("peft_kernels.lora.rows.op.OPERATOR", keep):
        rows_call(call.x, call.weights, call.biases, call.updates, call.rows, SEED, "triton")
    return found[0]


def _needs(inputs: Inputs, **others: Any) -> Needs:
    count = len(inputs.members)
    asked = {"x": True, "lora_a": (True,) * count, "lora_b": (True,) * count}
    none = (False,) * len(inputs.weights)
    return Needs(**{"weights": none, "biases": none, **asked, **others})


def _several(dtype: torch.dtype = BF16) -> Case:
    return Case(
        shuffled(20, 0, 11, 5, base=6), 40, (20, 12), (0, 0, 1), ((5, 16, 0, 8), (40, 3, 8, 33), (8, 16, 3, 0)),
        ((0.5, 0.1, 0.0, 0.5), (0.0, 0.3, 0.3, 0.1), (0.1,) * 4), dtype, (None,) * 3,
    )  # fmt: skip


def test_nobody_reads_what_no_slot_has(device: torch.device) -> None:
    """nan in the factors of an adapter without rows, and wherever S has no value, reaches nothing."""
    call = make(_several(), device)
    inputs = _inputs(call)
    problem = OPERATOR.make_problem(inputs)
    with torch.no_grad():
        wanted_ys = triton_impl.forward(problem, inputs)
        s = wanted_ys[-1]
        wanted = triton_impl.backward(problem, inputs, s, call.dys, _needs(inputs))
        is_of_slot = torch.zeros_like(s, dtype=torch.bool)
        for index, (ranks, columns) in enumerate(zip(call.case.ranks, problem.columns, strict=True)):
            for t, rank in enumerate(ranks):
                is_of_slot[inputs.first[t] : inputs.first[t + 1], columns.start : columns.start + rank] = True
            absent = slice(ranks[0], ranks[0] + ranks[1])
            inputs.lora_a[index][absent] = torch.nan
            inputs.lora_b[index][:, absent] = torch.nan
        s = torch.where(is_of_slot, s, torch.nan)
        ys = triton_impl.forward(problem, inputs)
        gradients = triton_impl.backward(problem, inputs, s, call.dys, _needs(inputs))
    assert is_of_slot.any() and not is_of_slot.all()
    for j in range(2):
        compare.assert_bitwise_equal(f"y{j}", ys[j], wanted_ys[j])
    compare.assert_bitwise_equal("s", ys[-1][is_of_slot], wanted_ys[-1][is_of_slot])
    compare.assert_bitwise_equal("dx", gradients.x, wanted.x)
    for name in ("lora_a", "lora_b"):
        for got, expected in zip(getattr(gradients, name), getattr(wanted, name), strict=True):
            compare.assert_bitwise_equal(name, got, expected)
    for index, ranks in enumerate(call.case.ranks):
        absent = slice(ranks[0], ranks[0] + ranks[1])
        assert not gradients.lora_a[index][absent].any() and not gradients.lora_b[index][:, absent].any()


def test_a_nan_stays_in_its_row_and_slot(device: torch.device) -> None:
    case = Case((1, 0, -1, 0, 1), ranks=((3, 8),), ps=((0.0, 0.0),))
    call = make(case, device)
    x = call.x.detach().clone()
    x[1] = torch.nan
    results = dataclasses.replace(call, x=x.requires_grad_()).run()
    clean = call.run()
    others = [0, 2, 3, 4]
    compare.assert_bitwise_equal("y", results["y0"][others], clean["y0"][others])
    compare.assert_bitwise_equal("x", results["x"], clean["x"])
    compare.assert_bitwise_equal("a", results["a0"][3:], clean["a0"][3:])
    compare.assert_bitwise_equal("b", results["b0"][:, 3:], clean["b0"][:, 3:])
    assert results["a0"][:3].isnan().all() and results["b0"][:, :3].isnan().all()


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_rows_without_an_adapter_keep_the_bits_of_the_frozen_layer(dtype: torch.dtype, device: torch.device) -> None:
    """Forward and backward, also those whose adapter has no rank here."""
    case = Case(shuffled(3, 5, 4, base=6), ranks=((3, 0, 8),), ps=((0.5, 0.5, 0.0),), dtype=dtype)
    call = make(case, device)
    frozen, results = [t not in (0, 2) for t in case.slot], call.run()
    (weight,), (bias,) = call.weights, call.biases
    y, dx = F.linear(call.x, weight, bias).detach(), call.dys[0] @ weight
    compare.assert_bitwise_equal("y", results["y0"][frozen], y[frozen])
    compare.assert_bitwise_equal("dx", results["x"][frozen], dx[frozen])
    assert not (results["y0"] == y).all(1)[[not each for each in frozen]].any()


def test_rows_without_ranks_are_not_written(device: torch.device) -> None:
    """A sum with zero would lose the sign of a negative zero."""
    slot, ranks = (-1, 0, 1, 0), (0, 3)
    call = make(Case(slot, k=4, n=(5,), ranks=(ranks,), ps=((0.0, 0.0),)), device)
    table, rows = call.updates[0].table, call.rows
    y, s = torch.full((4, 5), -0.0, device=device), torch.full((4, 3), torch.nan, device=device)
    s[3] = 1.0
    lane = triton_rows.Lane(call.lora_b[0].detach(), table.device, table.width)
    plan, scales = triton_rows.Plan(rows.order, rows.first), torch.ones(2, device=device)
    chosen = config.rows_rank_product_config(4, 2, FP32, INTERPRETER)
    triton_rows.add_rank_product(y, s, [lane], plan, scales, None, chosen)
    assert torch.signbit(y[[0, 1, 3]]).all() and (y[[0, 1, 3]] == 0).all()
    torch.testing.assert_close(y[2], call.lora_b[0].detach().sum(1))


def test_gradients_do_not_depend_on_which_others_are_asked_for(device: torch.device) -> None:
    call = make(_several(), device)
    inputs = _inputs(call)
    problem, count = OPERATOR.make_problem(inputs), len(inputs.members)

    def gradients(needs: Needs, read: Inputs) -> Any:
        with torch.no_grad():
            return triton_impl.backward(problem, read, s, call.dys, needs)

    with torch.no_grad():
        *_, s = triton_impl.forward(problem, inputs)
    every, none = gradients(_needs(inputs), inputs), (False,) * count
    one = (False, True, False)
    of_a = gradients(_needs(inputs, x=False, lora_a=one, lora_b=none), inputs._replace(lora_a=(None,) * count))  # type: ignore[arg-type]
    of_b = gradients(
        _needs(inputs, x=False, lora_a=none, lora_b=one),
        inputs._replace(x=None, lora_a=(None,) * count, seed=None),  # type: ignore[arg-type]
    )
    of_x = gradients(_needs(inputs, lora_a=none, lora_b=none), inputs)
    compare.assert_bitwise_equal("a", of_a.lora_a[1], every.lora_a[1])
    compare.assert_bitwise_equal("b", of_b.lora_b[1], every.lora_b[1])
    compare.assert_bitwise_equal("x", of_x.x, every.x)
    assert of_a.x is None and of_a.lora_b == (None,) * count and of_a.lora_a[::2] == (None, None)
    assert of_x.lora_a == of_x.lora_b == (None,) * count


def test_two_runs_have_the_same_bits(device: torch.device, poison: None) -> None:
    call = make(dataclasses.replace(_several(), slot=shuffled(70, 0, 20, 3, base=7)), device)
    first, second = call.run(), call.run()
    for name, value in first.items():
        compare.assert_bitwise_equal(name, second[name], value)


def test_factors_of_any_strides(device: torch.device) -> None:
    """Lanes of other strides are launches of their own."""
    ps = ((0.5, 0.0, 0.0, 0.5),) * 3
    call = make(dataclasses.replace(_several(FP32), ps=ps), device, is_exact=True)
    plain = call.run()

    def by_columns(factor: Tensor) -> Tensor:
        return laid_out(factor.detach(), "columns").requires_grad_()

    a, b = call.lora_a, call.lora_b
    strided = dataclasses.replace(
        call, lora_a=(a[0], by_columns(a[1]), by_columns(a[2])), lora_b=(by_columns(b[0]), b[1], by_columns(b[2]))
    )
    for name, value in strided.run().items():
        compare.assert_bitwise_equal(name, value + 0.0, plain[name] + 0.0)


@pytest.mark.parametrize("updates", [1, 3, 4, 5])
def test_lanes_share_launches_over_x(updates: int, device: torch.device) -> None:
    """x is read by one launch a pass for at most four updates, and dX's update written by one."""
    counts = dict.fromkeys(("narrow_product", "add_rank_product", "narrow_and_reduce", "reduce_rows"), 0)

    def counting(module: Any, name: str) -> Any:
        function = getattr(module, name)

        def counted(*arguments: Any) -> None:
            counts[name] += 1
            function(*arguments)

        return mock.patch.object(module, name, counted)

    case = Case(
        shuffled(5, 9, base=3), 16, (8,) * updates, tuple(range(updates)), ((3, 8),) * updates,
        ((0.5, 0.0),) * updates, BF16, (None,) * updates,
    )  # fmt: skip
    launches = -(-updates // config.MOST_LANES)
    with (
        counting(triton_rows, "narrow_product"),
        counting(triton_rows, "add_rank_product"),
        counting(triton_rows_bwd, "narrow_and_reduce"),
        counting(triton_rows_bwd, "reduce_rows"),
    ):
        make(case, device).run()
    assert list(counts.values()) == [launches, updates + launches, updates, launches]


@pytest.mark.parametrize(
    ("ranks", "expected"), [((8, 16, 0), 8), ((16,), 8), ((8, 4, 8), 1), ((4, 8, 4), 1), ((12, 4), 1), ((), 8)]
)
def test_only_ranks_that_allow_it_are_read_as_vectors(ranks: tuple[int, ...], expected: int) -> None:
    """A wrong multiple would be a misaligned load on a GPU, which the interpreter does not see."""
    assert triton_impl._multiple(table_of(ranks, 0.0, torch.device("cpu")).host) == expected


def _bounds(m: int, slots: int, rows: int) -> Iterator[tuple[int, int, int]]:
    """For random slots: tiles, slots of several spans, and the spans of those."""
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        slot = torch.randint(-1, max(1, seed * slots // 4), (m,), generator=generator)
        counts = torch.bincount(slot[slot >= 0], minlength=slots)
        tiles = -(-counts // rows)
        yield int(tiles.sum()), int((tiles > 1).sum()), int(tiles[tiles > 1].sum())


@pytest.mark.parametrize("rows", [1, 2, 16, 48])
@pytest.mark.parametrize(("m", "slots"), [(1, 1), (1, 9), (33, 4), (48, 1), (49, 1), (97, 2), (200, 300)])
def test_bounds_that_the_host_knows_hold(m: int, slots: int, rows: int) -> None:
    plan = triton_rows.Plan(torch.empty(m, dtype=torch.int32), torch.empty(slots + 1, dtype=torch.int32))
    several = triton_rows_bwd.most_slots_of_several(m, rows)
    for tiles, slots_of_several, their_spans in _bounds(m, slots, rows):
        assert tiles <= plan.tiles(rows)
        assert slots_of_several <= several and their_spans <= 2 * several
