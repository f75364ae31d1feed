"""inject_lora: which layers it replaces, what trains then, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import peft_kernels as pk


def _model() -> nn.Module:
    model = nn.Module()
    model.layers = nn.ModuleList(nn.ModuleDict({"q_proj": nn.Linear(4, 4), "o": nn.Linear(4, 4)}) for _ in range(2))
    model.norm = nn.LayerNorm(4)
    model.tied = model.layers[0]["q_proj"]
    return model


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["q_proj"], ["layers.0.q_proj", "layers.1.q_proj"]),
        ("layers.1.*", ["layers.1.q_proj", "layers.1.o"]),
        (["tied", "0.q_proj"], ["layers.0.q_proj", "tied"]),
    ],
)
def test_replaces_what_fits_and_freezes_the_rest(targets: object, expected: list[str]) -> None:
    model = _model()
    bits = model.layers[1]["q_proj"].weight
    assert pk.inject_lora(model, targets, r=2) == expected
    assert all(isinstance(model.get_submodule(name), pk.FusedLoRALinear) for name in expected)
    assert model.layers[1]["q_proj"].weight is bits
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained and all(".lora_A." in name or ".lora_B." in name for name in trained)
    assert isinstance(model.tied, pk.FusedLoRALinear) == ("tied" in expected)
    assert (model.tied is model.layers[0]["q_proj"]) == ("tied" in expected or "layers.0.q_proj" not in expected)


def test_a_second_time_keeps_what_the_first_trains() -> None:
    model = _model()
    pk.inject_lora(model, "q_proj")
    pk.inject_lora(model, "o")
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == 8


@pytest.mark.parametrize(
    ("targets", "options", "message"),
    [
        (["q_proj", "nothing"], {}, "no nn.Linear in Module has a name like 'nothing'"),
        ("norm", {}, "no nn.Linear in Module has a name like 'norm'"),
        ("q_proj", {"r": 0}, "r"),
        ("q_proj", {"lora_dropout": 2.0}, "dropout"),
    ],
)
def test_refuses_and_changes_nothing(targets: object, options: dict[str, object], message: str) -> None:
    model = _model()
    before = {name: (type(part), id(part)) for name, part in model.named_modules()}
    with pytest.raises(ValueError, match=message):
        pk.inject_lora(model, targets, **options)
    assert {name: (type(part), id(part)) for name, part in model.named_modules()} == before
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("model", [nn.Linear(2, 2), torch.zeros(2)])
def test_needs_a_model(model: object) -> None:
    with pytest.raises(ValueError, match="model must be a module that contains layers"):
        pk.inject_lora(model, "*")


def test_the_adapter_has_the_name_that_is_given() -> None:
    model = _model()
    pk.inject_lora(model, "q_proj", r=2, adapter_name="task")
    assert {layer.active_adapter for layer in model.modules() if isinstance(layer, pk.FusedLoRALinear)} == {"task"}
    with pytest.raises(ValueError, match="non-empty string without dots"):
        pk.inject_lora(model, "o", adapter_name="a.b")
