"""PEFT's LoRA layers on base modules that make their output by themselves: equal to PEFT's, and every fallback counted.

bitsandbytes' layers are its own, on a CPU. Of the other libraries nothing is installed: there the base module is a fake
that has the names and sizes PEFT reads, under PEFT's own class.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")
bnb = pytest.importorskip("bitsandbytes")

from peft.tuners.lora.aqlm import AqlmLoraLinear
from peft.tuners.lora.awq import AwqLoraLinear
from peft.tuners.lora.bnb import Linear4bit
from peft.tuners.lora.gptq import GPTQLoraLinear
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.tuners.lora.te import TeLinear
from peft.tuners.lora.torchao import TorchaoLoraLinear

import peft_kernels as pk
from peft_kernels.integrations.peft import bases
from peft_kernels.integrations.sites import Swapped
from python_ref import compare

pytestmark = pytest.mark.filterwarnings("ignore:apply. nothing in", "ignore:Merge lora", "ignore:Unmerge lora")

SIZE, ROWS = 64, 5
EXACT = {torch.float32: {"rtol": 1e-5, "atol": 1e-5}, torch.float64: {"rtol": 1e-12, "atol": 1e-12}}


class _Tanh(nn.Linear):
    """A base layer with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).tanh()


class _Fake(nn.Module):
    """A quantized layer's stand-in: no weight of nn.Linear's, sizes under the names that PEFT reads."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("codes", weight)
        self.out_features, self.in_features = weight.shape

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.codes.to(x.dtype))


class _Blind(torch.autograd.Function):
    """A product whose backward pass is missing, as some of float8 have it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        y = x @ weight.t()
        ctx.mark_non_differentiable(y)
        return y


class _NoBackward(_Fake):
    def forward(self, x: Tensor) -> Tensor:
        return _Blind.apply(x, self.codes)


class _Pair(_Fake):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x), None


class _Wide(_Fake):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.double())


class _Keeps(_Fake):
    """Returns what it keeps."""

    def forward(self, x: Tensor) -> Tensor:
        self.kept = super().forward(x)
        return self.kept


def _weight() -> Tensor:
    return torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(3)) / 8


def _hooked() -> nn.Module:
    base = nn.Linear(SIZE, SIZE)
    base.register_forward_hook(lambda module, args, output: 2 * output)
    return base


def _normed() -> nn.Module:
    return nn.utils.parametrizations.weight_norm(nn.Linear(SIZE, SIZE))


def _bits(bits: int) -> nn.Module:
    source = nn.Linear(SIZE, SIZE)
    if bits == 4:
        base = bnb.nn.Linear4bit(SIZE, SIZE, compute_dtype=torch.float32, quant_type="nf4")
    else:
        base = bnb.nn.Linear8bitLt(SIZE, SIZE, has_fp16_weights=False)
    base.load_state_dict(source.state_dict())
    return base.to("cpu")


class Model(nn.Module):
    """A model of one layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def _chosen(make: Callable[[], nn.Module], **options: Any) -> nn.Module:
    """PEFT's model, whose layer PEFT has chosen."""
    torch.manual_seed(0)
    model = Model(make())
    model.is_loaded_in_4bit = isinstance(model.layer, bnb.nn.Linear4bit)
    model.is_loaded_in_8bit = isinstance(model.layer, bnb.nn.Linear8bitLt)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["layer"], "init_lora_weights": False, **options}
    return peft.get_peft_model(model, peft.LoraConfig(**settings))


def _around(cls: type[nn.Module], make: Callable[[], nn.Module], **options: Any) -> nn.Module:
    """PEFT's layer of a class around a fake base, as PEFT would make it beside the library."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, **options)
    return Model(cls(make(), "default", config=config, r=4, lora_alpha=8))


def _fake() -> nn.Module:
    return _Fake(_weight())


class _Torchao(nn.Linear):
    """torchao's layers are nn.Linear with a weight of a class of its own; this one's is none."""


BASES: dict[str, Callable[..., nn.Module]] = {
    "other class": lambda **options: _chosen(lambda: _Tanh(SIZE, SIZE), **options),
    "hooked": lambda **options: _chosen(_hooked, **options),
    "parametrized": lambda **options: _chosen(_normed, **options),
    "4 bits": lambda **options: _chosen(lambda: _bits(4), **options),
    "8 bits": lambda **options: _chosen(lambda: _bits(8), **options),
    "GPTQ, fake": lambda **options: _around(GPTQLoraLinear, _fake, **options),
    "AWQ, fake": lambda **options: _around(AwqLoraLinear, _fake, **options),
    "AQLM, fake": lambda **options: _around(AqlmLoraLinear, _fake, **options),
    "TransformerEngine, fake": lambda **options: _around(TeLinear, _fake, **options),
    "torchao, fake": lambda **options: _around(TorchaoLoraLinear, lambda: _Torchao(SIZE, SIZE), **options),
}
EXACT_IN_FLOAT64 = tuple(name for name in BASES if "bits" not in name)


@pytest.fixture(autouse=True)
def no_torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT asks it for a class of weights that it refuses."""
    monkeypatch.setattr(TorchaoLoraLinear, "_check_dtype_supported", lambda self: None)


