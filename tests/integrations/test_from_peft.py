"""from_peft: PEFT's LoRA adapters on models without PEFT: the same logits, or nothing is changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")

import transformers

import peft_kernels as pk
from peft_kernels import FusedLoRALinear
from python_ref import compare
from tests.integrations.models import ARCHITECTURES, build, randomize, tokens

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
TARGETS = ["q_proj", "v_proj", "down_proj"]


def _base() -> nn.Module:
    """What ``build`` has made PEFT's models of."""
    torch.manual_seed(0)
    return ARCHITECTURES["llama"][0]().eval()


def _saved(folder: Path, **options: object) -> peft.PeftModel:
    model = build(**{"target_modules": TARGETS, **options}).eval()
    model.save_pretrained(folder)
    return model


def _logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens()).logits


def _layers(model: nn.Module) -> dict[str, FusedLoRALinear]:
    return {name: part for name, part in model.named_modules() if isinstance(part, FusedLoRALinear)}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True, "lora_dropout": 0.25},
        {"rank_pattern": {"q_proj": 6}, "alpha_pattern": {"v_proj": 2}},
        {"target_modules": r".*\.1\..*_proj"},
        {"layers_to_transform": [1]},
    ],
)
def test_computes_what_peft_computes(options: dict[str, object], tmp_path: Path) -> None:
    theirs, ours = _saved(tmp_path, **options), _base()
    names = pk.integrations.peft.from_peft(ours, tmp_path, "task")
    layers = _layers(ours)
    assert list(layers) == names and names
    torch.testing.assert_close(_logits(ours), _logits(theirs), **CLOSE)
    for name, layer in layers.items():
        source = theirs.base_model.model.get_submodule(name)
        assert layer.active_adapter == "task" and list(layer.scaling) == ["task"]
        assert layer.scaling["task"] == layer.full_scaling["task"] == source.scaling["default"]
        assert layer.lora_dropout == options.get("lora_dropout", 0.0)
        compare.assert_bitwise_equal(name, layer.lora_A["task"].detach(), source.lora_A["default"].weight.detach())


@pytest.mark.parametrize("is_trainable", [False, True])
def test_what_trains(is_trainable: bool, tmp_path: Path) -> None:
    _saved(tmp_path)
    model = _base()
    pk.integrations.peft.from_peft(model, tmp_path, is_trainable=is_trainable)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == (set(pk.lora_state_dict(model)) if is_trainable else set())


@pytest.mark.parametrize("is_trainable", [False, True])
def test_the_head_of_a_classifier(is_trainable: bool, tmp_path: Path) -> None:
    def base() -> nn.Module:
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        return transformers.LlamaForSequenceClassification(
            transformers.LlamaConfig(vocab_size=61, num_labels=3, pad_token_id=0, **sizes)
        ).eval()

    theirs = peft.get_peft_model(base(), peft.LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"])).eval()
    randomize(theirs, 3)
    nn.init.normal_(theirs.base_model.model.score.modules_to_save["default"].weight)
    theirs.save_pretrained(tmp_path)
    ours = base()
    pk.integrations.peft.from_peft(ours, tmp_path, is_trainable=is_trainable)
    torch.testing.assert_close(_logits(ours), _logits(theirs), **CLOSE)
    assert ours.score.weight.requires_grad == is_trainable


def test_a_second_adapter_goes_beside_the_first(tmp_path: Path) -> None:
    """Of other layers and ranks; switching back gives the first one's bits."""
    _saved(tmp_path / "first", target_modules=["q_proj"], lora_dropout=0.5)
    second = _saved(tmp_path / "second", target_modules=["v_proj", "q_proj"], layers_to_transform=[1], r=3, seed=0)
    model = _base()
    names = pk.integrations.peft.from_peft(model, tmp_path / "first", "first", is_trainable=True)
    first = _logits(model)
    assert pk.integrations.peft.from_peft(model, tmp_path / "second", "second") != names
    torch.testing.assert_close(_logits(model), _logits(second), **CLOSE)
    assert {name: layer.active_adapter for name, layer in _layers(model).items()} == {
        "model.layers.0.self_attn.q_proj": None,
        "model.layers.1.self_attn.q_proj": "second",
        "model.layers.1.self_attn.v_proj": "second",
    }
    assert _layers(model)["model.layers.1.self_attn.q_proj"].lora_dropout == 0.5
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == set(pk.lora_state_dict(model, "first"))
    pk.set_adapter(model, "first")
    compare.assert_bitwise_equal("logits", _logits(model), first)


def _edit(folder: Path, **changes: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _rename(folder: Path, old: str, new: str) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = {key.replace(old, new): value for key, value in safetensors_torch.load_file(path).items()}
    safetensors_torch.save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder, model: _edit(folder, r=5), r"lora_A must be floating \(5, 48\)"),
        (lambda folder, model: _edit(folder, use_dora=True), "must not set use_dora"),
        (lambda folder, model: _edit(folder, lora_dropout=1.0), r"from_peft: model.*: lora_dropout must be"),
        (lambda folder, model: _edit(folder, peft_type="IA3"), "must have peft_type 'LORA', got 'IA3'"),
        (
            lambda folder, model: _rename(folder, "q_proj", "qkv"),
            "'model.*qkv', which must be an nn.Linear; the model has none",
        ),
        (
            lambda folder, model: _rename(folder, "self_attn.q_proj", "self_attn"),
            "'model.*self_attn', which must be an nn.Linear; there is a LlamaAttention",
        ),
        (
            lambda folder, model: model.model.layers[1].self_attn.v_proj.register_forward_hook(lambda *given: None),
            "from_peft: model.*v_proj: FusedLoRALinear: linear must have no hooks",
        ),
        (lambda folder, model: _edit(folder, target_modules=["q_proj"]), "must be of a layer in target_modules"),
    ],
)  # fmt: skip
def test_what_does_not_fit_changes_nothing(
    spoil: Callable[[Path, nn.Module], object], message: str, tmp_path: Path
) -> None:
    _saved(tmp_path)
    model = _base()
    spoil(tmp_path, model)
    parts = [(name, id(part)) for name, part in model.named_modules()]
    with pytest.raises(ValueError, match=message):
        pk.integrations.peft.from_peft(model, tmp_path)
    assert [(name, id(part)) for name, part in model.named_modules()] == parts
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_wrong_use(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"from_peft: model must be a torch.nn.Module, got str"):
        pk.integrations.peft.from_peft(str(tmp_path), tmp_path)
    with pytest.raises(FileNotFoundError, match=r"must hold adapter_config.json"):
        pk.integrations.peft.from_peft(_base(), tmp_path)
    _saved(tmp_path)
    model = _base()
    pk.integrations.peft.from_peft(model, tmp_path)
    model.model.layers[1].self_attn.v_proj.merge()
    with pytest.raises(ValueError, match=r"from_peft: model\.layers\.1\.self_attn\.v_proj is merged; call unmerge"):
        pk.integrations.peft.from_peft(model, tmp_path, "other")
    assert all(list(layer.scaling) == ["default"] for layer in _layers(model).values())
