"""One applied layer through every state that its calls depend on: what was decided for one call binds no other."""

from __future__ import annotations

import contextlib
import copy
import gc
import pickle
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import prune

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

import peft_kernels as pk
from peft_kernels.integrations.peft import given, layers
from peft_kernels.integrations.peft.layers import PeftLinear

State = Callable[[Any], contextlib.AbstractContextManager[object]]


def build() -> Any:
    torch.manual_seed(0)
    config = {"target_modules": ["0"], "r": 4, "init_lora_weights": False}
    model = peft.get_peft_model(nn.Sequential(nn.Linear(8, 8)), peft.LoraConfig(**config, lora_dropout=0.5))
    model.add_adapter("other", peft.LoraConfig(**config, lora_bias=True))
    model.add_adapter("dora", peft.LoraConfig(**config, use_dora=True))
    return model.base_model.model[0].eval()


def _attribute(path: str, name: str, value: Callable[[Any], Any]) -> State:
    """Set an attribute of a part of the layer for a while."""

    @contextlib.contextmanager
    def state(layer: Any) -> Iterator[None]:
        part = layer.get_submodule(path)
        there, old = name in vars(part) or hasattr(part, name), getattr(part, name, None)
        was_own = name in vars(part)
        setattr(part, name, value(part))
        yield
        if there and (was_own or name in part._modules or name in part._parameters or name == "data"):
            setattr(part, name, old)
        else:
            delattr(part, name)

    return state


def _data(path: str, change: Callable[[Tensor], Tensor]) -> State:
    """Swap the memory under a parameter that stays the same object."""

    @contextlib.contextmanager
    def state(layer: Any) -> Iterator[None]:
        parameter = layer.get_parameter(path)
        old = parameter.data
        parameter.data = change(old)
        yield
        parameter.data = old

    return state


def _entry(holder: str, value: Callable[[Any], Any]) -> State:
    """Set an adapter's entry of one of the layer's dicts for a while."""

    @contextlib.contextmanager
    def state(layer: Any) -> Iterator[None]:
        entries = getattr(layer, holder)
        old = entries["default"]
        entries["default"] = value(old)
        yield
        entries["default"] = old

    return state


def _hook(path: str, register: str) -> State:
    @contextlib.contextmanager
    def state(layer: Any) -> Iterator[None]:
        hooks = {
            "register_forward_hook": lambda module, args, output: 2 * output,
            "register_forward_pre_hook": lambda module, args: (2 * args[0],),
            "register_full_backward_hook": lambda module, given, taken: tuple(2 * each for each in given),
            "register_full_backward_pre_hook": lambda module, taken: tuple(2 * each for each in taken),
        }
        handle = getattr(layer.get_submodule(path), register)(hooks[register])
        yield
        handle.remove()

    return state


def _patched(holder: Any, name: str, change: Callable[[Any], Any]) -> State:
    @contextlib.contextmanager
    def state(layer: Any) -> Iterator[None]:
        original = getattr(holder, name)
        setattr(holder, name, change(original))
        try:
            yield
        finally:
            setattr(holder, name, original)

    return state


@contextlib.contextmanager
def _active(layer: Any, names: list[str]) -> Iterator[None]:
    layer.set_adapter(names)
    yield
    layer.set_adapter(["default"])


@contextlib.contextmanager
def _merged(layer: Any) -> Iterator[None]:
    weight = layer.base_layer.weight.detach().clone()
    layer.merge(adapter_names=["default"])
    yield
    layer.unmerge()
    # PEFT's own layer is left with the roundings of both.
    layer.base_layer.weight.data.copy_(weight)


@contextlib.contextmanager
def _disabled(layer: Any) -> Iterator[None]:
    layer.enable_adapters(False)
    yield
    layer.enable_adapters(True)


@contextlib.contextmanager
def _training(layer: Any) -> Iterator[None]:
    layer.train()
    yield
    layer.eval()


@contextlib.contextmanager
def _global_hook(layer: Any) -> Iterator[None]:
    handle = register_module_forward_hook(lambda module, args, output: 2 * output)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def _double(layer: Any) -> Iterator[None]:
    layer.double()
    yield
    layer.float()


@contextlib.contextmanager
def _pruned(layer: Any) -> Iterator[None]:
    down = layer.lora_A["default"]
    old = down.weight.detach().clone()
    prune.random_unstructured(down, "weight", 0.5)
    down.weight_mask.copy_(torch.arange(32).view(4, 8) % 2)
    yield
    prune.remove(down, "weight")
    down.weight.data.copy_(old)


@contextlib.contextmanager
def _parametrized(layer: Any) -> Iterator[None]:
    base = layer.base_layer
    nn.utils.parametrize.register_parametrization(base, "weight", _Doubled())
    yield
    nn.utils.parametrize.remove_parametrizations(base, "weight", leave_parametrized=False)


class _Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


class _Tripled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 3 * super().forward(x)


class _Sub(Tensor):
    pass


