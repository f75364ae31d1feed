"""Deferred stands for its tensor in everything that reads it, and reads nothing before. Needs torch alone."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from peft_kernels.integrations.adapterhub.deferred import Deferred


def _counted(value: Tensor) -> tuple[Deferred, list[int]]:
    made: list[int] = []

    def make() -> Tensor:
        made.append(1)
        return 1.0 * value

    return Deferred(make, "cpu"), made


VALUE = torch.arange(1.0, 7.0).reshape(2, 3)


@pytest.mark.parametrize(
    "use",
    [
        lambda t: t + 1,
        lambda t: 1 - t,
        lambda t: VALUE * t,
        lambda t: t / VALUE,
        lambda t: -(abs(t) ** 2),
        lambda t: t @ VALUE.t(),
        lambda t: VALUE.t() @ t,
        lambda t: t >= 3,
        lambda t: t == VALUE,
        lambda t: torch.tensor([len(t), float(t.sum()), t.shape[1], t.dim()]),
        lambda t: torch.stack(list(t)),
        lambda t: torch.stack([t, VALUE, t]).permute(1, 2, 0),
        lambda t: torch.stack(tensors=(VALUE, t), dim=1),
        lambda t: torch.where(VALUE > 2, input=t, other=VALUE),
        lambda t: torch.nn.functional.linear(t, VALUE),
        lambda t: t.detach().squeeze().cpu(),
        lambda t: torch.cat([t, VALUE, t]) + 0,
        lambda t: torch.cat([VALUE, t], dim=1).repeat(2, 1, 1)[1:] + 0,
        lambda t: t[:, 1:2] * t[0, 0],
        lambda t: torch.ones(2, 3).add_(t),
    ],
)
def test_it_is_its_tensor(use: Callable[[object], Tensor]) -> None:
    deferred, made = _counted(VALUE)
    result, expected = use(deferred), use(VALUE)
    assert type(result) is Tensor and torch.equal(result, expected)
    assert made == [1]


def test_passing_on_reads_nothing() -> None:
    deferred, made = _counted(VALUE)
    other, made_other = _counted(VALUE)
    passed = torch.cat([torch.cat([deferred[:1], VALUE]).repeat(2, 1), other], dim=0)
    assert isinstance(passed, Deferred) and not made + made_other
    expected = torch.cat([torch.cat([VALUE[:1], VALUE]).repeat(2, 1), VALUE], dim=0)
    assert torch.equal(passed.tensor(), expected) and made == made_other == [1]


def test_condition_is_the_tensors() -> None:
    assert bool(_counted(torch.tensor(2.0))[0]) and not _counted(torch.tensor(0.0))[0]
    assert int(_counted(torch.tensor(2.5))[0]) == 2
    with pytest.raises(RuntimeError, match="more than one value is ambiguous"):
        bool(_counted(VALUE)[0])


@pytest.mark.parametrize("grad", [True, False])
def test_grad_mode_is_the_one_of_its_creation(grad: bool) -> None:
    value = VALUE.clone().requires_grad_()
    with torch.set_grad_enabled(grad):
        deferred, _ = _counted(value)
    with torch.set_grad_enabled(not grad):
        assert deferred.requires_grad is grad
    if grad:
        (2 * deferred).sum().backward()
        assert torch.equal(value.grad, torch.full_like(VALUE, 2))


@pytest.mark.parametrize("enabled", [True, False])
def test_autocast_is_the_one_of_its_creation(enabled: bool) -> None:
    def make() -> Tensor:
        return VALUE @ VALUE.t()

    with torch.autocast("cpu", torch.bfloat16, enabled):
        deferred = Deferred(make, "cpu")
    with torch.autocast("cpu", torch.bfloat16, not enabled):
        assert deferred.dtype == (torch.bfloat16 if enabled else torch.float32)


def test_copies() -> None:
    """A copy is made without the constructor, and must not look for what it lacks for ever."""
    deferred, _ = _counted(VALUE)
    assert torch.equal(copy.copy(deferred) + 0, VALUE)
    assert not hasattr(Deferred.__new__(Deferred), "shape")
