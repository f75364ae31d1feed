"""PEFT's DoRA layers on ``lora_linear`` with a gain: PEFT's numbers and gradients, and what it leaves to PEFT."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

import peft_kernels as pk
from peft_kernels.integrations.peft import dora
from peft_kernels.integrations.peft.layers import FusedLoraLinear
from tests.integrations import models

pytestmark = pytest.mark.filterwarnings("ignore:apply. nothing in", "ignore::FutureWarning", "ignore::UserWarning")

K, N, R = 12, 20, 3
EXACT = {"rtol": 1e-9, "atol": 1e-12}


class _Two(nn.Module):
    """A linear layer and another one whose result is changed in place, as some models do."""

    def __init__(self, is_conv: bool = False) -> None:
        super().__init__()
        self.one = transformers.pytorch_utils.Conv1D(N, K) if is_conv else nn.Linear(K, N)
        self.two = nn.Linear(N, K, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.two(torch.tanh(self.one(x)))
        y += x
        return y.mul_(2.0)


def build(adapters: tuple[str, ...] = ("default",), is_conv: bool = False, **options: Any) -> Any:
    """In float64, with magnitudes of both signs."""
    torch.manual_seed(0)
    options = {"r": R, "lora_alpha": 2 * R, "target_modules": ["one", "two"], "use_dora": True, **options}
    first, *others = (peft.LoraConfig(**(options | {"use_dora": name != "plain"})) for name in adapters)
    model = peft.get_peft_model(_Two(is_conv), first, adapter_name=adapters[0]).double()
    for name, config in zip(adapters[1:], others, strict=True):
        model.add_adapter(name, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.double().named_parameters():
            if "lora_" in name:
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    model.set_adapter(adapters[0])
    return model


def layer_of(model: Any, name: str = "one") -> Any:
    return getattr(model.base_model.model, name)


def inputs(*shape: int) -> Tensor:
    return torch.randn(*(shape or (2, 5)), K, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def results(model: Any, x: Tensor, call: Callable[[Tensor], Tensor] | None = None) -> dict[str, Tensor]:
    """The output, and all gradients."""
    model.zero_grad(set_to_none=True)
    x = x.clone().requires_grad_()
    y = (model if call is None else call)(x)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(y.dtype))
    assert x.grad is not None
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": x.grad, **found}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], **close: float) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], **(close or EXACT), msg=lambda text, n=name: f"{n}: {text}")


def pair(**options: Any) -> tuple[Any, Any, pk.integrations.Report]:
    plain = build(**options)
    fused = copy.deepcopy(plain)
    return fused, plain, pk.apply(fused)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_conv": True, "fan_in_fan_out": True, "target_modules": ["one"]},
        {"bias": "all"},
        {"use_rslora": True, "rank_pattern": {"two": 5}},
        {"lora_dropout": 0.5},
    ],
    ids=str,
)
def test_outputs_and_gradients_are_peft_s(options: dict[str, Any]) -> None:
    """In training too, where nothing is dropped."""
    plain = build(**options).train("lora_dropout" not in options)
    fused = copy.deepcopy(plain)
    report = pk.apply(fused)
    assert report.fused and not report.fallbacks
    ours, theirs = (results(model, inputs()) for model in (fused, plain))
    assert any("lora_magnitude_vector" in name for name in ours)
    assert_same(ours, theirs)
    assert not report.fallback_calls
    assert type(layer_of(fused)) is FusedLoraLinear


def test_a_whole_model() -> None:
    plain = models.build(use_dora=True).double()
    fused = copy.deepcopy(plain)
    report = pk.apply(fused, group=True)
    # Watched in the first call, and perhaps groups of others in the second.
    for _ in range(2):
        (logits, gradients), (expected, wanted) = models.run(fused), models.run(plain)
        assert_same({"y": logits, **gradients}, {"y": expected, **wanted})
    assert not report.fallback_calls and not report.groups


def test_members_of_a_group_that_become_dora_run_by_themselves() -> None:
    """q and k are one operation, v is beside them; then k is beside them too, and q alone."""
    plain = models.build(target_modules=["q_proj", "k_proj", "v_proj"]).double()
    plain.add_adapter("dora", peft.LoraConfig(r=2, use_dora=True, target_modules=["k_proj"]))
    models.randomize(plain.double())
    fused = copy.deepcopy(plain)
    report = pk.apply(fused, groups=[("q_proj", "k_proj", "v_proj")])
    for name in ("default", "dora", "default"):
        for model in (fused, plain):
            for layer in models.lora_layers(model):
                layer.set_adapter([name] if name in layer.lora_A else ["default"])
        (logits, gradients), (expected, wanted) = models.run(fused), models.run(plain)
        assert_same({"y": logits, **gradients}, {"y": expected, **wanted})
    assert not report.fallback_calls


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(use_reentrant: bool) -> None:
    """The second layer's result is written to, and nothing of it was kept."""
    fused, plain, _ = pair()
    ours = results(fused, inputs(), lambda x: checkpoint(fused, x, use_reentrant=use_reentrant))
    assert_same(ours, results(plain, inputs()))


