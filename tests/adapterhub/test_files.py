"""Adapter files: written here and read by AdapterHub, and the other way round."""

from __future__ import annotations

import pytest

pytest.importorskip("adapters", reason="AdapterHub needs an older transformers; `make test-adapterhub` runs these")

import json
from pathlib import Path

import adapters
import torch
from torch import nn

import peft_kernels as pk
from peft_kernels import SerialAdapter, insert_adapters
from peft_kernels.adapter.kernels.activations import ACTIVATIONS
from peft_kernels.integrations.adapterhub import load_adapter, save_adapter
from peft_kernels.integrations.adapterhub.activations import ACTIVATIONS as THEIR_ACTIVATIONS
from tests.adapterhub.inserted import SUBLAYERS, TYPES, edit_config, logits_of, with_adapters
from tests.adapterhub.models import HIDDEN, KINDS, base, randomize, run
from tests.adapterhub.parity import assert_bitwise, assert_close


def _theirs(kind: str, architecture: str = "bert", width: int = 5, **options: object) -> nn.Module:
    """AdapterHub's adapters in the same places."""
    model = base(architecture)
    adapters.init(model)
    factor = HIDDEN / (width + 0.5)
    model.add_adapter("task", config=KINDS[kind](**{"mh_adapter": True, "reduction_factor": factor, **options}))
    randomize(model, 4)
    model.set_active_adapters("task")
    return model


def _read_by_adapterhub(folder: Path, architecture: str = "bert", safe: bool = False) -> nn.Module:
    model = base(architecture)
    adapters.init(model)
    missing: dict[str, list[str]] = {}
    name = model.load_adapter(str(folder), use_safetensors=safe, loading_info=missing, with_head=False)
    assert missing == {"missing_keys": [], "unexpected_keys": []}
    model.set_active_adapters(name)
    return model


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("architecture", SUBLAYERS)
def test_adapterhub_reads_what_is_written_here(architecture: str, kind: str, safe: bool, tmp_path: Path) -> None:
    model = with_adapters(kind, architecture, scale=0.5)
    assert (logits_of(model) - logits_of(base(architecture))).abs().max() > 0.01
    save_adapter(model, tmp_path / "new", "task", use_safetensors=safe)
    assert_close("logits", logits_of(_read_by_adapterhub(tmp_path / "new", architecture, safe)), logits_of(model))


@pytest.mark.parametrize(
    "options",
    [
        {"names": ("attention",)},
        {"names": ("feed_forward",), "kind": "parallel"},
        {"layers": (1,)},
        {"widths": (3, 9)},
        {"widths": (1, 32)},
        {"bias": False},
        *({"activation": name} for name in ACTIVATIONS),
    ],
    ids=str,
)
def test_adapterhub_reads(options: dict[str, object], tmp_path: Path) -> None:
    model = with_adapters(**options)
    save_adapter(model, tmp_path)
    assert_close("logits", logits_of(_read_by_adapterhub(tmp_path)), logits_of(model))


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("architecture", SUBLAYERS)
def test_what_adapterhub_wrote_is_read_here(architecture: str, kind: str, safe: bool, tmp_path: Path) -> None:
    theirs = _theirs(kind, architecture, scaling=0.5)
    theirs.save_adapter(str(tmp_path), "task", use_safetensors=safe, with_head=False)
    ours = with_adapters(kind, architecture)
    load_adapter(ours, tmp_path)
    assert_close("logits", logits_of(ours), logits_of(theirs))


@pytest.mark.parametrize("name", THEIR_ACTIVATIONS)
def test_activations_are_read(name: str, tmp_path: Path) -> None:
    theirs = _theirs("double", non_linearity=name)
    theirs.save_adapter(str(tmp_path), "task")
    ours = with_adapters()
    load_adapter(ours, tmp_path)
    assert_close("logits", logits_of(ours), logits_of(theirs))


