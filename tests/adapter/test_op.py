"""What the bottleneck adapter's operator owes beside the contract: reading x once, autocast, saved memory."""

from __future__ import annotations

import dataclasses
import doctest
import importlib
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import peft_kernels as pk
from peft_kernels.adapter.kernels.activations import ACTIVATIONS
from python_ref import adapter as oracle
from python_ref import compare
from tests.adapter.cases import OPERATOR, RESIDUALS, Case, Tensors, arguments, make, output_gradient
from tests.contract import observe
from tests.contract.operators import CPU, double


def _some(tensors: Tensors) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor is not None]


def test_compiled_serial_call_reads_x_once() -> None:
    """Identity of x and the residual is seen while tracing, also where autocast has nothing to cast."""
    torch._dynamo.reset()
    calls = []

    def record(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        calls.extend(node.args for node in graph.graph.nodes if "bottleneck_adapter" in str(node.target))
        return graph.forward

    case = Case(dtype=torch.bfloat16)
    given = arguments(case, make(case, CPU))
    with torch.autocast("cpu", torch.bfloat16):
        torch.compile(lambda: pk.bottleneck_adapter(**given), fullgraph=True, backend=record)()
    (call,) = calls
    tensors = [argument for argument in call if isinstance(argument, torch.fx.Node)]
    assert len(set(tensors)) == len(tensors) == 5  # x, weights and biases: no residual
    assert True in call


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("residual", RESIDUALS)
def test_autocast_is_a_sequential_s(dtype: torch.dtype, x_dtype: torch.dtype, residual: str) -> None:
    """Dtypes of the result and of every gradient are those of linear, activation, linear and a sum; so is the error."""
    case = Case(dtype=x_dtype, residual=residual, activation="gelu", adapter_dtype=torch.float32, m=60)
    leaves = OPERATOR.leaves(make(case, CPU))
    given = arguments(case, leaves)

    def sequential() -> Tensor:
        hidden = F.gelu(F.linear(leaves.x, leaves.down_weight, leaves.down_bias))
        branch = F.linear(hidden, leaves.up_weight, leaves.up_bias) * case.scale
        return branch if given["residual"] is None else given["residual"] + branch

    with torch.autocast("cpu", dtype):
        expected, got = sequential(), pk.bottleneck_adapter(**given)
    assert got.dtype == expected.dtype
    dy = torch.randn(got.shape).to(got.dtype)
    wide = OPERATOR.leaves(double(leaves))
    exact, _ = oracle.forward(**arguments(case, wide))
    compare.assert_close("y", got, expected, exact)
    runs = zip(
        *(
            torch.autograd.grad(y, _some(of), dy.to(y.dtype))
            for y, of in ((got, leaves), (expected, leaves), (exact, wide))
        ),
        strict=True,
    )
    for ours, theirs, truth in runs:
        assert ours.dtype == theirs.dtype
        # Both are rounded to the lower dtype on their way to float32, where the budget has no room for a rounding.
        assert compare.relative_error(ours, truth) <= 2 * compare.relative_error(theirs, truth)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("residual", RESIDUALS)
def test_saved_bytes_are_x_and_z(activation: str, residual: str) -> None:
    """Besides x and weights a call keeps z (M, r) in float32: no h, no cast, no residual, nothing as large as x."""
    case = Case(m=256, n=128, k=128, r=4, dtype=torch.bfloat16, residual=residual, activation=activation)
    leaves = OPERATOR.leaves(make(case, CPU))
    with observe.saved(leaves) as (added, kept):
        OPERATOR.call(case, leaves, "torch")
    assert sum(added.values()) == case.m * case.r * 4
    assert kept == {0, 1, 2}


@pytest.mark.parametrize(
    ("needs", "keeps", "z"),
    [
        ({"x"}, {"down_weight", "up_weight"}, True),
        ({"down_weight"}, {"x", "up_weight"}, True),
        ({"up_weight", "up_bias"}, set(), True),
        ({"up_bias"}, set(), False),
        ({"residual"}, set(), False),
        (set(), set(), False),
    ],
)
def test_saves_only_what_a_gradient_needs(needs: set[str], keeps: set[str], z: bool) -> None:
    case = Case(m=64, residual="tensor")
    tensors = make(case, CPU)
    leaves = dataclasses.replace(OPERATOR, differentiable=tuple(needs)).leaves(tensors)
    with observe.saved(leaves) as (added, kept):
        y = OPERATOR.call(case, leaves)
    assert {leaves._fields[index] for index in kept} == keeps
    assert sum(added.values()) == (case.m * case.r * 4 if z else 0)
    assert (y.grad_fn is None) == (not needs)


def test_residual_s_gradient_is_not_copied() -> None:
    case = Case(residual="tensor")
    leaves, dy = OPERATOR.leaves(make(case, CPU)), output_gradient(case, CPU)
    y = OPERATOR.call(case, leaves)
    (gradient,) = torch.autograd.grad(y, leaves.residual, dy)
    assert gradient.data_ptr() == dy.data_ptr()


def test_equal_but_other_tensor_is_a_parallel_residual() -> None:
    """Identity decides how the residual is read, not values: the gradients are apart."""
    x, down, up = torch.randn(5, 8, requires_grad=True), torch.randn(2, 8), torch.randn(8, 2)
    view = x.view(5, 8)
    y = pk.bottleneck_adapter(x, down, up, residual=view, activation="tanh")
    compare.assert_bitwise_equal("y", y, pk.bottleneck_adapter(x, down, up, residual=x, activation="tanh"))
    dy = torch.randn(5, 8)
    whole, branch, beside = torch.autograd.grad(y, (x, view), dy)[0], None, None
    branch = torch.autograd.grad(pk.bottleneck_adapter(x, down, up, activation="tanh"), x, dy)[0]
    beside = torch.autograd.grad(pk.bottleneck_adapter(x.detach(), down, up, residual=view), view, dy)[0]
    torch.testing.assert_close(whole, branch + dy)
    assert torch.equal(beside, dy)


def test_serial_adapter_needs_one_width() -> None:
    x = torch.randn(3, 8)
    with pytest.raises(ValueError, match=r"residual must be .* = \(3, 6\), got \(3, 8\)"):
        pk.bottleneck_adapter(x, torch.randn(2, 8), torch.randn(6, 2), residual=x)


@pytest.mark.parametrize("name", ["op", "module", "insertion"])
def test_examples_run(name: str) -> None:
    module = importlib.import_module(f"peft_kernels.adapter.{name}")
    assert doctest.testmod(module).failed == 0