def layer_of(model: nn.Module) -> Any:
    return next(module for module in model.modules() if hasattr(module, "lora_A"))


def pair(name: str, **options: Any) -> tuple[nn.Module, nn.Module, pk.integrations.Report]:
    """The same model applied, and as it was."""
    plain = BASES[name](**options)
    fused = copy.deepcopy(plain)
    return fused, plain, pk.apply(fused, strict=True)


def inputs(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(ROWS, 3, SIZE, generator=torch.Generator().manual_seed(1)).to(dtype)


def run(model: nn.Module, x: Tensor, **kwargs: Any) -> dict[str, Tensor]:
    """The output, and the gradients of x and of all parameters that have one."""
    model.zero_grad()
    leaf = x.clone().requires_grad_()
    y = model(leaf, **kwargs)
    y.square().sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": leaf.grad, **gradients}


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor], **tolerances: float) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        scale = value.abs().max().item()
        limits = {"rtol": tolerances["rtol"], "atol": tolerances["atol"] * scale}
        torch.testing.assert_close(got[name], value, **limits, msg=lambda text, name=name: f"{name}: {text}")


@pytest.fixture(autouse=True)
def forced(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU ``auto`` leaves such layers to PEFT."""
    monkeypatch.setenv("PEFT_KERNELS_BACKEND", "torch")


@pytest.mark.parametrize("name", ["4 bits", "hooked"])
def test_on_a_cpu_they_are_peft_s(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PEFT_KERNELS_BACKEND")
    plain = BASES[name]()
    fused = copy.deepcopy(plain)
    report = pk.apply(fused)
    reason = f"PEFT adds to the output of its base layer, a {type(layer_of(fused).base_layer).__name__}, on a CPU"
    assert list(report.fallbacks.values()) == [reason]
    assert_same(run(fused, inputs()), run(plain, inputs()), rtol=0.0, atol=0.0)
    assert dict(report.fallback_calls) == {reason: 1}


@pytest.mark.parametrize("name", BASES)
def test_output_and_gradients(name: str) -> None:
    fused, plain, report = pair(name)
    assert report.fused and isinstance(layer_of(fused), Swapped)
    assert bases.kind(layer_of(fused)) == bases.GIVEN
    for training in (False, True):
        assert_same(run(fused.train(training), inputs()), run(plain.train(training), inputs()), **EXACT[torch.float32])
    with torch.no_grad():
        torch.testing.assert_close(fused(inputs()), plain(inputs()))
    assert not report.fallback_calls


@pytest.mark.parametrize("name", EXACT_IN_FLOAT64)
def test_float64(name: str) -> None:
    fused, plain, report = pair(name)
    got, expected = (run(model.double(), inputs(torch.float64)) for model in (fused, plain))
    assert_same(got, expected, **EXACT[torch.float64])
    assert not report.fallback_calls


@pytest.mark.parametrize("name", BASES)
def test_autocast(name: str) -> None:
    """A base may undo autocast's cast, as bitsandbytes' do: the result has PEFT's dtype all the same."""
    fused, plain, report = pair(name)
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = run(fused, inputs()), run(plain, inputs())
    assert {key: value.dtype for key, value in got.items()} == {key: value.dtype for key, value in expected.items()}
    assert_same(got, expected, rtol=0.02, atol=0.02)
    assert not report.fallback_calls


@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["hooked", "4 bits", "AWQ, fake"])
def test_half_precision(name: str, adapter: torch.dtype) -> None:
    """Of x; adapters in float32 beside it, or in half precision."""
    fused, plain, report = pair(name)
    for model in (fused, plain):
        if name != "4 bits":
            model.bfloat16()
        layer_of(model).lora_A.to(adapter)
        layer_of(model).lora_B.to(adapter)
    x = inputs(torch.bfloat16)
    got, expected = run(fused, x), run(plain, x)
    assert_same(got, expected, rtol=0.02, atol=0.02)
    assert got["y"].dtype == expected["y"].dtype and not report.fallback_calls


def test_adapters_narrower_than_x() -> None:
    """PEFT rounds x to them."""
    fused, plain, report = pair("4 bits")
    for model in (fused, plain):
        layer_of(model).lora_A.bfloat16()
        layer_of(model).lora_B.bfloat16()
    assert_same(run(fused, inputs()), run(plain, inputs()), rtol=0.02, atol=0.02)
    assert not report.fallback_calls


