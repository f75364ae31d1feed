"""What LoRA's update owes beside the contract: its oracle, the mask of a seed, autocast, what it saves."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import peft_kernels as pk
from python_ref import compare
from python_ref import lora as oracle
from tests.contract import observe
from tests.contract.operators import CPU
from tests.lora.update_cases import OPERATOR, SEED, Case, Tensors, arguments, make


def test_oracle_is_autograds() -> None:
    case = Case(m=5, n=4, k=7, r=2, dtype=torch.float64)
    leaves, dropout = OPERATOR.leaves(make(case, CPU)), {"dropout_mask": torch.rand(5, 7) > 0.3, "dropout_p": 0.3}
    y, dy = oracle.update_forward(*leaves, 0.7, **dropout), torch.randn(5, 4).double()
    with_base = oracle.forward(leaves.x, torch.zeros(4, 7).double(), *leaves[2:], 0.7, **dropout)[0] + leaves.y
    torch.testing.assert_close(y, with_base)
    torch.testing.assert_close(
        torch.autograd.grad(y, leaves, dy), tuple(oracle.update_backward(dy, *leaves[1:], 0.7, **dropout))
    )


@pytest.mark.parametrize("backend", ["torch", "triton", None])
def test_it_is_lora_linear_beside_its_own_product(backend: str | None, device: torch.device) -> None:
    """The same seed drops the same elements, and the sum of both parts' gradients is lora_linear's."""
    case = Case(m=24, n=16, k=32, r=4, p=0.4)
    with OPERATOR.using(backend or "auto"):
        leaves, weight = OPERATOR.leaves(make(case, device)), torch.randn(16, 32, device=device)
        given = {"scale": 0.5, "dropout_p": 0.4, "seed": SEED, "backend": backend}
        y = pk.lora_update(F.linear(leaves.x, weight), *leaves[1:], **given)
        expected = pk.lora_linear(leaves.x, weight, *leaves[2:], **given)
        torch.testing.assert_close(y, expected)
        gradients = (torch.autograd.grad(each.square().sum(), leaves[1:]) for each in (y, expected))
        torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("given", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("adapter", [torch.bfloat16, torch.float32])
def test_autocast_casts_x_and_leaves_y(given: torch.dtype, adapter: torch.dtype) -> None:
    """As where PEFT's layers sum: a base layer that undoes autocast's cast keeps float32."""
    case = Case(m=4, n=6, k=8, r=2, given_dtype=given, adapter_dtype=adapter)
    leaves = OPERATOR.leaves(make(case, CPU))
    with torch.autocast("cpu", torch.bfloat16):
        y = pk.lora_update(*leaves, 0.5)
        y.float().sum().backward()
    assert y.dtype == given and [leaf.grad.dtype for leaf in leaves] == [leaf.dtype for leaf in leaves]
    direct = pk.lora_update(leaves.y, leaves.x.to(torch.bfloat16), *leaves[2:], 0.5)
    compare.assert_bitwise_equal("y", y.detach(), direct.detach())


@pytest.mark.parametrize(
    ("needs", "keeps", "keeps_s"),
    [
        (set(Tensors._fields), {"x", "lora_a", "lora_b"}, True),
        ({"y"}, set(), False),
        ({"x"}, {"lora_a", "lora_b"}, False),
        ({"lora_a"}, {"x", "lora_b"}, False),
        ({"lora_b"}, set(), True),
        (set(), set(), False),
    ],
)
def test_saves_only_what_a_gradient_needs(needs: set[str], keeps: set[str], keeps_s: bool) -> None:
    """Beside x and factors S (M, r) and an 8-byte seed: never y, no mask, no cast or dropped x."""
    case = Case(m=256, n=128, k=128, r=4, dtype=torch.bfloat16, adapter_dtype=torch.float32, p=0.1)
    leaves = replace(OPERATOR, differentiable=tuple(needs)).leaves(make(case, CPU))
    with observe.saved(leaves) as (added, kept):
        y = pk.lora_update(**arguments(case, leaves))
    assert {leaves._fields[index] for index in kept} == keeps
    assert sum(added.values()) == case.m * case.r * 4 * keeps_s + 8 * bool(needs & {"x", "lora_a"})
    assert (y.grad_fn is None) == (not needs)


def test_the_gradient_of_y_is_dy_itself() -> None:
    leaves = OPERATOR.leaves(make(Case(p=0.3), CPU))
    y, dy = pk.lora_update(*leaves, dropout_p=0.3), torch.randn(37, 72)
    (got,) = torch.autograd.grad(y, leaves.y, dy)
    assert got.data_ptr() == dy.data_ptr()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ranks": (5,)}, "lora_update: ranks are those of the slots of rows, which is None"),
        ({"dropout_p": [0.1]}, "lora_update: dropout_p must be one number but with rows"),
    ],
)
def test_what_only_rows_have_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pk.lora_update(*make(Case(m=3), CPU), **options)