def test_compiled() -> None:
    fused, plain, _ = pair()
    torch._dynamo.reset()
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    assert_same(results(fused, inputs(), compiled), results(plain, inputs()))


@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16])
def test_half_precision(adapter: torch.dtype) -> None:
    """Closer to float64 than PEFT is, whose norms are rounded to the adapters' dtype."""
    errors = {"ours": 0.0, "peft": 0.0}
    plain = build(target_modules=["one"]).bfloat16()
    exact = copy.deepcopy(plain).double()
    for name, parameter in plain.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(adapter)
    fused = copy.deepcopy(plain)
    report = pk.apply(fused)
    x = inputs(64).bfloat16()
    wanted = results(exact, x.double())
    for label, model in (("ours", fused), ("peft", plain)):
        found = results(model, x)
        assert found.keys() == wanted.keys()
        relative = [(found[name].double() - value).norm() / value.norm() for name, value in wanted.items()]
        errors[label] = float(torch.stack(relative).mean())
    assert not report.fallback_calls
    assert errors["ours"] < 1.1 * errors["peft"] and errors["ours"] < 0.01


def test_autocast() -> None:
    plain = build().float()
    fused = copy.deepcopy(plain)
    report = pk.apply(fused)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = (results(model, inputs().float()) for model in (fused, plain))
    assert {name: value.dtype for name, value in ours.items()} == {name: value.dtype for name, value in theirs.items()}
    assert_same(ours, theirs, rtol=0.1, atol=0.15)
    assert not report.fallback_calls


def test_saved_and_loaded_by_peft(tmp_path: Path) -> None:
    fused, _, _ = pair()
    fused.save_pretrained(tmp_path)
    torch.manual_seed(0)
    loaded = peft.PeftModel.from_pretrained(_Two(), tmp_path).double()
    report = pk.apply(loaded)
    with torch.no_grad():
        torch.testing.assert_close(loaded(inputs()), fused(inputs()), rtol=1e-6, atol=1e-6)
    assert report.fused and not report.fallback_calls


def test_states() -> None:
    """Switching, disabling, merging and unmerging are PEFT's, and calls between them are as PEFT's are."""
    fused, plain, report = pair(adapters=("default", "other", "plain"))
    steps: list[tuple[Callable[[Any], Any], str | None]] = [
        (lambda model: model.set_adapter("other"), None),
        (lambda model: model.base_model.set_adapter(["plain"]), None),
        (
            lambda model: model.base_model.set_adapter(["plain", "other"]),
            "a DoRA adapter of it is active beside others",
        ),
        (lambda model: model.set_adapter("default"), None),
        (lambda model: model.base_model.disable_adapter_layers(), "adapters are disabled"),
        (lambda model: model.base_model.enable_adapter_layers(), None),
        (lambda model: model.merge_adapter(), "adapters are merged into the weight"),
        (lambda model: model.unmerge_adapter(), None),
    ]
    for step, reason in steps:
        for model in (fused, plain):
            step(model)
        counted = sum(report.fallback_calls.values())
        with torch.no_grad():
            torch.testing.assert_close(fused(inputs()), plain(inputs()), rtol=1e-8, atol=1e-8)
        made = sum(report.fallback_calls.values()) - counted
        assert made == (0 if reason is None else 2), reason
        assert reason is None or reason in report.fallback_calls
    with torch.no_grad():
        whole = plain.merge_and_unload()(inputs())
        torch.testing.assert_close(fused.merge_and_unload()(inputs()), whole, rtol=1e-8, atol=1e-8)


