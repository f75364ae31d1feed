"""On a GPU the clock decides between a library's own forward and ours; here the clock is the tests'."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor, nn

import peft_kernels as pk
from peft_kernels._core import candidates, plans, timing
from peft_kernels.integrations import faster
from peft_kernels.integrations.peft import layers


class Machine:
    """A machine on which a test says how long both take, forward and backward together."""

    def __init__(self, ours: float, theirs: float) -> None:
        self.costs, self.now, self.calls = {"ours": ours, "theirs": theirs}, 0.0, []
        self.winners: dict[str, str] = {}

    def takes(self, name: str, run: Any) -> Any:
        def taken(*arguments: Any, **options: Any) -> Any:
            self.calls.append(name)
            self.now += self.costs[name]
            return run(*arguments, **options)

        return taken

    def mark(self) -> float:
        return self.now

    def finish(self) -> None:
        """Nothing is under way."""

    def elapsed_us(self, start: float, stop: float) -> float:
        return stop - start

    def read(self, again: bool = False) -> Mapping[str, str]:
        return self.winners

    def add(self, key: str, winner: str) -> None:
        self.winners.setdefault(key, winner)


def applied(monkeypatch: pytest.MonkeyPatch, ours: float, theirs: float, **options: Any) -> tuple[Any, Machine]:
    """A fused layer whose calls are timed as on a GPU, by a clock that both ways move."""
    machine = Machine(ours, theirs)
    torch.manual_seed(0)
    model = peft.get_peft_model(
        nn.Sequential(nn.Linear(8, 8)), peft.LoraConfig(target_modules=["0"], init_lora_weights=False, **options)
    )
    machine.report = pk.apply(model)
    monkeypatch.setattr(timing, "may_decide", lambda device: not timing.is_switched_off())
    monkeypatch.setattr(timing, "why_not_timed", lambda device, call_bytes: None)
    monkeypatch.setattr(timing, "clock_of", lambda device: machine)
    monkeypatch.setattr(candidates, "Recorded", lambda device: machine)
    monkeypatch.setattr(faster, "_decided", plans.Cache())
    monkeypatch.setattr(layers, "_fused", machine.takes("ours", layers._fused))
    monkeypatch.setattr(PeftLinear, "forward", machine.takes("theirs", PeftLinear.forward))
    monkeypatch.setattr(layers._OWN, "replaced", lambda: None)
    return model, machine


def names(machine: Machine, run: Any) -> list[str]:
    machine.calls.clear()
    run()
    return machine.calls.copy()


@pytest.mark.parametrize(("ours", "theirs", "expected"), [(90.0, 100.0, "ours"), (100.0, 90.0, "theirs")])
@pytest.mark.parametrize("options", [{}, {"lora_dropout": 0.5}], ids=["plain", "dropout"])
def test_the_faster_one_runs(
    ours: float, theirs: float, expected: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, machine = applied(monkeypatch, ours, theirs, **options)
    x = torch.randn(4, 8)
    model(x)
    assert names(machine, lambda: model(x)) == [expected]
    assert list(machine.winners.values()) == ["peft_kernels" if expected == "ours" else "library"]


def test_the_report_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    model, machine = applied(monkeypatch, 100.0, 90.0)
    for _ in range(3):
        model(torch.randn(4, 8))
    assert dict(machine.report.fallback_calls) == {"the library's own forward is faster on this machine": 3}


def test_a_draw_is_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    model, machine = applied(monkeypatch, 100.0, 98.5)
    model(torch.randn(4, 8))
    assert names(machine, lambda: model(torch.randn(4, 8))) == ["ours"]


def test_classes_are_decided_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    model, machine = applied(monkeypatch, 100.0, 90.0)
    x = torch.randn(4, 8)
    model(x)
    machine.costs["ours"] = 50.0
    model(torch.randn(64, 8))
    with torch.no_grad():
        model(x)
        assert names(machine, lambda: model(x)) == ["ours"]
    assert names(machine, lambda: model(x)) == ["theirs"]
    assert names(machine, lambda: model(torch.randn(64, 8))) == ["ours"]


def test_timing_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """No gradient, no random number, and no change of the input; and what the caller gets is a call's result."""
    model, machine = applied(monkeypatch, 90.0, 100.0, lora_dropout=0.5)
    x = torch.randn(4, 8, requires_grad=True)
    before = x.detach().clone()
    torch.manual_seed(1)
    y = model(x)
    assert machine.calls.count("theirs") > 2
    after = torch.get_rng_state()
    assert x.grad is None and all(p.grad is None for p in model.parameters())
    assert torch.equal(x.detach(), before)
    torch.manual_seed(1)
    again = model(x)
    assert torch.equal(again, y) and torch.equal(torch.get_rng_state(), after)


def test_gradients_are_whoever_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    gradients: list[list[Tensor]] = []
    for ours, theirs in ((90.0, 100.0), (100.0, 90.0)):
        model, _ = applied(monkeypatch, ours, theirs)
        x = torch.ones(4, 8, requires_grad=True)
        model(x).sum().backward()
        gradients.append([x.grad, *(p.grad for p in model.parameters() if p.requires_grad)])
        monkeypatch.undo()
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("what", ["switched off", "forced"])
def test_nothing_is_timed_where_the_choice_is_made(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, machine = applied(monkeypatch, 100.0, 90.0)
    if what == "switched off":
        monkeypatch.setenv("PEFT_KERNELS_TUNE", "0")
    with pk.use_backend("auto" if what == "switched off" else "torch"):
        assert names(machine, lambda: model(torch.randn(4, 8))) == ["ours"]
    assert not machine.winners
