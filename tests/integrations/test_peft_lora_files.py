"""Adapter files: written here and read by PEFT, the other way round, and every fault named without a change."""

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

import peft_kernels as pk
from peft_kernels import FusedLoRALinear
from python_ref import compare
from tests.integrations.models import ARCHITECTURES, build, randomize, run, tokens

TARGETS = ("q_proj", "v_proj", "down_proj")
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def _base(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return ARCHITECTURES["llama"][0]().eval()


def _ours(r: int = 4, alpha: float = 8, **options: object) -> nn.Module:
    model = _base().requires_grad_(False)
    for name in [name for name, module in model.named_modules() if name.endswith(TARGETS)]:
        layer = FusedLoRALinear.from_linear(model.get_submodule(name), r=r, lora_alpha=alpha, **options)
        model.set_submodule(name, layer)
    randomize(model, 3)
    return model


def _theirs(folder: Path) -> nn.Module:
    return peft.PeftModel.from_pretrained(_base(), folder)


def _logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens()).logits


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"r": 7, "alpha": 3}])
def test_peft_reads_what_is_written_here(options: dict[str, object], tmp_path: Path) -> None:
    model = _ours(**options)
    pk.integrations.peft.save_adapter(model, tmp_path)
    torch.testing.assert_close(_logits(_theirs(tmp_path)), _logits(model), **CLOSE)


def test_layers_of_several_ranks(tmp_path: Path) -> None:
    model = _ours()
    layers = [module for module in model.modules() if isinstance(module, FusedLoRALinear)]
    for index, layer in enumerate(layers):
        layer.add_adapter("task", r=2 + index, lora_alpha=5 - index)
        layer.set_adapter("task")
    randomize(model, 4)
    pk.integrations.peft.save_adapter(model, tmp_path, "task")
    expected = _logits(model)
    torch.testing.assert_close(_logits(_theirs(tmp_path)), expected, **CLOSE)
    other = _ours()
    pk.integrations.peft.load_adapter(other, tmp_path, "read")
    for layer in other.modules():
        if isinstance(layer, FusedLoRALinear):
            assert layer.active_adapter == "default"
            layer.set_adapter("read")
    compare.assert_bitwise_equal("logits", _logits(other), expected)


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 6}, "alpha_pattern": {"v_.*": 2}}]
)
def test_what_peft_wrote_is_read_here(options: dict[str, object], safe: bool, tmp_path: Path) -> None:
    theirs = build(target_modules=list(TARGETS), **options)
    theirs.save_pretrained(tmp_path)
    if not safe:
        weights = tmp_path / "adapter_model.safetensors"
        torch.save(safetensors_torch.load_file(weights), tmp_path / "adapter_model.bin")
        weights.unlink()
    ours = _ours(r=2)
    pk.integrations.peft.load_adapter(ours, tmp_path)
    torch.testing.assert_close(_logits(ours), _logits(theirs), **CLOSE)


def test_round_trip_is_exact_and_keeps_parameters(tmp_path: Path) -> None:
    model = _ours()
    pk.integrations.peft.save_adapter(model, tmp_path)
    other = _ours()
    randomize(other, 9)
    held = dict(other.named_parameters())
    pk.integrations.peft.load_adapter(other, tmp_path)
    assert all(parameter is held[name] for name, parameter in other.named_parameters())
    compare.assert_bitwise_equal("logits", _logits(other), _logits(model))
    run(other)  # still trains


def _write(folder: Path, key: str, value: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))


def _tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = safetensors_torch.load_file(path)
    change(tensors)
    safetensors_torch.save_file(tensors, path)


