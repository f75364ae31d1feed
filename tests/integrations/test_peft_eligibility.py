"""One layer of PEFT's, changed or called as only PEFT's own code takes it: the result is PEFT's, and it is counted."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

import numpy as np
from torch.nn.modules.module import register_module_forward_hook

import peft_kernels as pk
from peft_kernels.integrations.hooks import OwnMethods
from peft_kernels.integrations.peft import eligibility, layers
from peft_kernels.integrations.peft.layers import FusedLoraLinear, PeftLinear

pytestmark = pytest.mark.filterwarnings(
    "ignore:apply. nothing in", "ignore::FutureWarning", "ignore::DeprecationWarning"
)

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def build(**options: object) -> nn.Module:
    torch.manual_seed(0)
    config = peft.LoraConfig(**{"target_modules": ["0"], "r": 4, "init_lora_weights": False, **options})
    return peft.get_peft_model(nn.Sequential(nn.Linear(8, 8)), config).train()


def layer_of(model: nn.Module) -> Any:
    return model.base_model.model[0]


def inputs() -> Tensor:
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(1))


class _Tripled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 3 * super().forward(x)


class _Sub(Tensor):
    pass


class _Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 4, bias=False)

    @property
    def weight(self) -> Tensor:
        return self.inner.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).tanh()


def _scaled(value: object) -> Callable[[Any], None]:
    return lambda layer: layer.scaling.__setitem__("default", value)


def _part(name: str, make: Callable[[], nn.Module]) -> Callable[[Any], None]:
    return lambda layer: getattr(layer, name).__setitem__("default", make())


def _rebound(path: str) -> Callable[[Any], None]:
    def change(layer: Any) -> None:
        part = layer.get_submodule(path)
        forward = part.forward
        part.forward = lambda *args: 2 * forward(*args)

    return change


def _hooked(path: str) -> Callable[[Any], None]:
    return lambda layer: layer.get_submodule(path).register_forward_hook(lambda module, args, output: 2 * output)


PARTS = ("lora_A.default", "lora_B.default", "lora_dropout.default")
# What runs PEFT's own code, and a part of the reason.
CHANGES: dict[str, tuple[Callable[[Any], object], str]] = {
    **{
        f"scaling: {name}": (_scaled(value), "its scaling is")
        for name, value in {
            "numpy": np.float32(0.5),
            "numpy int": np.int64(2),
            "(1,)": torch.tensor([0.5]),
            "by feature": torch.rand(8),
            "by token": torch.rand(4, 1),
            "int tensor": torch.tensor(2),
            "bool tensor": torch.tensor(True),
            "complex": 1j,
            "trained": nn.Parameter(torch.tensor(0.5)),
        }.items()
    },
    **{
        f"{name}: {what}": (_part(name, make), "lora_A is")
        for name in ("lora_A", "lora_B")
        for what, make in {
            "subclass": lambda name=name: _Tripled(*((8, 4) if name == "lora_A" else (4, 8)), bias=False),
            "parametrized": lambda name=name: nn.utils.parametrizations.weight_norm(
                nn.Linear(*((8, 4) if name == "lora_A" else (4, 8)), bias=False)
            ),
        }.items()
    },
    "lora_A: wrapper": (_part("lora_A", _Wrapped), "lora_A is"),
    "lora_A: bias": (_part("lora_A", lambda: nn.Linear(8, 4)), "lora_A is"),
    "dropout: alpha": (_part("lora_dropout", lambda: nn.AlphaDropout(0.5)), "its dropout is AlphaDropout"),
    "dropout: in place": (_part("lora_dropout", lambda: nn.Dropout(0.5, inplace=True)), "its dropout is Dropout"),
    "pruned": (lambda layer: prune.l1_unstructured(layer.lora_A["default"], "weight", 0.5), "there are hooks"),
    "cast": (lambda layer: setattr(layer, "_cast_input_dtype", lambda x, dtype: 2 * x), "its _cast_input_dtype"),
    **{f"hook on {path}": (_hooked(path), "there are hooks") for path in PARTS},
    **{f"forward of {path}": (_rebound(path), "there are hooks") for path in PARTS},
}
# What apply does not leave to PEFT for good, but its calls as things stand.
STATES: dict[str, tuple[Callable[[Any], object], str]] = {
    "dropout of 1": (_part("lora_dropout", lambda: nn.Dropout(1.0)), "leaves nothing, with p = 1"),
    "scaling elsewhere": (_scaled(torch.tensor(0.5, device="meta")), "several devices"),
    "merged": (lambda layer: PeftLinear.merge(layer), "merged"),  # ours sums in another order
    "disabled": (lambda layer: layer.enable_adapters(False), "disabled"),
    "adapter in float64": (
        lambda layer: (layer.lora_A.double(), layer.lora_B.double()),
        "the adapters are torch.float64",
    ),
}


def _outcome(model: nn.Module, call: Callable[[Any, Tensor], Tensor] = lambda layer, x: layer(x)) -> Any:
    """The result and gradients, or the error."""
    x = inputs().requires_grad_()
    model.zero_grad()
    torch.manual_seed(2)
    try:
        y = call(layer_of(model), x)
        y = y.to_dense() if y.layout is torch.sparse_coo else y
        if y.requires_grad:
            y.abs().sum().backward()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    scaling = layer_of(model).scaling["default"]
    gate = scaling.grad if isinstance(scaling, nn.Parameter) else None
    return y.detach(), x.grad, gate, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _assert_same(got: Any, expected: Any) -> None:
    if isinstance(expected, str):
        assert got == expected
    else:
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", [*CHANGES, *STATES])
def test_changed_layers(name: str) -> None:
    """Before apply and after it."""
    change, reason = (CHANGES | STATES)[name]
    plain, before, after = build(), build(), build()
    report_after = pk.apply(after)
    for model in (plain, before, after):
        torch.manual_seed(3)
        change(layer_of(model))
    with pytest.raises(pk.UnsupportedError, match="strict"):
        pk.apply(before, strict=True)
    assert type(layer_of(before)) is PeftLinear
    report = pk.apply(before)
    assert not report.fused and all(reason in text for text in report.fallbacks.values()), report
    assert isinstance(layer_of(before), FusedLoraLinear) == (name in STATES)
    expected = _outcome(plain)
    for model in (before, after):
        _assert_same(_outcome(model), expected)
    assert all(reason in text for text in report_after.fallback_calls) and report_after.fallback_calls.total() == 1


@pytest.mark.parametrize(
    "value", [2, True, np.float64(0.5), float("nan"), torch.tensor(0.5, dtype=torch.float64)], ids=repr
)
def test_scalings_that_are_fused(value: object) -> None:
    plain, fused = build(), build()
    report = pk.apply(fused, strict=True)
    for model in (plain, fused):
        layer_of(model).scaling["default"] = value
    torch.testing.assert_close(_outcome(fused), _outcome(plain), **CLOSE, equal_nan=True)
    assert not report.fallback_calls


CALLS: dict[str, tuple[Callable[[Any, Tensor], Any], str]] = {
    "vmap": (lambda layer, x: torch.func.vmap(layer)(x), "transformed"),
    "grad": (lambda layer, x: torch.func.grad(lambda x: layer(x).square().sum())(x), "transformed"),
    "jvp": (lambda layer, x: torch.func.jvp(layer, (x,), (x,))[1], "transformed"),
    "jit.trace": (lambda layer, x: torch.jit.trace(layer, x.detach(), check_trace=False)(x), "transformed"),
    "export": (lambda layer, x: torch.export.export(layer, (x.detach(),)).module()(x), "on a CPU"),
    "nested": (
        lambda layer, x: layer(torch.nested.as_nested_tensor([x[:1], x[1:]])).to_padded_tensor(0.0),
        "x is nested",
    ),
    "subclass": (lambda layer, x: layer(x.as_subclass(_Sub)).as_subclass(Tensor), "x is a _Sub"),
    "sparse": (lambda layer, x: layer(x.detach().to_sparse()), "x is torch.sparse_coo"),
    "integer": (lambda layer, x: layer(x.long()), "x is torch.int64"),
    "integer in autocast": (lambda layer, x: _autocast(layer, x.long()), "x is torch.int64"),
    "float64 in autocast": (lambda layer, x: _autocast(layer.double(), x), "the base weight torch.float64"),
    "float64 adapter in autocast": (
        lambda layer, x: (layer.lora_A.double(), layer.lora_B.double(), _autocast(layer, x))[2],
        "the adapters are torch.float64",
    ),
    "meta": (lambda layer, x: torch.zeros(layer.to("meta")(x.to("meta")).shape), "it runs on meta"),
    "no tensor": (lambda layer, x: layer([1.0]), "x is a list"),
    "wrong width": (lambda layer, x: layer(x[:, :5]), "lora_linear: x must be"),
    "0-d": (lambda layer, x: layer(x[0, 0]), "lora_linear: x must be"),
    "too few names": (lambda layer, x: layer(x, adapter_names=["default"]), "adapter_names"),
    "unknown argument": (lambda layer, x: layer(x, other=1), "arguments"),
    "global hook": (lambda layer, x: _under_global_hook(layer, x), "hooks on all modules"),
}


def _autocast(layer: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return layer(x)


def _under_global_hook(layer: Any, x: Tensor) -> Tensor:
    handle = register_module_forward_hook(lambda module, args, output: 2 * output)
    try:
        return layer(x)
    finally:
        handle.remove()


@pytest.mark.parametrize("name", CALLS)
def test_calls(name: str) -> None:
    """PEFT's result, or PEFT's error."""
    call, reason = CALLS[name]
    plain, fused = build(), build()
    report = pk.apply(fused, strict=True)
    _assert_same(_outcome(fused, call), _outcome(plain, call))
    assert report.fallback_calls and all(reason in text for text in report.fallback_calls), report


def test_vmap_inside_a_compiled_function() -> None:
    fused, x = build().eval(), inputs()
    pk.apply(fused)
    got = torch.compile(torch.func.vmap(lambda row: fused(row)), backend="eager", fullgraph=True)(x)
    torch.testing.assert_close(got, fused(x), **CLOSE)


def test_environment_names_no_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """That is no reason to run PEFT's code instead."""
    fused = build()
    report = pk.apply(fused)
    monkeypatch.setenv("PEFT_KERNELS_BACKEND", "trition")
    with pytest.raises(ValueError, match="PEFT_KERNELS_BACKEND must be one of"):
        fused(inputs())
    assert not report.fallback_calls


