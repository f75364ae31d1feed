"""On a GPU the clock decides between a library's own forward and ours; here the clock is the tests'."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor, nn

import peft_kernels as pk
from peft_kernels._core import plans
from peft_kernels.integrations import faster
from peft_kernels.integrations.peft import eligibility, layers
from tests.clock import Clock


def applied(
    monkeypatch: pytest.MonkeyPatch, ours: float, theirs: float, **options: Any
) -> tuple[Any, Clock, pk.Report]:
    """A model of one fused layer, a clock that both ways of the layer move, and what apply said."""
    clock = Clock(ours=ours, theirs=theirs)
    torch.manual_seed(0)
    model = peft.get_peft_model(
        nn.Sequential(nn.Linear(8, 8)), peft.LoraConfig(target_modules=["0"], init_lora_weights=False, **options)
    )
    report = pk.apply(model)
    clock.install(monkeypatch)
    monkeypatch.setattr(faster, "_decided", plans.Cache())
    monkeypatch.setattr(layers, "_fused", clock.takes("ours", layers._fused))
    monkeypatch.setattr(PeftLinear, "forward", clock.takes("theirs", PeftLinear.forward))
    # It would be seen that PEFT's forward is another one.
    monkeypatch.setattr(eligibility.OWN, "replaced", lambda: None)
    return model, clock, report


@pytest.mark.parametrize(("ours", "theirs", "expected"), [(90.0, 100.0, "ours"), (100.0, 90.0, "theirs")])
@pytest.mark.parametrize("options", [{}, {"lora_dropout": 0.5}], ids=["plain", "dropout"])
def test_the_faster_one_runs(
    ours: float, theirs: float, expected: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, clock, _ = applied(monkeypatch, ours, theirs, **options)
    x = torch.randn(4, 8)
    model(x)
    assert clock.ran(lambda: model(x)) == [expected]
    assert list(clock.winners.values()) == ["peft_kernels" if expected == "ours" else "library"]


def test_the_report_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _, report = applied(monkeypatch, 100.0, 90.0)
    for _ in range(3):
        model(torch.randn(4, 8))
    assert dict(report.fallback_calls) == {"the library's own forward is faster on this machine": 3}


def test_a_draw_is_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    model, clock, _ = applied(monkeypatch, 100.0, 98.5)
    model(torch.randn(4, 8))
    assert clock.ran(lambda: model(torch.randn(4, 8))) == ["ours"]


def test_classes_are_decided_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    model, clock, _ = applied(monkeypatch, 100.0, 90.0)
    x = torch.randn(4, 8)
    model(x)
    clock.costs["ours"] = 50.0
    model(torch.randn(64, 8))
    with torch.no_grad():
        model(x)
        assert clock.ran(lambda: model(x)) == ["ours"]
    assert clock.ran(lambda: model(x)) == ["theirs"]
    assert clock.ran(lambda: model(torch.randn(64, 8))) == ["ours"]


def test_timing_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """No gradient, no random number, and no change of the input; and what the caller gets is a call's result."""
    model, clock, _ = applied(monkeypatch, 90.0, 100.0, lora_dropout=0.5)
    x = torch.randn(4, 8, requires_grad=True)
    before = x.detach().clone()
    torch.manual_seed(1)
    y = model(x)
    assert clock.runs.count("theirs") > 2
    after = torch.get_rng_state()
    assert x.grad is None and all(p.grad is None for p in model.parameters())
    assert torch.equal(x.detach(), before)
    torch.manual_seed(1)
    again = model(x)
    assert torch.equal(again, y) and torch.equal(torch.get_rng_state(), after)


def test_gradients_are_whoever_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    gradients: list[list[Tensor]] = []
    for ours, theirs in ((90.0, 100.0), (100.0, 90.0)):
        model, _, _ = applied(monkeypatch, ours, theirs)
        x = torch.ones(4, 8, requires_grad=True)
        model(x).sum().backward()
        gradients.append([x.grad, *(p.grad for p in model.parameters() if p.requires_grad)])
        monkeypatch.undo()
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("what", ["switched off", "forced"])
def test_nothing_is_timed_where_the_choice_is_made(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, clock, _ = applied(monkeypatch, 100.0, 90.0)
    if what == "switched off":
        monkeypatch.setenv("PEFT_KERNELS_TUNE", "0")
    with pk.use_backend("auto" if what == "switched off" else "torch"):
        assert clock.ran(lambda: model(torch.randn(4, 8))) == ["ours"]
    assert not clock.winners