@pytest.mark.parametrize("name", ["hooked", "4 bits"])
def test_dropout(name: str) -> None:
    """With factors that are one, the update is the dropped input: its mask is the gradient's too, and fresh."""
    p = 0.25
    fused, _, report = pair(name, r=SIZE, lora_alpha=SIZE, lora_dropout=p)
    layer = layer_of(fused.train())
    with torch.no_grad():
        for part in (layer.lora_A["default"], layer.lora_B["default"]):
            part.weight.copy_(torch.eye(SIZE))
    x = inputs().abs() + 1
    masks = []
    for _ in range(2):
        leaf = x.clone().requires_grad_()
        base, y = layer.base_layer(leaf), fused(leaf)
        update = y - base
        kept = update.abs() > 0.5
        torch.testing.assert_close(update, torch.where(kept, leaf / (1 - p), 0.0), rtol=1e-3, atol=1e-4)
        (gradient,) = torch.autograd.grad(update.sum(), leaf)
        torch.testing.assert_close(gradient, kept / (1 - p), rtol=1e-3, atol=1e-3)
        # Five standard errors of a mean of so many draws.
        assert abs(kept.float().mean().item() - (1 - p)) < 5 * (p * (1 - p) / kept.numel()) ** 0.5
        masks.append(kept)
    assert not torch.equal(*masks) and not report.fallback_calls


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", ["other class", "8 bits"])
def test_checkpointing(name: str, use_reentrant: bool) -> None:
    fused, _, report = pair(name, lora_dropout=0.5)
    fused.train()
    results = []
    for call in (fused, lambda x: checkpoint(fused, x, use_reentrant=use_reentrant)):
        torch.manual_seed(4)
        fused.zero_grad()
        leaf = inputs().requires_grad_()
        call(leaf).square().sum().backward()
        results.append([leaf.grad, *(p.grad.clone() for p in fused.parameters() if p.grad is not None)])
    for got, expected in zip(*results, strict=True):
        compare.assert_bitwise_equal("gradient", got, expected)
    assert not report.fallback_calls


def test_compile() -> None:
    """Without a break in the graph; the update is one operator in it."""
    fused, plain, _ = pair("other class")
    torch._dynamo.reset()
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    assert_same(
        run(compiled, inputs()), run(torch.compile(plain, backend="aot_eager"), inputs()), **EXACT[torch.float32]
    )


def test_several_adapters() -> None:
    fused, plain, report = pair("4 bits", lora_dropout=0.5)
    for model in (fused, plain):
        torch.manual_seed(5)
        model.add_adapter("b", peft.LoraConfig(r=3, target_modules=["layer"], init_lora_weights=False))
        model.base_model.set_adapter(["default", "b"])
    assert_same(run(fused.eval(), inputs()), run(plain.eval(), inputs()), **EXACT[torch.float32])
    fused.train()
    results = []
    for seed in (6, 6, 7):
        torch.manual_seed(seed)
        results.append(run(fused, inputs())["y"])
    compare.assert_bitwise_equal("y", results[0], results[1])
    assert not torch.equal(results[0], results[2]) and not report.fallback_calls


@pytest.mark.parametrize("name", ["4 bits", "8 bits", "other class"])
def test_disabled_merged_and_unmerged(name: str) -> None:
    """Merging is PEFT's, and so is a merged layer's call."""
    fused, plain, report = pair(name)
    base = layer_of(plain).base_layer(inputs())
    with fused.disable_adapter():
        compare.assert_bitwise_equal("y", fused(inputs()), base)
    merged = []
    for model in (fused, plain):
        model.merge_adapter()
        merged.append(model(inputs()))
        model.unmerge_adapter()
    torch.testing.assert_close(*merged, rtol=1e-4, atol=1e-4)
    assert set(report.fallback_calls) == {"adapters are disabled", "adapters are merged into the weight"}
    assert_same(run(fused, inputs()), run(plain, inputs()), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["4 bits", "GPTQ, fake", "hooked"])
