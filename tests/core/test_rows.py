"""The plan of rows: what it says of random slots, its means, and what it refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import peft_kernels as pk


def _check_plan(rows: pk.Rows, slots: list[int], count: int) -> None:
    """Each row is in its slot's part of ``order`` and of ``runs``, in rising order; those without one are in none."""
    assert rows.slot.tolist() == slots and rows.slots == count
    assert sorted(rows.order.tolist()) == list(range(len(slots)))
    first = rows.first.tolist()
    assert len(first) == count + 1 and first == sorted(first)
    of_runs: dict[int, list[int]] = {}
    if rows.runs is not None:
        for slot, start, length in rows.runs.tolist():
            of_runs.setdefault(slot, []).extend(range(start, start + length))
    for slot in range(count):
        wanted = [row for row, each in enumerate(slots) if each == slot]
        assert rows.order[first[slot] : first[slot + 1]].tolist() == wanted
        assert rows.runs is None or of_runs.get(slot, []) == wanted


@settings(max_examples=200, deadline=None)
@given(slots=st.lists(st.integers(-1, 4), max_size=40), more=st.integers(0, 2), as_tensor=st.booleans())
def test_plan_of_slots(slots: list[int], more: int, as_tensor: bool) -> None:
    count = max(slots, default=-1) + 1 + more
    given = torch.tensor(slots, dtype=torch.int64) if as_tensor else slots
    _check_plan(pk.Rows.of(given, known=count), slots, count)


@settings(max_examples=50, deadline=None)
@given(slots=st.lists(st.integers(-1, 3), max_size=9), length=st.integers(0, 5))
def test_each_batch_row_has_length_tokens(slots: list[int], length: int) -> None:
    tokens = [slot for slot in slots for _ in range(length)]
    _check_plan(pk.Rows.of(slots, known=4, length=length), tokens, 4)
    if slots and length:
        _check_plan(pk.Rows.of([[slot] * length for slot in slots], known=4), tokens, 4)


def test_names() -> None:
    rows = pk.Rows.of(["b", "__base__", "a", "b"], known=["a", "b", "c"])
    _check_plan(rows, [1, -1, 0, 1], 3)
    assert rows.names == ("a", "b", "c")
    first_come = pk.Rows.of(["b", "__base__", "a", "b"])
    _check_plan(first_come, [0, -1, 1, 0], 2)
    assert first_come.names == ("b", "a")
    _check_plan(pk.Rows.of(["__base__"] * 3), [-1] * 3, 0)


def test_what_only_the_device_knows() -> None:
    """No value is read, in a mode that would raise if one were; slots out of range are in no slot's part."""
    with FakeTensorMode():
        rows = pk.Rows.of(torch.empty(6, dtype=torch.int64), known=3, length=2)
        assert (rows.slot.shape, rows.order.shape, rows.first.shape, rows.runs) == ((12,), (12,), (4,), None)
    with pytest.raises(ValueError, match="need known"), FakeTensorMode():
        pk.Rows.of(torch.empty(6, dtype=torch.int64))
    slots = [2, -5, 0, 7, 2]
    rows = torch.compile(lambda slots: pk.Rows.of(slots, known=3), backend="eager", fullgraph=True)(torch.tensor(slots))
    assert rows.runs is None
    _check_plan(rows, slots, 3)


def test_runs_have_few_shapes() -> None:
    """Operators know a call by its tensors' shapes."""
    counts = {len(pk.Rows.of([0, 1] * (n // 2), known=2).runs) for n in range(2, 200, 2)}  # type: ignore[arg-type]
    assert counts == {2, 4, 8, 16, 32, 64, 128, 256}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"names_or_slots": ["a", "z"], "known": ["a", "b"]}, KeyError, "no adapter 'z'; known are 'a', 'b'"),
        ({"names_or_slots": ["a", 1], "known": ["a", "b"]}, KeyError, "no adapter 1; known are 'a', 'b'"),
        ({"names_or_slots": ["a"], "known": 3}, ValueError, "names need known names, got known = 3"),
        ({"names_or_slots": ["a"], "known": ["a", "a"]}, ValueError, "known names must differ"),
        ({"names_or_slots": ["a"], "known": ["__base__"]}, ValueError, "'__base__' is none of them"),
        ({"names_or_slots": "abc"}, ValueError, "must be a list or an integer tensor, got 'abc'"),
        ({"names_or_slots": [0, 3], "known": 3}, ValueError, r"slots must be in -1 ... 2, got 3"),
        ({"names_or_slots": [0, -2], "known": 3}, ValueError, r"slots must be in -1 ... 2, got -2"),
        ({"names_or_slots": torch.tensor([0, 3]), "known": ["a"]}, ValueError, r"slots must be in -1 ... 0, got 3"),
        ({"names_or_slots": torch.tensor([0.0])}, ValueError, "integers .* got torch.float32"),
        ({"names_or_slots": torch.tensor([True])}, ValueError, "integers .* got torch.bool"),
        ({"names_or_slots": torch.zeros(1, 2, 3, dtype=torch.int64)}, ValueError, r"\(B, L\), got .*\(1, 2, 3\)"),
        ({"names_or_slots": [[0, 1]], "length": 2}, ValueError, r"length is for slots \(B,\), got slots \(1, 2\)"),
    ],
    ids=str,
)
def test_wrong_input_is_named(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pk.Rows.of(**arguments)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_means_are_each_adapter_s_own(dtype: torch.dtype) -> None:
    """What other rows hold, even inf and nan, is in no mean and in no gradient; a slot without rows has 0."""
    rows = pk.Rows.of([0, 2, -1, 0], known=4, length=3)
    values = torch.arange(12, dtype=dtype).requires_grad_()
    mask = torch.tensor([True, False, True] * 4)
    with torch.no_grad():
        values[3:9] = torch.tensor([1.0, math.nan, 3.0, math.inf, math.nan, -math.inf])
    mean = rows.mean(values.view(4, 3), mask.view(4, 3))
    assert mean.dtype == dtype
    assert mean.tolist() == [(0 + 2 + 9 + 11) / 4, 0.0, 2.0, 0.0]
    (gradient,) = torch.autograd.grad(mean.sum(), values)
    assert gradient.tolist() == [0.25, 0, 0.25, 0.5, 0, 0.5, 0, 0, 0, 0.25, 0, 0.25]
    assert rows.mean(values.detach())[0] == (0 + 1 + 2 + 9 + 10 + 11) / 6


def test_mean_refuses_other_sizes() -> None:
    rows = pk.Rows.of([0, 1], length=3)
    with pytest.raises(ValueError, match="values must have as many elements as rows, 6, got 5"):
        rows.mean(torch.zeros(5))
    with pytest.raises(ValueError, match="mask must have as many elements as rows, 6, got 2"):
        rows.mean(torch.zeros(2, 3), torch.ones(2))


def test_to_another_device_keeps_what_the_host_knows() -> None:
    rows = pk.Rows.of(["a", "b"], length=2)
    there = rows.to("meta")
    assert [each.device.type for each in (there.slot, there.order, there.first)] == ["meta"] * 3
    assert there.runs is rows.runs and there.names == rows.names
    assert rows.to("cpu") is rows


def _tensors(rows: pk.Rows) -> list[Tensor]:
    return [rows.slot, rows.order, rows.first]


def test_the_default_device_plays_no_part() -> None:
    with torch.device("meta"):
        rows = pk.Rows.of(["a", "b", "__base__"], length=2, device="cpu")
    assert all(each.device.type == "cpu" for each in _tensors(rows))
    _check_plan(rows, [0, 0, 1, 1, -1, -1], 2)
