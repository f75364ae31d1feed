"""PEFT's (IA)^3 layers: what ``apply`` fuses has PEFT's numbers, gradients and dtypes, and the rest its own code."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from transformers.pytorch_utils import Conv1D

import peft_kernels as pk
from benchmarks.counts import Traffic
from peft_kernels.integrations.peft import ia3
from python_ref import compare
from tests.integrations import models

K, N = 40, 72
HALF = torch.bfloat16
ON_CPU = "it runs on a CPU, where PEFT's own takes less time"


@pytest.fixture
def forced(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU ``auto`` leaves these layers to PEFT."""
    monkeypatch.setenv("PEFT_KERNELS_BACKEND", "torch")


class _Model(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


BASES = {
    "linear": lambda: nn.Linear(K, N),
    "no bias": lambda: nn.Linear(K, N, bias=False),
    "Conv1D": lambda: Conv1D(N, K),
}


def _pair(name: str = "linear", adapters: int = 1, **options: Any) -> tuple[Any, Any, pk.integrations.Report]:
    torch.manual_seed(0)
    settings = {"target_modules": ["layer"], "feedforward_modules": [], "init_ia3_weights": False, **options}
    settings |= {"fan_in_fan_out": name == "Conv1D"}
    plain = peft.get_peft_model(_Model(BASES[name]()), peft.IA3Config(**settings))
    if adapters > 1:
        plain.add_adapter("b", peft.IA3Config(**settings))
        plain.base_model.set_adapter(["default", "b"])
    fused = copy.deepcopy(plain)
    return fused, plain, pk.apply(fused)


def _layer(model: Any) -> Any:
    return model.base_model.model.layer


def _data(dtype: torch.dtype = torch.float32, m: int = 48) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, m // 2, K, generator=generator).to(dtype), torch.randn(2, m // 2, N, generator=generator)


def _results(model: Any, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    leaf = x.clone().requires_grad_()
    named = {name: each for name, each in model.named_parameters() if each.requires_grad}
    y = model(leaf)
    gradients = torch.autograd.grad(y, [leaf, *named.values()], dy.to(y.dtype))
    return dict(zip(("y", "x", *named), (y.detach(), *gradients), strict=True))


def _close(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert got[name].dtype == value.dtype, name
        error = (got[name].double() - value.double()).norm() / value.double().norm()
        assert error <= tolerance, f"{name}: {float(error):.2e}"


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize("adapters", [1, 2])
@pytest.mark.parametrize("name", BASES)
def test_outputs_and_gradients_are_peft_s(name: str, adapters: int) -> None:
    fused, plain, report = _pair(name, adapters)
    assert type(_layer(fused)) is ia3.FusedIA3Linear and not report.fallbacks
    _close(_results(fused, *_data()), _results(plain, *_data()), 1e-6)
    data = _data(torch.float64)
    _close(_results(fused.double(), *data), _results(plain.double(), *data), 1e-12)
    assert not report.fallback_calls


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize("vector", [torch.float32, HALF])
def test_half_precision(vector: torch.dtype) -> None:
    """No further from float64 than PEFT."""
    fused, plain, report = _pair()
    for model in (fused, plain):
        model.to(HALF)
        _layer(model).ia3_l.to(vector)
    exact = copy.deepcopy(plain).double()
    x, dy = _data(HALF, 400)
    wanted, ours, theirs = _results(exact, x.double(), dy), _results(fused, x, dy), _results(plain, x, dy)
    for name, value in wanted.items():
        compare.assert_close(name, ours[name], theirs[name], value)
    assert not report.fallback_calls


@pytest.mark.usefixtures("forced")
def test_autocast() -> None:
    fused, plain, report = _pair()
    with torch.autocast("cpu", HALF):
        _close(_results(fused, *_data()), _results(plain, *_data()), 0.02)
        # Which autocast leaves alone.
        data = _data(torch.float64)
        _close(_results(fused.double(), *data), _results(plain.double(), *data), 1e-12)
    assert not report.fallback_calls


@pytest.mark.usefixtures("forced")
def test_states() -> None:
    """Disabled, merged, unmerged and without an adapter: PEFT's own."""
    fused, plain, report = _pair()
    (x, _), outputs = _data(), []
    for model in (fused, plain):
        with torch.no_grad():
            found = [model(x)]
            with model.disable_adapter():
                found.append(model(x))
            model.merge_adapter()
            found.append(model(x))
            model.unmerge_adapter()
            found.append(model(x))
        outputs.append(found)
    for got, expected in zip(*outputs, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    assert dict(report.fallback_calls) == {"adapters are disabled": 1, "adapters are merged into the weight": 1}


@pytest.mark.usefixtures("forced")
def test_what_is_not_fused_says_why() -> None:
    fused, plain, report = _pair()
    for model in (fused, plain):
        _layer(model).base_layer.register_forward_hook(lambda module, args, y: y + 1)
    _close(_results(fused, *_data()), _results(plain, *_data()), 0.0)
    reason = "its base layer is a Linear that has hooks, or makes its output by itself"
    assert dict(report.fallback_calls) == {reason: 1}
    feedforward = _pair(feedforward_modules=["layer"])[2]
    assert set(feedforward.fallbacks.values()) == {"its vector multiplies the input (feedforward)"}
    torch.manual_seed(0)
    config = peft.IA3Config(target_modules=["layer"], feedforward_modules=[])
    convolution = peft.get_peft_model(_Model(nn.Conv2d(3, 4, 1)), config)
    assert set(pk.apply(convolution).fallbacks.values()) == {"it is PEFT's layer.Conv2d, not its ia3.Linear"}


@pytest.mark.usefixtures("forced")
def test_compiled_it_is_one_operator() -> None:
    fused, plain, _ = _pair()
    torch._dynamo.reset()
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    x, _ = _data()
    torch.testing.assert_close(compiled(x), plain(x), rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("forced")
def test_revert_and_saving_are_peft_s(tmp_path: Any) -> None:
    fused, plain, _ = _pair()
    fused.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(_Model(copy.deepcopy(_layer(plain).base_layer)), tmp_path)
    torch.testing.assert_close(loaded(_data()[0]), plain(_data()[0]), rtol=1e-5, atol=1e-6)
    pk.revert(fused)
    assert [type(each) for each in fused.modules()] == [type(each) for each in plain.modules()]


def test_on_a_cpu_they_are_peft_s() -> None:
    """In a whole model too, whose feedforward layers are PEFT's on every device."""
    torch.manual_seed(0)
    make, _ = models.ARCHITECTURES["llama"]
    targets = ["k_proj", "v_proj", "down_proj"]
    config = peft.IA3Config(target_modules=targets, feedforward_modules=["down_proj"], init_ia3_weights=False)
    plain = peft.get_peft_model(make().eval(), config)
    fused = copy.deepcopy(plain)
    with pytest.warns(UserWarning, match="not"):
        report = pk.apply(fused)
    assert set(report.fallbacks.values()) == {"its vector multiplies the input (feedforward)", ON_CPU}
    (logits, gradients), (expected, wanted) = models.run(fused), models.run(plain)
    assert torch.equal(logits, expected) and gradients.keys() == wanted.keys()
    assert all(torch.equal(gradient, wanted[name]) for name, gradient in gradients.items())
    assert set(report.fallback_calls) == {ON_CPU}


@pytest.mark.usefixtures("forced")
def test_a_backward_pass_moves_less_than_peft_s() -> None:
    """M and N far above K: what is left to count is the activations that passes read and write."""
    fused, plain, _ = _pair()
    x, dy = _data(m=400)
    moved = []
    for model in (fused, plain):
        y = model(x.clone().requires_grad_())
        with Traffic() as traffic:
            y.backward(dy)
        moved.append(traffic.bytes)
    assert moved[0] < moved[1]
