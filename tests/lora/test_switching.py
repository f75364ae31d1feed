"""Adapters of a whole model: added, switched, scaled, disabled and taken alone, in all layers or in none."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import peft_kernels as pk
from peft_kernels import FusedLoRALinear
from python_ref import compare


def _model() -> nn.Sequential:
    """Two layers with "first" and "second"; the third has "first" alone."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(4, 3))
    pk.inject_lora(model, "*", r=2, adapter_name="first")
    pk.add_adapter(model[:2], "second", r=3, lora_alpha=6)
    for parameter in pk.lora_parameters(model):
        nn.init.normal_(parameter)
    return model


def _state(model: nn.Module) -> list[object]:
    layers = [part for part in model.modules() if isinstance(part, FusedLoRALinear)]
    return [(layer.active_adapter, layer.enabled, layer.merged, dict(layer.scaling)) for layer in layers]


def test_switching() -> None:
    model, x = _model(), torch.randn(7, 6)
    before = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    outputs = {}
    for name in ("second", None, "first"):
        pk.set_adapter(model, name)
        assert [layer.active_adapter for layer in model] == [name, name, "first" if name == "first" else None]
        outputs[name] = model(x).detach()
    by_hand = x
    for layer, name in zip(model, ("second", "second", None), strict=True):
        weight = layer.weight if name is None else layer.weight + layer.get_delta_weight(name)
        by_hand = nn.functional.linear(by_hand, weight, layer.bias)
    torch.testing.assert_close(outputs["second"], by_hand, rtol=1e-5, atol=1e-5)
    assert not torch.equal(outputs["first"], outputs["second"])
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == before


def test_a_layer_alone_is_a_model() -> None:
    layer = _model()[0]
    pk.set_adapter(layer, "second")
    assert layer.active_adapter == "second"
    assert list(pk.lora_state_dict(layer, "second")) == ["lora_A.second", "lora_B.second"]


def test_deleting_and_scaling_where_the_adapter_is() -> None:
    model = _model()
    pk.set_scale(model, "second", 0.5)
    assert [layer.scaling.get("second") for layer in model] == [1.0, 1.0, None]
    assert [layer.scaling["first"] for layer in model] == [8.0] * 3
    pk.delete_adapter(model, "second")
    assert [list(layer.scaling) for layer in model] == [["first"]] * 3


def test_disabling() -> None:
    model, x = _model(), torch.randn(7, 6)
    fine = model(x)
    base = nn.Sequential(*(nn.Linear(layer.in_features, layer.out_features) for layer in model))
    for linear, layer in zip(base, model, strict=True):
        linear.weight, linear.bias = layer.weight, layer.bias
    model[1].disable_adapters()
    with pk.disable_adapters(model):
        compare.assert_bitwise_equal("y", model(x), base(x))
    assert [layer.enabled for layer in model] == [True, False, True], "what was disabled before stays so"
    pk.disable_adapters(model)
    assert not any(layer.enabled for layer in model)
    pk.enable_adapters(model)
    compare.assert_bitwise_equal("y", model(x), fine)


@pytest.mark.parametrize("name", [None, "first", "second"])
def test_parameters_alone(name: str | None) -> None:
    model = _model()
    state, parameters = pk.lora_state_dict(model, name), pk.lora_parameters(model, name)
    whole = model.state_dict()
    wanted = {key for key in whole if "lora_" in key and (name is None or key.endswith(f".{name}"))}
    assert set(state) == wanted and len(parameters) == len(wanted)
    for (key, value), parameter in zip(state.items(), parameters, strict=True):
        assert model.get_parameter(key) is parameter and not value.requires_grad
        compare.assert_bitwise_equal(key, value, parameter.detach())
    other = _model()
    with torch.no_grad():
        for parameter in pk.lora_parameters(other):
            parameter.zero_()
    missing, unexpected = other.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) == set(whole) - wanted
    assert sum(bool(value.any()) for value in pk.lora_state_dict(other).values()) == len(wanted)


