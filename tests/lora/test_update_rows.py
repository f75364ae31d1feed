"""What LoRA's update by rows owes beside the contract: masks, rows without an adapter, autocast, bytes."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import peft_kernels as pk
from python_ref import compare
from python_ref import lora as oracle
from tests.contract import observe
from tests.contract.operators import CPU
from tests.lora.rows_cases import slots
from tests.lora.update_rows_cases import OPERATOR, Case, Tensors, arguments, make


def test_oracle_is_autograds() -> None:
    case = Case(m=7, n=4, k=5, ranks=(2, 0, 3), dtype=torch.float64, p=0.3)
    leaves, dy = OPERATOR.leaves(make(case, CPU)), torch.randn(7, 4).double()
    y = oracle.update_rows_forward(leaves.y, leaves.x, slots(case, leaves), case.slot)
    torch.testing.assert_close(y, oracle.eager_update_rows(leaves.y, leaves.x, slots(case, leaves), case.slot))
    found = oracle.update_rows_backward(dy, leaves.x, slots(case, leaves), case.slot)
    wanted = dy, found.x, torch.cat(found.lora_a), torch.cat(found.lora_b, dim=1)
    torch.testing.assert_close(torch.autograd.grad(y, leaves, dy), wanted)


@pytest.mark.parametrize("backend", ["torch", "triton", None])
def test_it_is_lora_linear_by_rows_beside_its_own_product(backend: str | None, device: torch.device) -> None:
    """The same seed drops the same elements, and rows without an adapter have y's bits, and no part of dX."""
    case = Case(m=26, n=16, k=32, ranks=(4, 0, 3), p=0.4)
    with OPERATOR.using(backend or "auto"):
        leaves, weight = OPERATOR.leaves(make(case, device)), torch.randn(16, 32, device=device)
        given = {name: value for name, value in arguments(case, leaves).items() if name not in Tensors._fields}
        base = F.linear(leaves.x, weight)
        y = pk.lora_update(base, *leaves[1:], **given, backend=backend)
        expected = pk.lora_linear(leaves.x, weight, *leaves[2:], **given, backend=backend)
        torch.testing.assert_close(y, expected)
        gradients = [torch.autograd.grad(each.square().sum(), leaves[1:], retain_graph=True) for each in (y, expected)]
        torch.testing.assert_close(*gradients)
        (dx,) = torch.autograd.grad(pk.lora_update(**arguments(case, leaves), backend=backend).sum(), leaves.x)
    plain = torch.tensor([slot in (-1, 1) for slot in case.slot])
    compare.assert_bitwise_equal("y", y[plain].detach(), base[plain].detach())
    assert not dx[plain].any() and dx[~plain].any(1).all()


@pytest.mark.parametrize("host_knows", [True, False])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_what_a_row_does_not_use_reaches_nothing(backend: str, host_knows: bool, device: torch.device) -> None:
    """Neither nan in adapters without rows, nor inf in other rows."""
    case = Case(m=20, ranks=(4, 3, 6), p=0.3)
    with OPERATOR.using(backend):
        rows = pk.Rows.of([0, 2] * 9 + [-1] * 2, known=3, device=device)
        rows = rows if host_knows else dataclasses.replace(rows, runs=None)
        clean = make(case, device)
        marred = Tensors(*(each.clone() for each in clean))
        marred.lora_a[4:7], marred.lora_b[:, 4:7], marred.x[-2:] = math.nan, math.nan, math.inf

        def run(tensors: Tensors) -> list[torch.Tensor]:
            leaves = OPERATOR.leaves(tensors)
            y = pk.lora_update(**{**arguments(case, leaves), "rows": rows}, backend=backend)
            return [y.detach(), *torch.autograd.grad(y.sum(), leaves)]

        for got, expected in zip(run(marred), run(clean), strict=True):
            compare.assert_bitwise_equal("result", got, expected)


@pytest.mark.parametrize("given", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("adapter", [torch.bfloat16, torch.float32])
def test_autocast_casts_x_and_leaves_y(given: torch.dtype, adapter: torch.dtype) -> None:
    case = Case(m=6, n=6, k=8, ranks=(2, 1), given_dtype=given, adapter_dtype=adapter)
    leaves = OPERATOR.leaves(make(case, CPU))
    with torch.autocast("cpu", torch.bfloat16):
        y = pk.lora_update(**arguments(case, leaves))
        y.float().sum().backward()
    assert y.dtype == given and [leaf.grad.dtype for leaf in leaves] == [leaf.dtype for leaf in leaves]
    direct = pk.lora_update(**arguments(case, leaves._replace(x=leaves.x.to(torch.bfloat16))))
    compare.assert_bitwise_equal("y", y.detach(), direct.detach())


@pytest.mark.parametrize(
    ("needs", "keeps", "keeps_s"),
    [
        (set(Tensors._fields), {"x", "lora_a", "lora_b"}, True),
        ({"y"}, set(), False),
        ({"x"}, {"lora_a", "lora_b"}, False),
        ({"lora_b"}, set(), True),
        (set(), set(), False),
    ],
)
def test_saves_only_what_a_gradient_needs(needs: set[str], keeps: set[str], keeps_s: bool) -> None:
    """Beside x, factors, the plan and what layers share S (M, greatest rank) and an 8-byte seed: never y, no mask."""
    case = Case(m=256, n=128, k=128, ranks=(4, 3), dtype=torch.bfloat16, adapter_dtype=torch.float32, p=0.1)
    leaves = replace(OPERATOR, differentiable=tuple(needs)).leaves(make(case, CPU))
    given = arguments(case, leaves)
    with observe.saved(leaves) as (added, kept):
        y = pk.lora_update(**given)
    assert {leaves._fields[index] for index in kept} == keeps
    by_rows = OPERATOR.shared(case) * bool(needs - {"y"})
    assert sum(added.values()) <= case.m * 4 * 4 * keeps_s + 8 * ("x" in needs) + by_rows
    assert (y.grad_fn is None) == (not needs)


def test_the_gradient_of_y_is_dy_itself() -> None:
    case = Case(p=0.3)
    leaves = OPERATOR.leaves(make(case, CPU))
    dy = torch.randn(case.y_shape)
    (got,) = torch.autograd.grad(pk.lora_update(**arguments(case, leaves)), leaves.y, dy)
    assert got.data_ptr() == dy.data_ptr()


@pytest.mark.parametrize("ranks", [(4, 3), (0, 0)], ids=str)
@pytest.mark.parametrize("slot", [[0, 1, -1, 1], [-1] * 4], ids=str)
def test_y_is_not_written_and_not_returned(slot: list[int], ranks: tuple[int, ...]) -> None:
    """By none of the ways of a call: implementations, torch's own operators without a graph, dispatch modes."""
    y, x, total = torch.randn(2, 2, 6), torch.randn(2, 2, 8), sum(ranks)
    factors, before = (torch.randn(total, 8), torch.randn(6, total)), y.clone()
    rows = pk.Rows.of(slot, known=2)

    def call(y: torch.Tensor) -> torch.Tensor:
        return pk.lora_update(y, x, *factors, rows=rows, ranks=ranks)

    with torch.no_grad():
        without_graph = call(y)
    with FlopCounterMode(display=False):
        composed = call(y)
    for made in (without_graph, call(y), composed):
        assert made.data_ptr() != y.data_ptr() and (made._base is None or made is composed)
        torch.testing.assert_close(made, without_graph)
    compare.assert_bitwise_equal("y", y, before)
