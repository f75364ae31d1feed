"""Rows that choose adapters on base modules that make their output by themselves: ``adapter_names`` and mixed_batch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")
pytest.importorskip("bitsandbytes")

import peft_kernels as pk
from python_ref import compare
from tests.integrations.test_peft_bases import BASES, EXACT, assert_same, inputs, layer_of, run

NAMES = ["b", "__base__", "default", "b", "default"]
LATE = {"alora_invocation_tokens": [1]}
TAKE_NAMES = ("other class", "hooked", "4 bits", "8 bits")


@pytest.fixture
def forced(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU ``auto`` leaves ``adapter_names`` on such layers to PEFT."""
    monkeypatch.setenv("PEFT_KERNELS_BACKEND", "torch")


def _pair(name: str, p: float = 0.0, **options: Any) -> tuple[Any, Any, pk.integrations.Report]:
    """A model applied and as it was, with adapters of two ranks and scalings that are all trained."""
    plain: Any = BASES[name](lora_dropout=p)
    config = peft.LoraConfig(
        r=3, lora_alpha=15, lora_dropout=p / 2, target_modules=["layer"], init_lora_weights=False, **options
    )
    torch.manual_seed(1)
    if hasattr(plain, "add_adapter"):
        plain.add_adapter("b", config)
    else:
        layer_of(plain).update_layer("b", r=3, lora_alpha=15, config=config)
    for name, parameter in plain.named_parameters():
        if "lora_" in name:
            parameter.requires_grad_()
    fused = copy.deepcopy(plain)
    return fused, plain, pk.apply(fused)