def test_classes_come_and_go(name: str, tmp_path: Any) -> None:
    """Copies are fused, state dicts are PEFT's, revert leaves PEFT's own class."""
    fused, plain, report = pair(name)
    expected = run(plain, inputs())
    copied = copy.deepcopy(fused)
    assert type(layer_of(copied)) is type(layer_of(fused)) is not type(layer_of(plain))
    assert_same(run(copied, inputs()), expected, **EXACT[torch.float32])
    assert fused.state_dict().keys() == plain.state_dict().keys() and repr(fused) == repr(plain)
    if hasattr(fused, "save_pretrained"):
        fused.save_pretrained(tmp_path)
        loaded = peft.PeftModel.from_pretrained(plain.unload(), tmp_path, is_trainable=True)
        assert_same(run(loaded, inputs()), expected, **EXACT[torch.float32])
    if name == "GPTQ, fake":
        assert type(layer_of(pickle.loads(pickle.dumps(fused)))) is GPTQLoraLinear
    assert not report.fallback_calls
    kept = layer_of(fused).forward
    pk.revert(fused)
    assert type(layer_of(fused)) in (PeftLinear, GPTQLoraLinear, Linear4bit)
    compare.assert_bitwise_equal("y", kept(inputs()).detach(), expected["y"])


# What a base returns that nothing can be added to, and a part of the reason.
OUTPUTS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "no backward pass": (lambda: _NoBackward(_weight()), "without a gradient for an x with one"),
    "no tensor": (lambda: _Pair(_weight()), "returned no plain tensor"),
    "float64": (lambda: _Wide(_weight()), "returned torch.float64 beside torch.float32"),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs_that_peft_goes_on_from(name: str) -> None:
    """The base module is called once, and PEFT's forward has its answer."""
    make, reason = OUTPUTS[name]
    plain = _around(GPTQLoraLinear, make)
    fused = copy.deepcopy(plain)
    report = pk.apply(fused)
    called: list[int] = []
    layer_of(fused).base_layer.register_forward_hook(lambda *_: called.append(1))
    try:
        expected: Any = run(plain, inputs())
    except Exception as error:
        with pytest.raises(type(error)):
            run(fused, inputs())
    else:
        assert_same(run(fused, inputs()), expected, rtol=0.0, atol=0.0)
    assert len(called) == 1
    assert all(reason in text for text in report.fallback_calls) and report.fallback_calls.total() == 1


@pytest.mark.parametrize("records", [False, True])
def test_a_base_s_output_is_left_alone(records: bool) -> None:
    """It may be kept by what made it, or be a buffer that will be read again."""
    fused = _around(AqlmLoraLinear, lambda: _Keeps(_weight()))
    pk.apply(fused, strict=True)
    with torch.set_grad_enabled(records):
        y = fused(inputs())
    kept = layer_of(fused).base_layer.kept
    assert torch.equal(kept, F.linear(inputs(), _weight())) and not torch.equal(y, kept)


def test_what_else_is_left_to_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    biased = _chosen(lambda: _Tanh(SIZE, SIZE), lora_bias=True)
    assert set(pk.apply(biased).fallbacks.values()) == {"an adapter has a bias (lora_bias) beside a _Tanh"}
    fused, plain, report = pair("4 bits")
    forward = Linear4bit.forward
    monkeypatch.setattr(Linear4bit, "forward", lambda self, x: 2 * forward(self, x))
    compare.assert_bitwise_equal("y", fused(inputs()).detach(), plain(inputs()).detach())
    assert set(report.fallback_calls) == {"Linear4bit.forward was replaced"}


def test_hooks_that_come_and_go() -> None:
    """A plain base becomes a given one while something is hooked to it; its hook runs."""
    plain = _chosen(lambda: nn.Linear(SIZE, SIZE))
    fused = copy.deepcopy(plain)
    report = pk.apply(fused, strict=True)
    assert bases.kind(layer_of(fused)) == bases.PLAIN
    handles = [
        layer_of(model).base_layer.register_forward_hook(lambda module, args, output: 3 * output)
        for model in (fused, plain)
    ]
    assert bases.kind(layer_of(fused)) == bases.GIVEN
    assert_same(run(fused, inputs()), run(plain, inputs()), **EXACT[torch.float32])
    for handle in handles:
        handle.remove()
    assert bases.kind(layer_of(fused)) == bases.PLAIN
    assert_same(run(fused, inputs()), run(plain, inputs()), **EXACT[torch.float32])
    assert not report.fallback_calls


class _Two(nn.Module):
    """Two layers on one input."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(SIZE, SIZE) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.q(x) + self.k(x).sin() + self.v(x).cos()


def test_given_layers_are_in_no_group() -> None:
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=["q", "k", "v"], init_lora_weights=False)
    plain = peft.get_peft_model(_Two(), config)
    plain.base_model.model.k.base_layer.register_forward_hook(lambda module, args, output: 2 * output)
    fused = copy.deepcopy(plain)
    report = pk.apply(fused, strict=True, group=True)
    for _ in range(2):
        assert_same(run(fused, inputs()), run(plain, inputs()), **EXACT[torch.float32])
    assert [tuple(name.rpartition(".")[2] for name in group) for group in report.groups] == [("q", "v")]
    assert not report.fallback_calls