def test_an_optimizer_trains_one_adapter_alone() -> None:
    model = _model()
    pk.set_adapter(model, "second")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(pk.lora_parameters(model, "second"), lr=0.1)
    model(torch.randn(7, 6)).square().sum().backward()
    optimizer.step()
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {key for key in before if key.endswith(".second")}


def _merged(model: nn.Sequential, keep_base: bool = True) -> nn.Sequential:
    model[1].merge(keep_base=keep_base)
    return model


@pytest.mark.parametrize(
    ("change", "action", "error", "message"),
    [
        (
            None,
            lambda m: pk.set_adapter(m, "third"),
            KeyError,
            r"set_adapter: .* no adapter 'third'; there are \['first', 'second'\]",
        ),
        (
            _merged,
            lambda m: pk.set_adapter(m, "second"),
            ValueError,
            r"set_adapter: 1 is merged with 'first'; call its unmerge",
        ),
        (_merged, lambda m: pk.set_adapter(m, None), ValueError, "set_adapter: 1 is merged with 'first'"),
        (None, lambda m: pk.add_adapter(m, "second"), ValueError, "add_adapter: 0 has an adapter 'second' already"),
        (None, lambda m: pk.add_adapter(m[::2], "second"), ValueError, "has an adapter 'second' already"),
        (
            None,
            lambda m: pk.add_adapter(nn.Sequential(m[2], m[0]), "second"),
            ValueError,
            "1 has an adapter 'second' already",
        ),
        (None, lambda m: pk.add_adapter(m, "third", r=0), ValueError, "r must be an int of at least 1"),
        (
            None,
            lambda m: pk.delete_adapter(m, "first"),
            ValueError,
            "delete_adapter: 'first' is active in 0; call set_adapter",
        ),
        (None, lambda m: pk.delete_adapter(m, "third"), KeyError, "delete_adapter: there is no adapter 'third'"),
        (None, lambda m: pk.set_scale(m, "third", 1.0), KeyError, "set_scale: there is no adapter 'third'"),
        (None, lambda m: pk.set_scale(m, "first", "1"), ValueError, "set_scale: scale must be a finite number"),
        (
            lambda m: _merged(m, False),
            lambda m: pk.set_scale(m, "first", 2.0),
            ValueError,
            "overwrote the base weight of 1",
        ),
        (
            lambda m: _merged(m, False),
            pk.disable_adapters,
            ValueError,
            "disable_adapters: .* overwrote the base weight of 1",
        ),
        (None, lambda m: pk.lora_parameters(m, "third"), KeyError, "lora_parameters: there is no adapter 'third'"),
        (None, lambda m: pk.lora_state_dict(m, "third"), KeyError, "lora_state_dict: there is no adapter 'third'"),
    ],
)
def test_wrong_use_changes_nothing(
    change: Callable[[nn.Module], nn.Module] | None,
    action: Callable[[nn.Module], object],
    error: type[Exception],
    message: str,
) -> None:
    model = _model() if change is None else change(_model())
    before, parameters = _state(model), list(model.named_parameters())
    with pytest.raises(error, match=message):
        action(model)
    assert _state(model) == before
    assert [(name, id(p)) for name, p in model.named_parameters()] == [(name, id(p)) for name, p in parameters]


@pytest.mark.parametrize("model", [nn.Linear(2, 2), torch.zeros(2)])
@pytest.mark.parametrize(
    "function",
    [
        lambda model: pk.set_adapter(model, None),
        lambda model: pk.add_adapter(model, "a"),
        lambda model: pk.delete_adapter(model, "a"),
        lambda model: pk.set_scale(model, "a", 1.0),
        pk.disable_adapters,
        pk.enable_adapters,
        pk.lora_parameters,
        pk.lora_state_dict,
    ],
)
def test_needs_a_model_with_layers(function: Callable[[object], object], model: nn.Module | Tensor) -> None:
    message = (
        "Linear has no FusedLoRALinear; inject_lora" if isinstance(model, nn.Module) else "must be a torch.nn.Module"
    )
    with pytest.raises(ValueError, match=message):
        function(model)