def _by_adapter(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The output and gradients of PEFT's layers on the rows of each adapter, which have a layer's output alone."""
    layer, leaf = layer_of(model), x.clone().requires_grad_()
    model.zero_grad()
    rows = []
    for row, name in enumerate(NAMES):
        layer._disable_adapters = name == "__base__"
        if name != "__base__":
            layer._active_adapter = [name]
        rows.append(layer(leaf[row : row + 1]))
    layer._disable_adapters, layer._active_adapter = False, ["default"]
    y = torch.cat(rows)
    y.square().sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": leaf.grad, **gradients}


def _outcome(model: nn.Module, call: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """A call's output and all gradients."""
    leaf = inputs().requires_grad_()
    model.zero_grad()
    y = call(leaf)
    y.square().sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": leaf.grad, **gradients}


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize("name", TAKE_NAMES)
def test_adapter_names(name: str) -> None:
    """PEFT's result; the base module is called once, and its output is left alone."""
    fused, plain, report = _pair(name)
    # What bitsandbytes multiplies by in training has other bits.
    fused, plain = fused.eval(), plain.eval()
    outputs: list[Tensor] = []
    layer_of(fused).base_layer.register_forward_hook(lambda module, args, output: outputs.append(output))
    with torch.no_grad():
        base = layer_of(plain).base_layer(inputs())
        got, expected = (model(inputs(), adapter_names=NAMES) for model in (fused, plain))
    torch.testing.assert_close(got, expected, **EXACT[torch.float32])
    assert len(outputs) == 1 and not report.fallback_calls
    compare.assert_bitwise_equal("the base's output", outputs[0], base)
    compare.assert_bitwise_equal("a row without an adapter", got[1], base[1])


@pytest.mark.parametrize("name", [*TAKE_NAMES, "GPTQ, fake"])
def test_mixed_batch_trains(name: str) -> None:
    """On a CPU too where no backend is forced: PEFT has no such call in training, and none on some layers at all."""
    fused, plain, report = _pair(name)
    with pk.mixed_batch(fused.train(), NAMES):
        got = run(fused, inputs())
    assert_same(got, _by_adapter(plain.train(), inputs()), **EXACT[torch.float32])
    assert not report.fallback_calls


@pytest.mark.parametrize("name", ["hooked", "4 bits"])
def test_mixed_batch_that_is_checkpointed(name: str) -> None:
    """The repetition has the batch of its call, and the same masks."""
    fused, _, report = _pair(name, p=0.5)
    layer, results = layer_of(fused.train()), []
    with pk.mixed_batch(fused, NAMES) as batch:
        for call in (layer, lambda x: checkpoint(batch.bound(layer), x, use_reentrant=False)):
            torch.manual_seed(4)
            results.append(_outcome(fused, call))
    for value, (name, expected) in zip(results[1].values(), results[0].items(), strict=True):
        compare.assert_bitwise_equal(name, value, expected)
    assert not report.fallback_calls


@pytest.mark.parametrize("name", ["other class", "4 bits"])
def test_mixed_batch_compiles(name: str) -> None:
    fused, _, _ = _pair(name)
    torch._dynamo.reset()
    compiled = torch.compile(fused.train(), backend="aot_eager", fullgraph=True)
    with pk.mixed_batch(fused, NAMES):
        expected, got = _outcome(fused, fused), _outcome(fused, compiled)
    assert_same(got, expected, **EXACT[torch.float32])


@pytest.mark.parametrize("name", ["other class", "hooked", "8 bits"])
def test_mixed_batch_under_autocast(name: str) -> None:
    """As PEFT's layers on the rows of each adapter, but for half precision's rounding."""
    fused, plain, report = _pair(name)
    with torch.autocast("cpu", torch.bfloat16):
        with pk.mixed_batch(fused.train(), NAMES):
            got = _outcome(fused, fused)
        expected = _by_adapter(plain.train(), inputs())
    assert got.keys() == expected.keys() and got["y"].dtype == expected["y"].dtype
    for key, value in expected.items():
        assert (got[key].float() - value.float()).norm() <= 0.02 * value.float().norm(), key
    assert not report.fallback_calls


def test_mixed_batch_with_invocations() -> None:
    """Tokens before an adapter's invocation have what the base layer makes."""
    fused, plain, report = _pair("4 bits", **LATE)
    offsets = [2, None, None, 1, None]
    with torch.no_grad(), pk.mixed_batch(fused.eval(), NAMES, alora_offsets=offsets):
        got = fused(inputs())
    with torch.no_grad():
        expected = plain.eval()(inputs(), adapter_names=NAMES, alora_offsets=offsets)
    torch.testing.assert_close(got, expected, **EXACT[torch.float32])
    assert not report.fallback_calls


def test_each_row_drops_with_its_adapter_s_p() -> None:
    """With a p of nearly one for an adapter and of a half for the other, shares of what is dropped tell them apart."""
    fused, _, _ = _pair("other class", p=0.9)
    layer = layer_of(fused.train())
    for name in ("default", "b"):
        with torch.no_grad():
            layer.lora_B[name].weight.fill_(1.0)
    x = torch.ones(len(NAMES), 64, 64).requires_grad_()
    with pk.mixed_batch(fused, NAMES):
        y = fused(x)
    (dx,) = torch.autograd.grad((y - layer.base_layer(x)).sum(), x)
    kept = (dx.abs() > 1e-4).float().mean((1, 2))
    for share, name in zip(kept.tolist(), NAMES, strict=True):
        assert abs(share - {"b": 0.55, "default": 0.1, "__base__": 0.0}[name]) < 0.04


@pytest.mark.usefixtures("forced")
def test_tokens_before_an_invocation_have_none() -> None:
    fused, plain, report = _pair("4 bits", **LATE)
    offsets = [2, None, None, 1, None]
    with torch.no_grad():
        got, expected = (model.eval()(inputs(), adapter_names=NAMES, alora_offsets=offsets) for model in (fused, plain))
    torch.testing.assert_close(got, expected, **EXACT[torch.float32])
    assert not report.fallback_calls


@pytest.mark.parametrize("name", ["other class", "GPTQ, fake"])
def test_an_error_of_the_base_module_is_the_caller_s(name: str) -> None:
    """After one call of it, and as it was."""
    fused, _, report = _pair(name)
    called = []

    def fails(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        called.append(args)
        raise ValueError("no such block of the weight")

    modules = layer_of(fused)._modules
    modules.get("quant_linear_module", modules["base_layer"]).register_forward_pre_hook(fails)
    with pk.mixed_batch(fused, NAMES), pytest.raises(ValueError, match="no such block of the weight"):
        fused(inputs())
    assert len(called) == 1 and not report.fallback_calls


def test_adapter_names_on_a_cpu_are_peft_s() -> None:
    fused, plain, report = _pair("4 bits")
    with torch.no_grad():
        got, expected = (model.eval()(inputs(), adapter_names=NAMES) for model in (fused, plain))
    compare.assert_bitwise_equal("y", got, expected)
    assert list(report.fallback_calls) == ["PEFT adds to the output of its base layer, a Linear4bit, on a CPU"]


@pytest.mark.usefixtures("forced")
def test_layers_that_take_no_names() -> None:
    """PEFT's error for its names; and what mixed_batch cannot run is an error there, which no loop of PEFT's is for."""
    fused, plain, _ = _pair("GPTQ, fake")
    for model in (fused, plain):
        with pytest.raises(TypeError, match="adapter_names"):
            layer_of(model)(inputs(), adapter_names=NAMES)
    layer_of(fused).lora_A["b"].bfloat16()
    with pk.mixed_batch(fused, NAMES), pytest.raises(pk.UnsupportedError, match=r"mixed_batch: .* several dtypes"):
        fused(inputs())