@pytest.mark.parametrize("name", ["gelu", "gelu_orig", "relu"])
def test_names_before_versions(name: str, tmp_path: Path) -> None:
    """AdapterHub translates them where a file has no version."""
    _theirs("double").save_adapter(str(tmp_path), "task")
    edit_config(tmp_path, "non_linearity", name)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != "version"}))
    ours = with_adapters()
    load_adapter(ours, tmp_path)
    assert_close("logits", logits_of(ours), logits_of(_read_by_adapterhub(tmp_path)))


@pytest.mark.parametrize("written_by_the_base", [False, True])
def test_the_base_model_alone(written_by_the_base: bool, tmp_path: Path) -> None:
    """A model with a head and its base call the same adapters by two names."""
    whole, other = with_adapters(), with_adapters(activation="tanh")
    randomize(other, 9)
    writer, reader = (whole.bert, other) if written_by_the_base else (whole, other.bert)
    save_adapter(writer, tmp_path)
    load_adapter(reader, tmp_path)
    assert_bitwise("logits", logits_of(other), logits_of(whole))
    assert_close("logits", logits_of(_read_by_adapterhub(tmp_path)), logits_of(whole))


def test_locations_of_an_unknown_block(tmp_path: Path) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(HIDDEN, HIDDEN)

    model = nn.Sequential(Block())
    insert_adapters(model[0], {"attention": SerialAdapter(HIDDEN, 3)}, {"attention": ("linear", "linear")})
    with pytest.raises(ValueError, match="must be one of BertLayer, GPT2Block, LlamaDecoderLayer unless locations"):
        save_adapter(model, tmp_path)
    save_adapter(model, tmp_path, "n", locations={"attention": "somewhere"})
    keys = torch.load(tmp_path / "pytorch_adapter.bin", weights_only=True)
    assert set(keys) == {
        f"0.somewhere.adapters.n.{end}"
        for end in ("adapter_down.0.weight", "adapter_down.0.bias", "adapter_up.weight", "adapter_up.bias")
    }


def test_round_trip_is_exact_and_keeps_parameters(tmp_path: Path) -> None:
    model, other = with_adapters(scale=0.3, activation="gelu_tanh"), with_adapters()
    save_adapter(model, tmp_path, use_safetensors=True)
    save_adapter(model, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "pytorch_adapter.bin"]
    randomize(other, 9)
    held = {name: (parameter, parameter.data_ptr()) for name, parameter in other.named_parameters()}
    load_adapter(other, tmp_path)
    for name, parameter in other.named_parameters():
        assert parameter is held[name][0] and parameter.data_ptr() == held[name][1]
    assert_bitwise("logits", logits_of(other), logits_of(model))
    _, gradients = run(other)
    assert any("adapters.attention.down" in name for name in gradients)


def test_parameters_keep_their_dtype(tmp_path: Path) -> None:
    model = with_adapters()
    save_adapter(model, tmp_path)
    half = with_adapters().bfloat16()
    load_adapter(half, tmp_path)
    for name, parameter in half.named_parameters():
        assert_bitwise(name, parameter, model.get_parameter(name).bfloat16())


def test_applied_models_write_the_same_file(tmp_path: Path) -> None:
    theirs = _theirs("double")
    theirs.save_adapter(str(tmp_path / "plain"), "task")
    pk.apply(theirs)
    theirs.save_adapter(str(tmp_path / "applied"), "task")
    plain, applied = (
        torch.load(tmp_path / name / "pytorch_adapter.bin", weights_only=True) for name in ("plain", "applied")
    )
    assert plain.keys() == applied.keys() and all(plain[key].equal(applied[key]) for key in plain)
    configs = [(tmp_path / name / "adapter_config.json").read_text() for name in ("plain", "applied")]
    assert configs[0] == configs[1]


def test_without_bias(tmp_path: Path) -> None:
    """A bias of zero is none."""
    model, other = with_adapters(bias=False), with_adapters(bias=False)
    save_adapter(model, tmp_path)
    randomize(other, 9)
    load_adapter(other, tmp_path)
    assert_bitwise("logits", logits_of(other), logits_of(model))
    save_adapter(with_adapters(), tmp_path)
    with pytest.raises(ValueError, match=r"adapter_down\.0\.bias must be zero, since the model's adapter has no bias"):
        load_adapter(other, tmp_path)