def test_reverted() -> None:
    fused, plain, _ = pair()
    pk.revert(fused)
    assert type(layer_of(fused)) is type(layer_of(plain))
    assert_same(results(fused, inputs()), results(plain, inputs()), rtol=0.0, atol=0.0)


def test_dropout_at_work_is_peft_s() -> None:
    fused, plain, report = pair(lora_dropout=0.5)
    drawn = []
    for model in (fused, plain):
        torch.manual_seed(5)
        drawn.append(results(model.train(), inputs()))
    assert_same(*drawn, rtol=0.0, atol=0.0)
    assert set(report.fallback_calls) == {"its DoRA adapter drops elements of x, with p = 0.5"}
    # A layer in evaluation drops nothing, whatever state its dropout is in.
    layer_of(fused).training = layer_of(plain).training = False
    for model in (fused, plain):
        model.base_model.model.two.eval()
    before = sum(report.fallback_calls.values())
    assert_same(results(fused, inputs()), results(plain, inputs()))
    assert sum(report.fallback_calls.values()) == before


@pytest.mark.parametrize("is_mixed", [False, True])
def test_rows_of_adapters_are_refused_by_peft(is_mixed: bool) -> None:
    fused, _, report = pair(adapters=("default", "other"))
    names = ["default", "other"]
    with torch.no_grad(), pytest.raises(ValueError, match="when DoRA is enabled"):
        if is_mixed:
            with pk.mixed_batch(fused, names):
                fused(inputs())
        else:
            fused.eval()(inputs(), adapter_names=names)
    assert set(report.fallback_calls) == {"rows choose among adapters with DoRA"}


def _hooked(layer: Any) -> None:
    layer.lora_magnitude_vector["default"].register_forward_hook(lambda *_: None)


def _turned(layer: Any) -> None:
    layer.lora_magnitude_vector["default"].weight = nn.Parameter(torch.ones(1, N, dtype=torch.float64))


class _Vector(dora.DoraLinearLayer):
    pass


def _other_class(layer: Any) -> None:
    layer.lora_magnitude_vector["default"].__class__ = _Vector


def _up_bias(layer: Any) -> None:
    layer.lora_B["default"].bias = nn.Parameter(torch.zeros(N, dtype=torch.float64))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_hooked, "its magnitude vector is not"),
        (_turned, "its magnitudes are not"),
        (_other_class, "its magnitude vector is not"),
        (_up_bias, "lora_B of its DoRA adapter has a bias"),
    ],
)
def test_what_is_changed_is_peft_s(change: Callable[[Any], None], reason: str) -> None:
    fused, plain, report = pair()
    for model in (fused, plain):
        change(layer_of(model))
    with torch.no_grad():
        torch.testing.assert_close(fused(inputs()), plain(inputs()), **EXACT)
    assert [text for text in report.fallback_calls if text.startswith(reason)] and len(report.fallback_calls) == 1


def test_a_replaced_method_is_heeded(monkeypatch: pytest.MonkeyPatch) -> None:
    fused, plain, report = pair()
    monkeypatch.setattr(dora.DoraLinearLayer, "get_weight_norm", lambda self, weight, *_, **__: weight.sum(1))
    with torch.no_grad():
        torch.testing.assert_close(fused(inputs()), plain(inputs()), rtol=0.0, atol=0.0)
    assert set(report.fallback_calls) == {"DoraLinearLayer.get_weight_norm was replaced"}