@pytest.mark.parametrize(
    "method",
    [(PeftLinear, "forward"), (PeftLinear, "_cast_input_dtype"), (nn.Linear, "forward"), (nn.functional, "linear")],
    ids=lambda method: f"{method[0].__name__}.{method[1]}",
)
def test_patched_classes(method: tuple[Any, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """While a tool's method stands in the place of PEFT's or torch's, it runs; functools.wraps hides it from nobody."""
    holder, name = method
    original = getattr(holder, name)
    after = build()
    report_after = pk.apply(after)

    @functools.wraps(original)
    def patched(*args: Any, **kwargs: Any) -> Any:
        return 2 * original(*args, **kwargs)

    monkeypatch.setattr(holder, name, patched)
    plain, before = build(), build()
    report = pk.apply(before)
    assert not report.fused and f"{holder.__name__}.{name} was replaced" in report.fallbacks.popitem()[1]
    for model in (before, after):
        _assert_same(_outcome(model), _outcome(plain))
    assert report_after.fallback_calls.total() == 1
    monkeypatch.undo()
    assert pk.apply(before, strict=True).fused


def test_methods_that_were_patched_before_the_import() -> None:
    """They are known by the file that they are from."""
    own = OwnMethods((PeftLinear, "forward"), (nn.Linear, "forward"))
    assert own.replaced() is None and eligibility.OWN.replaced() is None
    forward = functools.wraps(nn.Linear.forward)(lambda self, x: x)
    patched = type("Linear", (nn.Linear,), {"forward": forward, "__module__": nn.Linear.__module__})
    assert OwnMethods((patched, "forward")).replaced() == "Linear.forward"


class _Tool:
    """As diffusers' hooks: it keeps a module's bound forward and puts a function of its own there."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.kept, self.calls = module, module.forward, 0
        module.forward = functools.partial(self._forward, module)

    def _forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return self.kept(*args, **kwargs)

    def put_back(self) -> None:
        self.module.forward = self.kept


@pytest.fixture
def fused_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """An entry for each call that was fused."""
    made, fused = [], layers._fused
    monkeypatch.setattr(layers, "_fused", lambda *args: (made.append(1), fused(*args))[1])
    return made


@pytest.mark.parametrize("put_back", [False, True])
def test_tool_before_apply(put_back: bool, fused_calls: list[int]) -> None:
    model = build()
    expected = _outcome(model)
    tools = [_Tool(module) for module in model.modules()]
    if put_back:
        for tool in tools:
            tool.put_back()
    report = pk.apply(model)
    assert bool(report.fused) == put_back
    if not put_back:
        assert set(report.fallbacks.values()) == {"its forward was replaced"}
    torch.testing.assert_close(_outcome(model), expected, **CLOSE)
    assert len(fused_calls) == put_back and not report.fallback_calls


@pytest.mark.parametrize("put_back", [False, True])
def test_tool_between_apply_and_revert(put_back: bool, fused_calls: list[int]) -> None:
    """What it kept is called after revert, and is PEFT's code."""
    model = build()
    expected = _outcome(model)
    pk.apply(model)
    tool = _Tool(layer_of(model))
    torch.testing.assert_close(_outcome(model), expected, **CLOSE)
    if put_back:
        tool.put_back()
    pk.revert(model)
    _assert_same(_outcome(model), expected)
    assert len(fused_calls) == 1
    with model.disable_adapter():
        model(inputs())
    assert tool.calls == (1 if put_back else 3)


@pytest.fixture
def xlora(tmp_path: Any) -> Iterator[nn.Module]:
    from tests.integrations import models

    models.build(target_modules=["q_proj"], task_type="CAUSAL_LM").save_pretrained(tmp_path)
    base = models.ARCHITECTURES["llama"][0]()
    base.config.use_cache = False
    config = peft.XLoraConfig(
        task_type="CAUSAL_LM", hidden_size=models.HIDDEN, adapters={"0": str(tmp_path), "1": str(tmp_path)}
    )
    yield peft.get_peft_model(base, config).eval()


def test_xlora(xlora: nn.Module) -> None:
    with pytest.raises(pk.UnsupportedError, match="its forward was replaced"):
        pk.apply(xlora, strict=True)
    assert not pk.apply(xlora).fused


@pytest.mark.parametrize(
    "config",
    [peft.LoKrConfig(target_modules=["0"]), peft.LoHaConfig(target_modules=["0"])],
    ids=lambda c: c.peft_type.value,
)
def test_other_methods_are_reported(config: Any) -> None:
    model = peft.get_peft_model(nn.Sequential(nn.Linear(8, 8)), config)
    (reason,) = pk.apply(model).fallbacks.values()
    assert reason.endswith("not its lora.Linear")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("autocast", [False, True])
def test_active_adapters_that_overlap(dtype: torch.dtype, autocast: bool) -> None:
    """One adapter named twice counts twice; adapters of two dtypes run PEFT's code."""
    plain = build()
    plain.add_adapter("b", peft.LoraConfig(target_modules=["0"], r=2, init_lora_weights=False))
    layer_of(plain).set_adapter(["default", "b", "default"])
    fused = copy.deepcopy(plain)
    report = pk.apply(fused, strict=True)
    call = _autocast if autocast else (lambda layer, x: layer(x))
    if not autocast:
        torch.testing.assert_close(_outcome(fused, call), _outcome(plain, call), **CLOSE)
        assert not report.fallback_calls
    for model in (plain, fused):
        model.zero_grad()
        layer_of(model).lora_A["b"].to(dtype)
        layer_of(model).lora_B["b"].to(dtype)
    _assert_same(_outcome(fused, call), _outcome(plain, call))
    assert set(report.fallback_calls) == {"its adapters have several dtypes"}
