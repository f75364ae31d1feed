"""PEFT's DoRA layers whose base is 4-bit (QDoRA), or makes its output by itself: PEFT's numbers, gradients and dtypes.

bitsandbytes belongs to the tests' environment: where it is missing these fail.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import bitsandbytes as bnb
import peft
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

import peft_kernels as pk
from peft_kernels.integrations.peft import bases, dora, four_bit
from python_ref import compare

pytestmark = pytest.mark.filterwarnings("ignore:apply. nothing in", "ignore::FutureWarning")

K, N = 64, 96
HALF = torch.bfloat16


@pytest.fixture(autouse=True)
def forced(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU ``auto`` leaves such layers to PEFT."""
    monkeypatch.setenv("PEFT_KERNELS_BACKEND", "torch")


class _Model(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.is_loaded_in_4bit = isinstance(layer, bnb.nn.Linear4bit)
        self.is_loaded_in_8bit = isinstance(layer, bnb.nn.Linear8bitLt)
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class _Tanh(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).tanh()


def _hooked(cls: Any = nn.Linear, *sizes: int) -> nn.Module:
    base = cls(*(sizes or (K, N)))
    base.register_forward_hook(lambda module, args, output: 2 * output)
    return base


def _four_bits(dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    return bnb.nn.Linear4bit(K, N, compute_dtype=dtype, quant_type="nf4", **options).to(dtype).to("cpu")


def _eight_bits() -> nn.Module:
    base = bnb.nn.Linear8bitLt(K, N, has_fp16_weights=False)
    base.load_state_dict(nn.Linear(K, N).state_dict())
    return base.to("cpu")


BASES: dict[str, Callable[[], nn.Module]] = {
    "4 bits": _four_bits,
    "4 bits, no bias": lambda: _four_bits(bias=False),
    "hooked": _hooked,
    "hooked Conv1D": lambda: _hooked(Conv1D, N, K),
    "other class": lambda: _Tanh(K, N, bias=False),
}


def build(make: Callable[[], nn.Module], dtype: torch.dtype | None = None, **options: Any) -> Any:
    """PEFT's model, with magnitudes of both signs and no factor of zeros, in evaluation."""
    torch.manual_seed(0)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["layer"], "use_dora": True, **options}
    model = peft.get_peft_model(_Model(make()), peft.LoraConfig(**settings)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = (0.5 * torch.randn(parameter.shape, generator=generator)).to(dtype or parameter.dtype)
    return model


def pair(name: str, **options: Any) -> tuple[Any, Any, pk.integrations.Report]:
    options |= {"fan_in_fan_out": True} if "Conv1D" in name else {}
    plain = build(BASES[name], **options)
    fused = copy.deepcopy(plain)
    return fused, plain, pk.apply(fused)


def layer_of(model: Any) -> Any:
    return model.base_model.model.layer


def _data(m: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x, dy = torch.randn(2, m // 2, K, generator=generator), torch.randn(2, m // 2, N, generator=generator)
    return x.to(dtype), dy


def results(model: Any, x: Tensor, dy: Tensor, call: Callable[[Tensor], Tensor] | None = None) -> dict[str, Tensor]:
    """The output, and all gradients."""
    leaf = x.clone().requires_grad_()
    named = {name: each for name, each in model.named_parameters() if each.requires_grad}
    y = (model if call is None else call)(leaf)
    gradients = torch.autograd.grad(y, [leaf, *named.values()], dy.to(y.dtype))
    return dict(zip(("y", "x", *named), (y.detach(), *gradients), strict=True))


def _close(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert got[name].dtype == value.dtype
        error = (got[name].double() - value.double()).norm() / value.double().norm()
        assert error <= tolerance, f"{name}: {float(error):.2e}"


def _exact(model: Any, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """In float64 by the equation, with the weight that bitsandbytes stands for."""
    layer = layer_of(model)
    base, scaling = layer.base_layer, layer.scaling["default"]
    w = pk.four_bit.dequantize(**four_bit.from_quant_state(base.weight)._replace(dtype=torch.float64)._asdict())
    leaf = x.double().requires_grad_()
    named = {
        name: each.detach().double().requires_grad_() for name, each in model.named_parameters() if each.requires_grad
    }
    a, b, magnitude = (named[f"base_model.model.layer.{part}.weight"] for part in (
        "lora_A.default", "lora_B.default", "lora_magnitude_vector.default"))  # fmt: skip
    gain = magnitude / (w + scaling * b @ a).norm(dim=1).detach()
    y = gain * (leaf @ w.t() + scaling * (leaf @ a.t()) @ b.t()) + (0 if base.bias is None else base.bias.double())
    gradients = torch.autograd.grad(y, [leaf, *named.values()], dy.double())
    return dict(zip(("y", "x", *named), (y.detach(), *gradients), strict=True))


@pytest.mark.parametrize("m", [8, 140])
@pytest.mark.parametrize(
    ("dtype", "adapter", "options"),
    [
        (torch.float32, torch.float32, {}),
        (torch.float32, torch.float32, {"bias": False, "compress_statistics": False}),
        (HALF, torch.float32, {}),
        (HALF, HALF, {"bias": False}),
    ],
)
def test_qdora_is_within_the_budget(
    dtype: torch.dtype, adapter: torch.dtype, options: dict[str, Any], m: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one operation each way, whose weight nobody keeps; bitsandbytes' own product is not called."""
    plain = build(lambda: _four_bits(dtype, **options), adapter)
    fused = copy.deepcopy(plain)
    report = pk.apply(fused, strict=True)
    x, dy = _data(m, dtype)
    theirs = results(plain, x, dy)
    monkeypatch.setattr(bnb.nn.Linear4bit, "__call__", None)
    ours = results(fused, x, dy)
    for name, exact in _exact(plain, x, dy).items():
        compare.assert_close(name, ours[name], theirs[name], exact)
    assert not report.fallback_calls


@pytest.mark.parametrize("name", BASES)
def test_outputs_and_gradients_are_peft_s(name: str) -> None:
    """In training too, where nothing is dropped, and under checkpointing."""
    fused, plain, report = pair(name)
    assert not report.fallbacks and bases.kind(layer_of(fused)) == bases.GIVEN
    x, dy = _data(8)
    for training in (False, True):
        theirs = results(plain.train(training), x, dy)
        assert_same = lambda ours, theirs=theirs: _close(ours, theirs, 2e-6)  # noqa: E731
        assert_same(results(fused.train(training), x, dy))
    assert_same(results(fused, x, dy, lambda x: checkpoint(fused, x, use_reentrant=False)))
    with torch.no_grad():
        torch.testing.assert_close(fused(x), plain(x), rtol=1e-5, atol=1e-5)
    assert not report.fallback_calls


@pytest.mark.parametrize("name", ["hooked", "hooked Conv1D", "other class"])
def test_float64(name: str) -> None:
    fused, plain, report = pair(name)
    x, dy = _data(8, torch.float64)
    _close(results(fused.double(), x, dy), results(plain.double(), x, dy), 1e-12)
    assert not report.fallback_calls


@pytest.mark.parametrize("adapter", [torch.float32, HALF])
@pytest.mark.parametrize("name", ["hooked", "other class"])
def test_half_precision_on_a_given_base(name: str, adapter: torch.dtype) -> None:
    """No further from float64 than PEFT."""
    plain = build(BASES[name]).to(HALF)
    exact = copy.deepcopy(plain).double()
    for key, parameter in plain.named_parameters():
        parameter.data = parameter.data.to(adapter) if "lora_" in key else parameter.data
    fused = copy.deepcopy(plain)
    report = pk.apply(fused, strict=True)
    x, dy = _data(140, HALF)
    wanted, ours, theirs = (results(model, x.to(dtype), dy) for model, dtype in (
        (exact, torch.float64), (fused, HALF), (plain, HALF)))  # fmt: skip
    for key, value in wanted.items():
        compare.assert_close(key, ours[key], theirs[key], value)
    assert not report.fallback_calls


@pytest.mark.parametrize("name", ["4 bits", "hooked"])
def test_autocast(name: str) -> None:
    fused, plain, report = pair(name)
    x, dy = _data(8)
    with torch.autocast("cpu", HALF):
        _close(results(fused, x, dy), results(plain, x, dy), 0.02)
    assert not report.fallback_calls


@pytest.mark.parametrize("name", ["4 bits", "hooked"])
def test_dtypes_where_peft_leaves_casts_to_cuda_s_autocast(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes' layers then return the magnitudes' float32, and lora.Linear its base's dtype."""
    plain = build(BASES[name] if name != "4 bits" else lambda: _four_bits(HALF), torch.float32)
    plain = plain.to(HALF) if name == "hooked" else plain
    fused = copy.deepcopy(plain)
    pk.apply(fused)
    x, _ = _data(8, HALF)
    with torch.no_grad(), torch.autocast("cpu", HALF), monkeypatch.context() as patch:
        # Inside, for autocast asks it what there was before.
        patch.setattr(torch, "is_autocast_enabled", lambda *_: True)
        y, expected = fused(x), plain(x)
    assert y.dtype == expected.dtype
    torch.testing.assert_close(y.float(), expected.float(), rtol=0.05, atol=0.1)


def test_hooked_4_bits_run_on_bitsandbytes_product() -> None:
    fused, plain, report = pair("4 bits")
    for model in (fused, plain):
        layer_of(model).base_layer.register_forward_hook(lambda module, args, y: y + 1)
    _close(*(results(model, *_data(8)) for model in (fused, plain)), 2e-6)
    assert not report.fallback_calls


def test_compiled_it_is_one_operator() -> None:
    fused, plain, _ = pair("4 bits")
    torch._dynamo.reset()
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    _close(results(fused, *_data(8), compiled), results(plain, *_data(8)), 2e-6)


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("4 bits", {"lora_dropout": 0.5}, "its DoRA adapter drops elements of x, with p = 0.5"),
        ("hooked", {"lora_dropout": 0.5}, "its DoRA adapter drops elements of x, with p = 0.5"),
        ("4 bits", {"auto": True}, "PEFT adds to the output of its base layer, a Linear4bit, on a CPU"),
    ],
)
def test_what_is_peft_s(name: str, options: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = dict(options)
    if options.pop("auto", False):
        monkeypatch.delenv("PEFT_KERNELS_BACKEND")
    fused, plain, report = pair(name, **options)
    drawn = []
    for model in (fused, plain):
        torch.manual_seed(5)
        drawn.append(results(model.train(), *_data(8)))
    _close(*drawn, 0.0)
    assert dict(report.fallback_calls) == {reason: 1}


def test_other_bases_are_peft_s() -> None:
    """Such as those whose decoding changes the layer."""
    model = build(_eight_bits)
    assert set(pk.apply(model).fallbacks.values()) == {"its DoRA adapter is on a Linear8bitLt"}


def test_a_replaced_method_is_heeded(monkeypatch: pytest.MonkeyPatch) -> None:
    fused, plain, report = pair("hooked")
    monkeypatch.setattr(dora.DoraLinearLayer, "get_weight_norm", lambda self, weight, *_, **__: weight.sum(1))
    with torch.no_grad():
        torch.testing.assert_close(fused(_data(8)[0]), plain(_data(8)[0]), rtol=0.0, atol=0.0)
    assert set(report.fallback_calls) == {"DoraLinearLayer.get_weight_norm was replaced"}
