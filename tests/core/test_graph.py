"""Calls without a graph: the same bits by a shorter way, and forward-mode differentiation is still refused."""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import peft_kernels as pk
from peft_kernels._core.graph import is_recorded
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


def test_is_recorded() -> None:
    assert is_recorded()
    with torch.no_grad():
        assert not is_recorded()
        with forward_ad.dual_level():
            assert is_recorded()
    with torch.inference_mode():
        assert not is_recorded()


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


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_tangents_are_refused_not_dropped(call: Call) -> None:
    with torch.no_grad(), forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
        call(lambda x: forward_ad.make_dual(x, torch.ones_like(x)))
