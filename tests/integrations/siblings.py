"""A parent whose LoRA layers share their input, as PEFT has it and as it is applied, and counts of what is fused."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import peft_kernels as pk
from peft_kernels.integrations.peft import given as given_bases
from peft_kernels.integrations.peft import grouped, layers
from peft_kernels.integrations.peft.siblings import Siblings, attached

WIDTH = 8
NAMES = ("q", "k", "v", "o")


class Attention(nn.Module):
    """q, k and v of one x, and o of their sum. ``between`` is called with x and the layer's name before k, v and o."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.v, self.o = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, between: Callable[[Tensor, str], Tensor] = lambda x, name: x) -> Tensor:
        q = self.q(x)
        k = self.k(between(x, "k"))
        v = self.v(between(x, "v"))
        return self.o(between(q.tanh() * k + v, "o"))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Attention(), Attention()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.first(x).relu())
        return y


def build(model: Callable[[], nn.Module] = Model, adapters: int = 1, **options: Any) -> Any:
    """PEFT's model in float64, all adapters active."""
    torch.manual_seed(0)
    options = {"target_modules": list(NAMES), "init_lora_weights": False, "lora_dropout": 0.0, **options}
    found = peft.get_peft_model(model().double(), peft.LoraConfig(r=3, **options))
    for index in range(1, adapters):
        found.add_adapter(f"other{index}", peft.LoraConfig(r=3 + index, **options))
    found = found.double()
    found.base_model.set_adapter(["default", *(f"other{index}" for index in range(1, adapters))])
    return found


def pair(**options: Any) -> tuple[Any, Any, pk.Report]:
    """The same model applied with groups, and as it was."""
    plain = build(**options)
    fused = copy.deepcopy(plain)
    return fused, plain, pk.apply(fused, group=True)


def inner(model: Any) -> Any:
    """The user's module in a PEFT model."""
    return model.base_model.model


def first_of(**options: Any) -> tuple[Any, Any, pk.Report]:
    """A fused attention that was observed, PEFT's, and the report."""
    fused, plain, report = pair(**options)
    fused(given())
    return inner(fused).first, inner(plain).first, report


def siblings_of(model: nn.Module) -> list[Siblings]:
    return [each for each in map(attached, model.modules()) if each is not None]


def given(rows: int = 5, seed: int = 1) -> Tensor:
    return torch.randn(rows, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def outcome(call: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor | None = None) -> dict[str, Tensor]:
    """y, and the gradients of x and of every parameter that has one."""
    x = (given() if x is None else x).detach().clone().requires_grad_()
    model.zero_grad(set_to_none=True)
    y = call(x)
    y.square().sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": x.grad, **found}


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Float64 sums in another order; values here are of the order of one to a thousand."""
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        error, size = float((got[name] - value).norm()), float(value.norm())
        assert error <= 1e-12 * size, f"{name}: {error:.1e} of {size:.1e}"


class Counts(Counter[str]):
    """``lead``: operations for a group; ``hit``: outputs taken; ``alone``: calls of one layer by itself; ``peft``."""

    def of(self, call: Callable[[], object]) -> dict[str, int]:
        self.clear()
        call()
        return dict(self)


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counts:
    found = Counts()

    def counted(name: str | Callable[..., str], run: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*arguments: Any, **options: Any) -> Any:
            result = run(*arguments, **options)
            if result is not None:
                found[name if isinstance(name, str) else name(*arguments)] += 1
            return result

        return counting

    def kind(x: Tensor, weights: tuple[Tensor, ...], *rest: Any) -> str:
        return "lead" if len(weights) > 1 else "alone"

    monkeypatch.setattr(grouped, "group_call", counted(kind, grouped.group_call))
    monkeypatch.setattr(grouped, "lora_linear", counted("alone", grouped.lora_linear))
    monkeypatch.setattr(layers, "_fused", counted("alone", layers._fused))
    monkeypatch.setattr(grouped.Scope, "take", counted("hit", grouped.Scope.take))
    for module in (grouped, given_bases, layers):
        monkeypatch.setattr(module, "count_fallback", lambda *_: found.update(peft=1))
    return found