def _linear(n: int, k: int, kind: type[nn.Linear] = nn.Linear, bias: bool = False) -> nn.Linear:
    torch.manual_seed(1)
    return kind(k, n, bias=bias)


# What another decision follows from than from the layer as it is: PEFT's own code, or another form of the operation.
STATES: dict[str, State] = {
    "disabled": _disabled,
    "merged": _merged,
    "other adapter, with a bias": lambda layer: _active(layer, ["other"]),
    "two adapters": lambda layer: _active(layer, ["default", "other"]),
    "no adapter": lambda layer: _active(layer, []),
    "DoRA": lambda layer: _active(layer, ["dora"]),
    "training": _training,
    "training without dropout": lambda layer: _both(
        _training(layer), _attribute("lora_dropout.default", "p", lambda _: 0.0)(layer)
    ),
    "p of 1": lambda layer: _both(_training(layer), _attribute("lora_dropout.default", "p", lambda _: 1.0)(layer)),
    "alpha dropout": lambda layer: _both(
        _entry("lora_dropout", lambda _: nn.AlphaDropout(0.5))(layer), _training(layer)
    ),
    "identity": _entry("lora_dropout", lambda _: nn.Identity()),
    "scaling": _entry("scaling", lambda old: 3.0 * old),
    "whole scaling": _entry("scaling", lambda _: 3),
    "scaling in a tensor": _entry("scaling", lambda _: torch.tensor(0.5)),
    "trained scaling": _entry("scaling", lambda _: nn.Parameter(torch.tensor(0.5))),
    "scaling by feature": _entry("scaling", lambda _: torch.arange(8.0)),
    "another factor": _entry("lora_A", lambda _: _linear(4, 8)),
    "factor with a bias": _entry("lora_A", lambda _: _linear(4, 8, bias=True)),
    "up with a bias": _entry("lora_B", lambda _: _linear(8, 4, bias=True)),
    "factor of a class of its own": _entry("lora_A", lambda _: _linear(4, 8, _Tripled)),
    "another base": _attribute("", "base_layer", lambda _: _linear(8, 8, bias=True)),
    "base without a bias": _attribute("", "base_layer", lambda _: _linear(8, 8)),
    "base of a class of its own": _attribute("", "base_layer", lambda _: _linear(8, 8, _Tripled)),
    "base in float64": _data("base_layer.weight", Tensor.double),
    "adapter in bfloat16": lambda layer: _both(
        _data("lora_A.default.weight", Tensor.bfloat16)(layer), _data("lora_B.default.weight", Tensor.bfloat16)(layer)
    ),
    "all in float64": _double,
    "up in float64": _data("lora_B.default.weight", Tensor.double),
    "bias in float64": _data("base_layer.bias", Tensor.double),
    "up elsewhere": _attribute("lora_B.default", "weight", lambda part: nn.Parameter(part.weight.to("meta"))),
    "base elsewhere": _attribute("base_layer", "weight", lambda part: nn.Parameter(part.weight.to("meta"))),
    "weight of a class of its own": _attribute(
        "base_layer", "weight", lambda part: nn.Parameter(part.weight.detach().as_subclass(_Sub))
    ),
    "other numbers": _data("base_layer.weight", lambda x: 2 * x),
    "other strides": _data("base_layer.weight", lambda x: x.t().contiguous().t()),
    "smaller rank under one of the factors": _data("lora_A.default.weight", lambda x: x[:2]),
    "smaller rank": lambda layer: _both(
        _data("lora_A.default.weight", lambda x: x[:2])(layer),
        _data("lora_B.default.weight", lambda x: x[:, :2])(layer),
    ),
    "bias of one": _data("base_layer.bias", lambda x: x[:1]),
    "pruned": _pruned,
    "parametrized": _parametrized,
    "global hook": _global_hook,
    "cast": _attribute("", "_cast_input_dtype", lambda _: lambda x, dtype: 2 * x),
    "casts no input": _attribute("", "cast_input_dtype_enabled", lambda _: False),
    "F.linear": _patched(F, "linear", lambda old: lambda *args: 2 * old(*args)),
    "nn.Linear.forward": _patched(nn.Linear, "forward", lambda old: lambda self, x: 2 * old(self, x)),
    "nn.Dropout.forward": _patched(nn.Dropout, "forward", lambda old: lambda self, x: 2 * x),
    "forward of PEFT's": _patched(PeftLinear, "forward", lambda old: lambda self, x: 2 * old(self, x)),
    "autocast": lambda layer: torch.autocast("cpu", torch.bfloat16),
    "no gradients": lambda layer: torch.no_grad(),
    "inference": lambda layer: torch.inference_mode(),
    "mode of functions": lambda layer: torch.device("cpu"),
    **{
        f"{register} on {path}": _hook(path, register)
        for path in ("base_layer", "lora_A.default", "lora_B.default", "lora_dropout.default")
        for register in (
            "register_forward_hook",
            "register_forward_pre_hook",
            "register_full_backward_hook",
            "register_full_backward_pre_hook",
        )
    },
    **{
        f"forward of {path}": _attribute(path, "forward", lambda part: lambda x: 2 * type(part).forward(part, x))
        for path in ("base_layer", "lora_A.default", "lora_B.default", "lora_dropout.default")
    },
}


