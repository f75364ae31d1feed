"""PEFT's layers on bitsandbytes' 4-bit weights: what is fused, what falls back, and when a weight is read.

bitsandbytes belongs to the tests' environment: where it is missing these fail.
"""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.bnb import Linear4bit as PeftLinear4bit
from torch import Tensor, nn

import peft_kernels as pk
from peft_kernels.integrations.peft import four_bit
from python_ref import compare
from tests.contract import observe

K, N = 64, 96


@pytest.fixture(autouse=True)
def forced(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU ``auto`` leaves such layers to PEFT."""
    monkeypatch.setenv("PEFT_KERNELS_BACKEND", "torch")


def _refuse(*_: Any) -> None:
    raise AssertionError("the operator was run")


class _Model(nn.Module):
    """One layer, quantized where it lies."""

    def __init__(self, dtype: torch.dtype, **options: Any) -> None:
        super().__init__()
        self.is_loaded_in_4bit, self.config = True, {"model_type": "custom"}
        self.proj = Linear4bit(K, N, **{"quant_type": "nf4", "compute_dtype": dtype} | options).to(dtype)
        self.to("cpu")

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        return self.proj(x, **kwargs)


def _model(dtype: torch.dtype = torch.float32, *, lora: dict[str, Any] | None = None, **options: Any) -> Any:
    """PEFT's model in training; no factor is zero."""
    torch.manual_seed(0)
    settings = {"target_modules": ["proj"], "r": 4, "init_lora_weights": False} | (lora or {})
    return get_peft_model(_Model(dtype, **options), LoraConfig(**settings)).train()


def _layer(model: Any) -> Any:
    return model.base_model.model.proj


def _run(layer: Any, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """The output, and all gradients."""
    leaf = x.detach().requires_grad_()
    named = {name: each for name, each in layer.named_parameters() if each.requires_grad}
    y = layer(leaf)
    gradients = torch.autograd.grad(y, [leaf, *named.values()], dy.to(y.dtype))
    return dict(zip(("y", "x", *named), (y.detach(), *gradients), strict=True))


def _exact(layer: Any, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """The same in float64 by the equation, with the weight that bitsandbytes stands for."""
    weight = four_bit.from_quant_state(layer.base_layer.weight)
    w = pk.four_bit.dequantize(**weight._replace(dtype=torch.float64)._asdict())
    leaf, bias = x.double().requires_grad_(), layer.base_layer.bias
    named = {name: each for name, each in layer.named_parameters() if each.requires_grad}
    wide = {name: each.detach().double().requires_grad_() for name, each in named.items()}
    y = leaf @ w.t() + (0 if bias is None else bias.double())
    for adapter in layer.active_adapters:
        a, b = (wide[f"lora_{part}.{adapter}.weight"] for part in "AB")
        y = y + layer.scaling[adapter] * (leaf @ a.t() @ b.t())
    gradients = torch.autograd.grad(y, [leaf, *wide.values()], dy.double())
    return dict(zip(("y", "x", *wide), (y.detach(), *gradients), strict=True))


def _data(m: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, dy = torch.randn(2, m // 2, K, generator=generator), torch.randn(2, m // 2, N, generator=generator)
    return x.to(dtype), dy.to(dtype)


HALF = torch.bfloat16


@pytest.mark.parametrize(
    ("dtype", "autocast", "options"),
    [
        (torch.float32, None, {}),
        (torch.float32, None, {"compute_dtype": None, "quant_type": "fp4", "bias": False}),
        (HALF, None, {"compress_statistics": False, "quant_storage": HALF}),
        (HALF, HALF, {"compress_statistics": False}),
    ],
)
def test_it_computes_what_peft_does(dtype: torch.dtype, autocast: torch.dtype | None, options: dict[str, Any]) -> None:
    """Within the error budget: dtypes of PEFT's results, all gradients, each call on the operator."""
    model, twin = _model(dtype, **options), _model(dtype, **options)
    report = pk.apply(model, strict=True)
    for m in (8, 40):
        x, dy = _data(m, dtype)
        with torch.autocast("cpu", autocast or HALF, enabled=autocast is not None):
            ours, theirs = _run(_layer(model), x, dy), _run(_layer(twin), x, dy)
        for name, exact in _exact(_layer(twin), x, dy).items():
            assert ours[name].dtype == theirs[name].dtype
            compare.assert_close(name, ours[name], theirs[name], exact)
    assert not report.fallback_calls
    base, other = _layer(model).base_layer, _layer(twin).base_layer
    assert (base.compute_dtype, base.compute_type_is_set) == (other.compute_dtype, other.compute_type_is_set)
    assert base.bias is None or base.bias.dtype == other.bias.dtype


def test_float32_has_peft_s_bits_where_few_rows_are_added_last() -> None:
    """W is bitsandbytes' to the bit, and the steps are PEFT's."""
    model, twin, (x, dy) = _model(), _model(), _data(8, torch.float32)
    pk.apply(model)
    ours, theirs = (_run(_layer(each), x, dy) for each in (model, twin))
    for name in ("y", "x"):
        compare.assert_bitwise_equal(name, ours[name], theirs[name])


def test_several_adapters_and_their_dropout() -> None:
    """Each with a mask of its own; without masks the sum is PEFT's."""
    model, (x, dy) = _model(lora={"lora_dropout": 0.5}), _data(40, torch.float32)
    second = LoraConfig(target_modules=["proj"], r=3, lora_dropout=0.2, init_lora_weights=False)
    model.add_adapter("second", second)
    model.base_model.set_adapter(["default", "second"])
    report, layer = pk.apply(model, strict=True), _layer(model)
    torch.manual_seed(5)
    first = _run(layer, x, dy)
    torch.manual_seed(5)
    again = _run(layer, x, dy)
    assert all(torch.equal(first[name], again[name]) for name in first)
    model.eval()
    for name, exact in _exact(layer, x, dy).items():
        torch.testing.assert_close(_run(layer, x, dy)[name].double(), exact, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(first[name].double(), exact, rtol=0.05)
    assert not report.fallback_calls


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"x": torch.float32, "dtype": HALF}, None),
        ({"autocast": torch.float16, "dtype": HALF}, None),
        ({"autocast": HALF, "x": torch.float32, "dtype": HALF}, None),
        ({"hook": True}, None),
        ({"auto": True}, "PEFT adds to the output of its base layer, a Linear4bit, on a CPU"),
        ({"names": ["default", "__base__"]}, None),
        ({"disabled": True}, "adapters are disabled"),
    ],
)
def test_what_else_there_is_runs_on_bitsandbytes_product(
    change: dict[str, Any], reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The update is added to it, or PEFT's own layer runs with its bits."""
    dtype = change.get("dtype", torch.float32)
    model, twin = _model(dtype).eval(), _model(dtype).eval()
    report = pk.apply(model)
    monkeypatch.setattr(four_bit, "four_bit_call", _refuse)
    if change.get("auto"):
        monkeypatch.delenv("PEFT_KERNELS_BACKEND")
    x, _ = _data(8, change.get("x", dtype))
    kwargs = {"adapter_names": change["names"]} if "names" in change else {}
    autocast, ys = change.get("autocast"), []
    for each in (model, twin):
        if change.get("disabled"):
            each.base_model.disable_adapter_layers()
        if change.get("hook"):
            _layer(each).base_layer.register_forward_hook(lambda module, args, y: y + 1)
        with torch.autocast("cpu", autocast or HALF, enabled=autocast is not None):
            ys.append(_layer(each)(x, **kwargs))
    if reason is not None:
        compare.assert_bitwise_equal("y", *ys)
    # A sum of the product and an update is rounded in another order, once each in the least of the dtypes.
    ours, theirs = (y.double() for y in ys)
    assert float((ours - theirs).norm() / theirs.norm()) <= torch.finfo(HALF if autocast else dtype).eps
    assert dict(report.fallback_calls) == ({} if reason is None else {reason: 1})


def test_a_weight_is_read_once_and_again_when_it_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its table is compared on the host, which must not happen in each step."""
    reads: list[int] = []
    original = four_bit.from_quant_state
    monkeypatch.setattr(four_bit, "from_quant_state", lambda *given: (reads.append(1), original(*given))[1])
    model, other, (x, _) = _model(), _model(), _data(8, torch.float32)
    pk.apply(model)
    base = _layer(model).base_layer
    with torch.no_grad():
        before = _layer(model)(x)
        assert torch.equal(_layer(model)(x), before) and len(reads) == 1
        # In place, as load_state_dict does; replaced, as to() and cuda() do; and its statistics alone.
        base.weight.data.copy_(other.base_model.model.proj.base_layer.weight.data.flip(0))
        changed = _layer(model)(x)
        assert not torch.equal(changed, before)
        base.weight = copy.deepcopy(base.weight)
        assert torch.equal(_layer(model)(x), changed) and len(reads) >= 2
        count = len(reads)
        base.weight.quant_state.absmax = base.weight.quant_state.absmax.flip(0)
        ours = _layer(model)(x)
        assert len(reads) == count + 1
        pk.revert(model)
        assert torch.equal(_layer(model)(x), ours) and not torch.equal(ours, changed)


def test_a_lost_state_is_peft_s_to_recover() -> None:
    """As where FSDP made the weight a plain parameter: bitsandbytes puts the module's state back."""
    model, (x, _) = _model(), _data(8, torch.float32)
    report, layer = pk.apply(model), _layer(model)
    with torch.no_grad():
        expected = layer(x)
    layer.base_layer.weight = nn.Parameter(layer.base_layer.weight.data, requires_grad=False)
    for _ in range(2):
        torch.testing.assert_close(layer(x), expected)
    assert not report.fallback_calls


def test_class_swap_copies_pickles_and_reverts() -> None:
    model, (x, _) = _model(), _data(8, torch.float32)
    pk.apply(model)
    layer = _layer(model)
    assert type(layer) is four_bit.FusedLoraLinear4bit and isinstance(layer, PeftLinear4bit)
    assert type(_layer(copy.deepcopy(model))) is four_bit.FusedLoraLinear4bit
    assert layer.__reduce_ex__(4)[1][0] is PeftLinear4bit and str(layer).startswith("lora.Linear4bit")
    assert b"peft_kernels" not in pickle.dumps(layer.lora_A)
    forward = layer.forward
    pk.revert(model)
    assert type(layer) is PeftLinear4bit and torch.equal(forward(x), layer(x))


def test_compiled_it_is_one_operator() -> None:
    """No graph break, and the weight's bits may change behind it."""
    model, (x, dy) = _model(), _data(40, torch.float32)
    pk.apply(model)
    layer, recorder = _layer(model), observe.Recorder()
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=recorder.compiler)
    leaf = x.requires_grad_()
    for _ in range(2):
        y, expected = compiled(leaf), layer(leaf)
        torch.testing.assert_close(y, expected)
        (dx,), (wanted,) = (torch.autograd.grad(each, leaf, dy) for each in (y, expected))
        torch.testing.assert_close(dx, wanted)
        layer.base_layer.weight.data.copy_(layer.base_layer.weight.data.flip(0))
    assert {str(target) for target, _ in recorder.calls} == {
        f"peft_kernels.lora_four_bit{which}.default" for which in ("", "_backward")
    }
