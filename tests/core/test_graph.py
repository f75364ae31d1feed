"""Calls that may be opaque to torch or not, and calls without a graph: the same bits by a shorter way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

import peft_kernels as pk
from peft_kernels._core.graph import DISPATCH_MODE, why_not_opaque, why_not_strided
from peft_kernels.prompt import prompt_tuning

X, W, A, B = (
    torch.randn(shape, generator=torch.Generator().manual_seed(0)) for shape in ((3, 5), (4, 5), (2, 5), (4, 2))
)
Q = torch.randn(1, 2, 3, 4, generator=torch.Generator().manual_seed(0))
CALLS = {
    "lora_linear": lambda first: pk.lora_linear(first(X), W, A, B),
    "bottleneck_adapter": lambda first: pk.bottleneck_adapter(first(X), A, B),
    "prefix_attention": lambda first: pk.prefix_attention(first(Q), Q, Q, Q[0, :, :2], Q[0, :, :2]),
    "prompt_tuning": lambda first: prompt_tuning(first(X)[None, :, :], X[None]),
}
Call = Callable[[Callable[[Tensor], Tensor]], Tensor]


class _Plain(nn.Parameter):
    """Torch's functions are as they were."""


class _Overriding(Tensor):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return super().__torch_function__(func, types, args, kwargs or {})


def _transformed(transform: Callable[..., Any]) -> str | None:
    reasons = []

    def call(x: Tensor) -> Tensor:
        reasons.append(why_not_opaque((x,)))
        return x.sum()

    transform(call)(torch.ones(2))
    return reasons[0]


def test_why_not_opaque() -> None:
    assert why_not_opaque((X, nn.Parameter(X), _Plain(X), (X, None), 1.0, "relu", True, None)) is None
    for transform in (torch.func.grad, torch.func.vmap, lambda call: lambda x: torch.func.jvp(call, (x,), (x,))):
        assert "torch.func" in (_transformed(transform) or "")
    assert "torch.jit.trace" in (_transformed(lambda call: lambda x: torch.jit.trace(call, (x,))) or "")
    with forward_ad.dual_level():
        assert "forward-mode" in (why_not_opaque((X,)) or "")
    with FakeTensorMode():
        assert why_not_opaque((X,)) == DISPATCH_MODE
    jagged = torch.nested.nested_tensor([X, X], layout=torch.jagged)
    for tensor in (X.as_subclass(_Overriding), jagged):
        for values in ((X, tensor), (X, (None, tensor))):
            assert f"a tensor of it is a {type(tensor).__name__}," in (why_not_opaque(values) or "")
    assert why_not_opaque((X,)) is None


def test_why_not_strided() -> None:
    assert why_not_strided(X) is None
    assert why_not_strided(X.to_sparse()) == "a torch.sparse_coo tensor"
    for layout in (torch.strided, torch.jagged):
        assert why_not_strided(torch.nested.nested_tensor([X, X], layout=layout)) == "a nested tensor"


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_same_bits_without_a_graph(call: Call) -> None:
    expected = call(lambda x: x.clone().requires_grad_())
    assert expected.requires_grad
    with (
        torch.no_grad(),
        mock.patch.object(torch.autograd.Function, "apply", side_effect=AssertionError("took a graph")),
    ):
        found = call(lambda x: x.clone().requires_grad_())
    assert not found.requires_grad
    assert torch.equal(found, expected)