@contextlib.contextmanager
def _both(first: Any, second: Any) -> Iterator[None]:
    with first, second:
        yield


def _outcome(layer: Any, x: Tensor) -> Any:
    """The result and all gradients, or the kind of error."""
    x = x.detach().clone().requires_grad_(not torch.is_inference_mode_enabled())
    layer.zero_grad()
    torch.manual_seed(2)
    try:
        y = layer(x)
        if y.requires_grad:
            y.abs().sum().backward()
    except Exception as error:
        return type(error)
    gradients = {name: parameter.grad for name, parameter in layer.named_parameters() if parameter.grad is not None}
    return y.detach(), x.grad, copy.deepcopy(gradients)


def _assert_same(got: Any, expected: Any, exactly: bool) -> None:
    if isinstance(expected, type):
        assert got is expected
    else:
        tolerance = {"rtol": 0.0, "atol": 0.0} if exactly else {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(got, expected, **tolerance)


@pytest.fixture
def fused_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """An entry for each call that an operation took: the layer's, or the update of what a given base returned."""
    made, fused, updated = [], layers._fused, given._updated
    monkeypatch.setattr(layers, "_fused", lambda *args: (fused(*args), made.append(1))[0])
    monkeypatch.setattr(given, "_updated", lambda *args: (updated(*args), made.append(1))[0])
    return made


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_one_layer_through_all_states(fused_calls: list[int]) -> None:
    """Before each state and after it, calls are fused; in it they are what PEFT's layer in that state gives."""
    plain, fused = build(), build()
    model = nn.Sequential(fused)
    report = pk.apply(model)
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    usual = _outcome(plain, x)
    for name, state in STATES.items():
        for _ in range(2):
            count = len(fused_calls)
            _assert_same(_outcome(fused, x), usual, exactly=False)
            assert len(fused_calls) == count + 1 and layers._known(fused, x) is not None, f"before {name}"
        with state(plain):
            expected = _outcome(plain, x)
        count, before = len(fused_calls), report.fallback_calls.total()
        drops = name == "training"  # PEFT's mask is another one
        with state(fused):
            for _ in range(2):
                got = _outcome(fused, x)
                try:
                    ran = len(fused_calls) - count
                    if not drops and name != "autocast":
                        # A merged weight is summed in another order than PEFT's.
                        _assert_same(got, expected, exactly=ran == 0 and name != "merged")
                except AssertionError as error:
                    raise AssertionError(f"in the state {name!r}: {error}") from error
        _assert_same(_outcome(plain, x), usual, exactly=False)  # else the test itself leaves something behind
        assert len(fused_calls) - count + report.fallback_calls.total() - before == 2 or name.startswith(
            "forward of PEFT"
        )
    _assert_same(_outcome(fused, x), usual, exactly=False)
    assert not plain.merged and not fused.merged


def test_float32_adapters_are_known_while_inputs_are_cast(fused_calls: list[int]) -> None:
    """On a half-precision base PEFT casts x to them, unless it is told not to, and then raises."""
    fused = build()
    fused.base_layer.bfloat16()
    report = pk.apply(nn.Sequential(fused))
    x = torch.ones(2, 8, dtype=torch.bfloat16)
    for _ in range(2):
        y = fused(x)
        assert layers._known(fused, x) is not None
        fused.cast_input_dtype_enabled = False
        assert layers._known(fused, x) is None
        with pytest.raises(RuntimeError, match="dtype"):
            fused(x)
        del fused.cast_input_dtype_enabled
        assert torch.equal(fused(x), y)
    assert len(fused_calls) == 4 and report.fallback_calls.total() == 2


def test_what_is_known_leaves_no_trace() -> None:
    """Nothing of it is on the layer, in its files or copies, or keeps the layer alive."""
    plain, fused = build(), build()
    x = torch.ones(1, 8)
    pk.apply(nn.Sequential(fused))
    before = set(vars(fused))
    for _ in range(3):
        fused(x)
    assert layers._known(fused, x) is not None
    assert set(vars(fused)) == before == set(vars(plain)) and repr(fused) == repr(plain)
    assert fused.state_dict().keys() == plain.state_dict().keys()
    assert type(pickle.loads(pickle.dumps(fused))) is PeftLinear
    torch.testing.assert_close(copy.deepcopy(fused)(x), plain(x))
    pk.revert(nn.Sequential(fused))
    assert type(fused) is PeftLinear and torch.equal(fused(x), plain(x))
    weight, layer = weakref.ref(fused.base_layer.weight), weakref.ref(fused)
    del fused
    gc.collect()
    assert layer() is None and weight() is None