def _truncate(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _no_tensor(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    torch.save({FIRST: 1}, folder / "adapter_model.bin")


def _evil(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    torch.save(nn.Linear(2, 2), folder / "adapter_model.bin")


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (_truncate, ValueError, r"adapter_model\.safetensors cannot be read"),
        (_evil, ValueError, r"adapter_model\.bin cannot be read"),
        (_no_tensor, ValueError, r"q_proj\.lora_A\.weight' must be a tensor's name, holds a int"),
        (
            lambda f: (f / "adapter_model.safetensors").unlink(),
            FileNotFoundError,
            "must hold adapter_model.safetensors or",
        ),
        (lambda f: (f / "adapter_config.json").unlink(), FileNotFoundError, "adapter_config.json"),
        (lambda f: (f / "adapter_config.json").write_text("{"), ValueError, "must be JSON"),
        (lambda f: (f / "adapter_config.json").write_text("[]"), ValueError, "must hold an object, got a list"),
        (lambda f: _write(f, "peft_type", "LOHA"), ValueError, r"must have peft_type 'LORA' or .*, got 'LOHA'"),
        (lambda f: _write(f, "use_dora", True), ValueError, "must not set use_dora, got True"),
        (lambda f: _write(f, "modules_to_save", ["lm_head"]), ValueError, "must not set modules_to_save"),
        (lambda f: _write(f, "r", "four"), ValueError, "must have r of type int, got 'four'"),
        (lambda f: _write(f, "r", 5), ValueError, r"lora_A must be floating \(5, \d+\), got torch\.float32 \(4, \d+\)"),
        (lambda f: _tensors(f, lambda t: t.pop(FIRST)), ValueError, "q_proj must have lora_A and lora_B, lacks lora_A"),
        (lambda f: _tensors(f, lambda t: t.clear()), ValueError, "at least one layer, holds none"),
        (lambda f: _tensors(f, lambda t: t.update(x=torch.ones(1))), ValueError, "key 'x' must be base_model"),
        (
            lambda f: _tensors(f, lambda t: t.update({FIRST.replace("q_proj", "z_proj"): torch.ones(4, 32)})),
            ValueError,
            "z_proj.* must name a FusedLoRALinear",
        ),
        (
            lambda f: _tensors(f, lambda t: t.update({FIRST: torch.ones(4, 31)})),
            ValueError,
            r"q_proj\.lora_A must be floating \(4, 32\), got torch\.float32 \(4, 31\)",
        ),
        (
            lambda f: _tensors(f, lambda t: t.update({FIRST: torch.ones(4, 32, dtype=torch.int64)})),
            ValueError,
            "got torch.int64",
        ),
    ],
)
def test_faults_are_named_and_change_nothing(
    damage: Callable[[Path], None], error: type[Exception], message: str, tmp_path: Path
) -> None:
    pk.integrations.peft.save_adapter(_ours(), tmp_path)
    damage(tmp_path)
    model = _ours(r=6)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(error, match=message):
        pk.integrations.peft.load_adapter(model, tmp_path, "new")
    assert list(model.state_dict()) == list(before)
    for name, tensor in model.state_dict().items():
        compare.assert_bitwise_equal(name, tensor, before[name])


def test_a_merged_layer_is_not_loaded_into(tmp_path: Path) -> None:
    model = _ours()
    pk.integrations.peft.save_adapter(model, tmp_path)
    last = [module for module in model.modules() if isinstance(module, FusedLoRALinear)][-1]
    last.merge()
    with pytest.raises(ValueError, match=r"down_proj is merged; call unmerge\(\)"):
        pk.integrations.peft.load_adapter(model, tmp_path, "new")
    assert not any("new" in module.scaling for module in model.modules() if isinstance(module, FusedLoRALinear))


def test_nothing_to_save(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="no FusedLoRALinear has an adapter 'x'"):
        pk.integrations.peft.save_adapter(_ours(), tmp_path / "new", "x")
    assert not (tmp_path / "new").exists()


def test_layers_that_one_configuration_cannot_express(tmp_path: Path) -> None:
    model = nn.Sequential(FusedLoRALinear(3, 3, lora_dropout=0.1), FusedLoRALinear(3, 3))
    with pytest.raises(ValueError, match="must share dropout and use_rslora"):
        pk.integrations.peft.save_adapter(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()
