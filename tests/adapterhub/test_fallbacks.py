"""Where AdapterHub's forward does something else, it is AdapterHub's forward that runs, and it is counted."""

from __future__ import annotations

import pytest

pytest.importorskip("adapters", reason="AdapterHub needs an older transformers; `make test-adapterhub` runs these")

import copy
import re
from collections.abc import Callable

import adapters
import torch
from adapters.composition import Stack
from torch import Tensor, nn
from torch.nn.utils import prune
from transformers.activations import ACT2CLS

import peft_kernels as pk
from peft_kernels.integrations.adapterhub.activations import ACTIVATIONS
from tests.adapterhub.models import HIDDEN, KINDS, build, run, tokens
from tests.adapterhub.parity import adapters_of, assert_bitwise, assert_same, pair


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"use_gating": True}, "it has a gate"),
        ({"ln_before": True}, "it has a layer norm of its own"),
        ({"ln_after": True}, "it has a layer norm of its own"),
        ({"ln_after": True, "adapter_residual_before_ln": True}, "it has a layer norm of its own"),
        ({"scaling": "learned"}, "its scaling is a Parameter, not a number"),
        ({"scaling": "channel"}, "its scaling is a Parameter, not a number"),
        (
            {"phm_layer": True, "reduction_factor": 4, "init_weights": "bert"},
            "it is made of PHMLayer, Activation_Function_Class, PHMLayer, Dropout",
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", KINDS)
def test_configs(kind: str, options: dict[str, object], reason: str) -> None:
    plain = build("bert", kind, **options)
    fused = copy.deepcopy(plain)
    with pytest.warns(UserWarning, match="nothing in BertForMaskedLM"):
        report = pk.apply(fused)
    assert not report.fused and set(report.fallbacks.values()) == {reason}
    assert {type(module) for module in adapters_of(fused)} == {type(module) for module in adapters_of(plain)}
    assert_same(fused, plain, assert_bitwise)


@pytest.mark.parametrize("name", sorted(set(ACT2CLS) - set(ACTIVATIONS)))
def test_activations(name: str) -> None:
    plain = build(non_linearity=name)
    fused = copy.deepcopy(plain)
    with pytest.warns(UserWarning, match="nothing in BertForMaskedLM"):
        report = pk.apply(fused)
    assert all("its activation is " in reason for reason in report.fallbacks.values())
    assert_same(fused, plain, assert_bitwise)


def _scaled(adapter: nn.Module) -> None:
    adapter.scaling = torch.linspace(0, 1, HIDDEN)


def _leaky(adapter: nn.Module) -> None:
    adapter.adapter_down[1].f = nn.LeakyReLU(0.3)


def _parametrized(adapter: nn.Module) -> None:
    nn.utils.parametrizations.weight_norm(adapter.adapter_up)


def _pruned(adapter: nn.Module) -> None:
    torch.manual_seed(0)
    prune.random_unstructured(adapter.adapter_up, "weight", 0.5)


def _alpha_dropout(adapter: nn.Module) -> None:
    adapter.dropout = nn.AlphaDropout(0.5).eval()


class _Doubling(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def _doubling_down(adapter: nn.Module) -> None:
    adapter.adapter_down = _Doubling(*adapter.adapter_down)


def _stochastic_depth(adapter: nn.Module) -> None:
    # Instead of torchvision's, which would be one more package for one class.
    adapter.DropPath = nn.Hardtanh(-0.1, 0.1)


class _Negative(Tensor):
    """A weight that products see with another sign, as a quantized one is seen with other values."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.nn.functional.linear:
            args = (args[0], -args[1].as_subclass(Tensor), *args[2:])
        return super().__torch_function__(function, types, args, kwargs or {})


def _other_weight(adapter: nn.Module) -> None:
    adapter.adapter_up.weight = nn.Parameter(adapter.adapter_up.weight.detach().as_subclass(_Negative))


def _no_bias(adapter: nn.Module) -> None:
    adapter.adapter_up.bias = None


def _subclass(adapter: nn.Module) -> None:
    class Doubled(type(adapter)):
        def forward(self, *args: object, **kwargs: object) -> tuple[Tensor, ...]:
            output, *others = super().forward(*args, **kwargs)
            return 2 * output, *others

    adapter.__class__ = Doubled


PARTS = ("adapter_down", "adapter_down.0", "adapter_down.1", "adapter_down.1.f", "adapter_up", "dropout")


def _hook(path: str) -> Callable[[nn.Module], None]:
    """On the adapter one that only looks, on its parts one that changes their output."""

    def change(adapter: nn.Module) -> None:
        adapter.get_submodule(path).register_forward_hook(lambda module, args, output: output * 0.5 if path else None)

    return change


def _pre_hook(adapter: nn.Module) -> None:
    adapter.adapter_down[0].register_forward_pre_hook(lambda module, args: (args[0] * 0.5,))


def _backward_hook(adapter: nn.Module) -> None:
    adapter.adapter_up.register_full_backward_hook(lambda module, grads, outputs: (grads[0] * 0.5,))


def _rebound(adapter: nn.Module) -> None:
    forward = adapter.forward
    adapter.forward = lambda *args, **kwargs: forward(*args, **kwargs)


_HOOKED = "there are hooks on it or on its parts"
CHANGES = {
    "scaling by feature": (_scaled, "its scaling is a Tensor, not a number"),
    "leaky": (_leaky, "its activation is LeakyReLU, which has no equivalent"),
    "parametrized": (_parametrized, "it is made of Linear, Activation_Function_Class, ParametrizedLinear, Dropout"),
    "alpha dropout": (_alpha_dropout, "it is made of Linear, Activation_Function_Class, Linear, AlphaDropout"),
    "doubling down": (_doubling_down, "it is made of _Doubling, Linear, Dropout"),
    "stochastic depth": (_stochastic_depth, "it has stochastic depth"),
    "other weight": (_other_weight, "a parameter of it is a _Negative, not a plain tensor"),
    "no bias": (_no_bias, "a parameter of it is a NoneType, not a plain tensor"),
    "subclass": (_subclass, "it is a Doubled, not AdapterHub's Adapter or ParallelAdapter"),
    "pruned": (_pruned, _HOOKED),
    "hook before": (_pre_hook, _HOOKED),
    "hook on backward": (_backward_hook, _HOOKED),
    "forward rebound": (_rebound, _HOOKED),
    "hook on it": (_hook(""), _HOOKED),
    **{f"hook on {part}": (_hook(part), _HOOKED) for part in PARTS},
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("kind", ["double", "parallel"])
def test_changed_adapters(kind: str, name: str) -> None:
    """What is done to an adapter by hand, before apply and after it."""
    change, reason = CHANGES[name]
    plain, before, after = (build("bert", kind) for _ in range(3))
    pk.apply(after)
    for model in (plain, before, after):
        for adapter in adapters_of(model):
            change(adapter)
    with pytest.warns(UserWarning, match="nothing in BertForMaskedLM"):
        assert set(pk.apply(before).fallbacks.values()) == {reason}
    assert_same(before, plain, assert_bitwise)
    assert_same(after, plain, assert_bitwise)


def test_reason_is_counted_for_what_came_after_apply() -> None:
    fused, _, report = pair("bert", "double")
    _pre_hook(adapters_of(fused)[0])
    run(fused)
    assert dict(report.fallback_calls) == {"there are hooks on it or on its parts": 1}


@pytest.mark.parametrize("kind", ["double", "parallel"])
def test_dropout_in_training(kind: str) -> None:
    fused, plain, report = pair("bert", kind, dropout=0.5)
    results = []
    for model in (fused, plain):
        model.train()
        torch.manual_seed(3)
        results.append(run(model))
    assert_bitwise("logits", results[0][0], results[1][0])
    for name, gradient in results[0][1].items():
        assert_bitwise(name, gradient, results[1][1][name])
    assert set(report.fallback_calls) == {"its dropout is active"}


@pytest.mark.parametrize("kind", ["seq", "parallel"])
def test_gating_scores(kind: str) -> None:
    fused, plain, report = pair("bert", kind)
    got, expected = (
        model(tokens(), output_adapter_gating_scores=True).adapter_gating_scores["a"] for model in (fused, plain)
    )
    for layer in expected:
        scores = (torch.from_numpy(scores[layer]["output_adapter"]) for scores in (got, expected))
        assert_bitwise("scores", *scores)
    assert set(report.fallback_calls) == {"the call asks for gating scores"}


@pytest.mark.parametrize("kind", ["double", "parallel"])
@pytest.mark.parametrize("part", ["", "adapter_down", "adapter_down.1", "adapter_down.1.f", "adapter_up"])
def test_patched_classes(part: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a tool's forward stands in the place of AdapterHub's, transformers' or torch's, it runs."""
    plain, after, before = (build("bert", kind) for _ in range(3))
    report_after = pk.apply(after)
    cls = type(adapters_of(plain)[0].get_submodule(part))
    original = cls.forward

    def patched(*args: object, **kwargs: object) -> object:
        result = original(*args, **kwargs)
        return (result[0] / 2, *result[1:]) if isinstance(result, tuple) else result / 2

    monkeypatch.setattr(cls, "forward", patched)
    with pytest.warns(UserWarning, match="nothing in BertForMaskedLM"):
        assert set(pk.apply(before).fallbacks.values()) == {f"{cls.__name__}.forward was replaced"}
    assert_same(before, plain, assert_bitwise)
    assert_same(after, plain, assert_bitwise)
    assert set(report_after.fallback_calls) == {f"{cls.__name__}.forward was replaced"}


@pytest.mark.parametrize("kind", ["double", "parallel"])
def test_what_a_tool_kept_works_after_revert(kind: str) -> None:
    model, plain, _ = pair("bert", kind)
    for adapter in adapters_of(model):
        kept = adapter.forward
        adapter.forward = lambda *args, kept=kept, **kwargs: kept(*args, **kwargs)
    pk.revert(model)
    assert_same(model, plain, assert_bitwise)


@pytest.mark.parametrize("kind", ["double", "parallel"])
def test_transforms(kind: str) -> None:
    fused, plain, report = pair("bert", kind)
    x = torch.randn(2, 3, HIDDEN)
    parts = (adapters_of(model)[0] for model in (fused, plain))
    got, expected = (torch.func.jvp(lambda x, part=part: part(x, x)[0], (x,), (x,)) for part in parts)
    assert_bitwise("output", got[0], expected[0])
    assert_bitwise("tangent", got[1], expected[1])
    assert set(report.fallback_calls) == {"the call is transformed, traced or exported"}


CALLS = {
    "residual of less": (lambda x: (x, x.bfloat16()), "x is torch.float32, the residual torch.bfloat16"),
    "residual of more": (lambda x: (x, x.double()), "x is torch.float32, the residual torch.float64"),
    "residual of another shape": (lambda x: (x, x[:1]), r"the residual \(1, 3, 32\), the adapter 32 wide"),
    "no residual": (lambda x: (x, None), "the residual is a NoneType"),
    "x of more": (lambda x: (x.double(), x), "x is torch.float64, its parameters are torch.float32"),
    "x of another width": (lambda x: (x[..., :5], x[..., :5]), r"x is \(2, 3, 5\)"),
    "x elsewhere": (lambda x: (x.to("meta"), x.to("meta")), "it runs on meta"),
    "residual elsewhere": (lambda x: (x, x.to("meta")), "its tensors are on several devices"),
}


@pytest.mark.parametrize("call", CALLS)
def test_calls(call: str) -> None:
    """AdapterHub's result, or AdapterHub's error."""
    fused, plain, report = pair("bert", "double")
    arguments, reason = CALLS[call]
    results = []
    for model in (fused, plain):
        torch.manual_seed(0)
        try:
            results.append(adapters_of(model)[0](*arguments(torch.randn(2, 3, HIDDEN))))
        except (RuntimeError, TypeError) as error:
            results.append(error)
    (counted,) = report.fallback_calls
    assert re.search(reason, counted), counted
    if isinstance(results[1], Exception):
        assert (type(results[0]), str(results[0])) == (type(results[1]), str(results[1]))
    else:
        for got, expected in zip(*results, strict=True):
            assert_bitwise("output", got, expected)


def test_device_without_autocast() -> None:
    fused, _, report = pair("bert", "double")
    adapter = adapters_of(fused)[0].to("meta")
    x = torch.empty(2, 3, HIDDEN, device="meta")
    assert adapter(x, x)[0].shape == x.shape
    assert set(report.fallback_calls) == {"it runs on meta"}


def test_autocast_stays_out_of_float64() -> None:
    fused, plain, report = pair("bert", "double")
    x = torch.randn(2, 3, HIDDEN)
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = (adapters_of(model)[0](x, x.double())[0] for model in (fused, plain))
    assert_bitwise("output", got, expected)
    assert report.fallback_calls


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (adapters.LoRAConfig(), "it is AdapterHub's LoRALinearTorch, not a bottleneck"),
        (adapters.PrefixTuningConfig(), "it is AdapterHub's PrefixTuningLayer, not a bottleneck"),
        (adapters.PromptTuningConfig(), "it is AdapterHub's PromptTuningLayer, not a bottleneck"),
        (adapters.LoReftConfig(), "it is AdapterHub's ReftLayer, not a bottleneck"),
        (adapters.SeqBnInvConfig(), "it is AdapterHub's NICECouplingBlock, not a bottleneck"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_other_methods_are_reported(config: object, reason: str) -> None:
    fused, plain, _ = pair()
    for model in (fused, plain):
        torch.manual_seed(1)
        model.add_adapter("other", config=config)
        model.set_active_adapters(Stack("other", "a"))
    report = pk.apply(fused)
    assert set(report.fallbacks.values()) == {reason}
    assert_same(fused, plain)
