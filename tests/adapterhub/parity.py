"""A model as AdapterHub left it and one that was applied to, side by side: what equal means here."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from adapters.methods.modeling import Adapter
from torch import Tensor, nn

import peft_kernels as pk
from python_ref import compare
from tests.adapterhub.models import build, run

# Two orders of the same float32 sums through two layers, in parts of a tensor's largest value. The largest difference
# among the tests that use it was 28 eps; the least mistake, one form of gelu for the other, makes 240.
CLOSE = 100 * torch.finfo(torch.float32).eps


def assert_close(name: str, got: Tensor, expected: Tensor) -> None:
    expected = expected.detach()
    torch.testing.assert_close(
        got.detach(), expected, rtol=0, atol=CLOSE * float(expected.abs().max()), msg=lambda text: f"{name}: {text}"
    )


def assert_bitwise(name: str, got: Tensor, expected: Tensor) -> None:
    compare.assert_bitwise_equal(name, got, expected)


def assert_same(
    model: nn.Module, other: nn.Module, check: Callable[[str, Tensor, Tensor], None] = assert_close, **extra: object
) -> None:
    (logits, gradients), (expected, expected_gradients) = run(model, **extra), run(other, **extra)
    check("logits", logits, expected)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        check(name, gradient, expected_gradients[name])


def pair(*args: object, **options: object) -> tuple[nn.Module, nn.Module, pk.integrations.Report]:
    plain = build(*args, **options)
    fused = copy.deepcopy(plain)
    return fused, plain, pk.apply(fused)


def adapters_of(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, Adapter)]
