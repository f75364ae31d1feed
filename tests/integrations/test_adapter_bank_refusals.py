"""What an AdapterBank refuses: by name, with what it wanted and what it got, and without a change."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")


import peft_kernels as pk
from tests.integrations.adapter_banks import OPTIONS, base, bits, filled, logits, peft_model
from tests.integrations.models import tokens


@pytest.fixture
def saved(tmp_path: Path) -> tuple[nn.Module, dict[str, Path]]:
    """PEFT's model, and the folder of each of its adapters."""
    model = peft_model()
    model.save_pretrained(tmp_path)
    return model, {name: tmp_path / name for name in OPTIONS}


def _config(**changes: Any) -> Callable[[Path], object]:
    """Other options in a folder's configuration."""

    def change(folder: Path) -> None:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return change


def _tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], object]:
    """Other tensors in a folder's file."""

    def rewrite(folder: Path) -> None:
        file = folder / "adapter_model.safetensors"
        tensors = safetensors_torch.load_file(file)
        change(tensors)
        safetensors_torch.save_file(tensors, file)

    return rewrite


def _put(key: str, value: Tensor) -> Callable[[Path], object]:
    return _tensors(lambda tensors: tensors.update({key: value}))


def _truncate(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _of_rank_9(folder: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        for key, value in tensors.items():
            tensors[key] = torch.zeros(9, value.shape[1]) if "lora_A" in key else torch.zeros(value.shape[0], 9)

    _config(r=9)(folder)
    _tensors(change)(folder)


def _without_q(tensors: dict[str, Tensor]) -> None:
    del tensors[DOWN], tensors[UP]


def _with_a_seventh_layer(tensors: dict[str, Tensor]) -> None:
    for key in (DOWN, UP):
        tensors[key.replace("layers.0", "layers.7")] = tensors[key].clone()


PREFIX = "base_model.model."
DOWN, UP = (f"{PREFIX}model.layers.0.self_attn.q_proj.lora_{letter}.weight" for letter in "AB")
EMBEDDING, HEAD = f"{PREFIX}model.embed_tokens.lora_embedding_A", f"{PREFIX}lm_head.weight"

# What is done to a folder, and what the error says.
UNFIT: dict[str, tuple[Callable[[Path], object], str]] = {
    "DoRA": (_config(use_dora=True), r"must not set use_dora, got True"),
    "lora_bias": (_config(lora_bias=True), r"must not set lora_bias, got True"),
    "modules_to_save": (_config(modules_to_save=["score"]), r"must not set modules_to_save in a bank, got \['score'\]"),
    "another kind": (_config(peft_type="IA3"), r"must have peft_type 'LORA', got 'IA3'"),
    "PiSSA": (_config(init_lora_weights="pissa"), r"must not set init_lora_weights to 'pissa'"),
    "rank": (_config(r=9), r"lora_A must be floating \(9, \d+\), got torch.float64 \(4, \d+\)"),
    "rank of the bank": (_of_rank_9, r"'(new|plain)': .*q_proj must have a rank of at most max_rank, 8, got 9"),
    "in-features": (_put(DOWN, torch.zeros(4, 33)), r"q_proj.lora_A must be floating \(4, 32\), got .*32 \(4, 33\)"),
    "out-features": (_put(UP, torch.zeros(31, 4)), r"q_proj.lora_B must be floating \(32, 4\), got .*32 \(31, 4\)"),
    "integers": (_put(DOWN, torch.zeros(4, 32, dtype=torch.int32)), r"got torch.int32 \(4, 32\)"),
    "half a pair": (_tensors(lambda tensors: tensors.pop(UP)), r"must have lora_A and lora_B, lacks lora_B"),
    "a layer less": (_tensors(_without_q), r"must hold factors of .*0.self_attn.q_proj, since it is in target_modules"),
    "a layer more": (_tensors(_with_a_seventh_layer), r"layers.7.* must be of a layer that is one of 14; it is not"),
    "no target": (_config(target_modules=["v_proj"]), r"must be of a layer that is in target_modules; it is not"),
    "an embedding": (_put(EMBEDDING, torch.zeros(4, 61)), rf"key '{EMBEDDING}' must be"),
    "a head": (_put(HEAD, torch.zeros(61, 32)), rf"key '{HEAD}' must be"),
    "truncated": (_truncate, r"adapter_model.safetensors cannot be read"),
    "no folder": (shutil.rmtree, r"must be a local folder"),
}


@pytest.mark.parametrize("case", UNFIT)
@pytest.mark.parametrize("name", ["new", "plain"])
def test_what_does_not_fit_changes_nothing(saved: tuple[nn.Module, dict[str, Path]], case: str, name: str) -> None:
    """Neither a bit of a tensor, nor who is where; also not the adapter whose place it was to take."""
    model, folders = saved
    bank = filled(model, folders, slots=3)
    bank.use(["plain", "plain"])
    bank.use(["few", "pattern"])
    before, want, facts = bits(bank), logits(model, tokens(2)), repr(bank)
    change, text = UNFIT[case]
    change(folders["plain"])
    with pytest.raises((ValueError, FileNotFoundError), match=text):
        bank.add(name, folders["plain"], overwrite=name == "plain")
    assert bits(bank) == before
    assert repr(bank) == facts
    assert torch.equal(logits(model, tokens(2)), want)


MISTAKES: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "no module": (lambda m: pk.AdapterBank("model"), r"model must be a torch.nn.Module, got str"),
    "no slot": (lambda m: pk.AdapterBank(m, slots=0), "slots must be an int of at least 1, got 0"),
    "no rank": (lambda m: pk.AdapterBank(m, max_rank=True), "max_rank must be an int of at least 1, got True"),
    "dtype": (lambda m: pk.AdapterBank(m, dtype=torch.half), r"dtype must be float32 or .*float64, got torch.float16"),
    "no such target": (
        lambda m: pk.AdapterBank(m, target_modules=["q_proj", "nowhere"]),
        "target_modules must name linear layers, LlamaForCausalLM has no 'nowhere'",
    ),
    "a pattern of nothing": (lambda m: pk.AdapterBank(m, target_modules="nowhere.*"), "'nowhere.*' names none"),
    "a number": (lambda m: pk.AdapterBank(m, target_modules=3), "must have target_modules of type"),
    "hooked": (
        lambda m: (lora_q(m).base_layer.register_forward_hook(lambda *_: None), pk.AdapterBank(m)),
        "q_proj must have no hooks on its base layer",
    ),
    "replaced": (
        lambda m: (setattr(lora_q(m), "forward", lambda x: x), pk.AdapterBank(m)),
        "q_proj must have its class's forward, which was replaced",
    ),
    "merged": (lambda m: (m.merge_adapter(), pk.AdapterBank(m)), r"q_proj is merged with \['plain'\]"),
    "twice": (lambda m: (pk.AdapterBank(m, max_rank=1), pk.AdapterBank(m)), "q_proj is in a bank already"),
    "another base": (
        lambda m: (setattr(lora_q(m), "base_layer", nn.Identity()), pk.AdapterBank(m)),
        "q_proj must be an nn.Linear or Conv1D, is a Identity",
    ),
}


def lora_q(model: nn.Module) -> Any:
    return model.base_model.model.model.layers[0].self_attn.q_proj


@pytest.mark.parametrize("case", MISTAKES)
def test_wrong_arguments(saved: tuple[nn.Module, dict[str, Path]], case: str) -> None:
    model = saved[0]
    with pytest.raises(ValueError, match=MISTAKES[case][1]):
        MISTAKES[case][0](model)
    swapped = [m for m in model.modules() if type(m).__module__.startswith("peft_kernels")]
    assert len(swapped) == (14 if case == "twice" else 0)


def test_layers_that_are_no_lora_linear_are_refused() -> None:
    model = peft.get_peft_model(base(), peft.LoraConfig(target_modules=["embed_tokens", "q_proj"]))
    with pytest.raises(ValueError, match=r"embed_tokens must be a linear layer or PEFT's lora.Linear, is a Embedding"):
        pk.AdapterBank(model)
    experts = nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(3, 3)])})
    with pytest.raises(ValueError, match=r"experts.0 is an expert's"):
        pk.AdapterBank(experts, target_modules="all-linear")


def test_calls_that_say_something_else(saved: tuple[nn.Module, dict[str, Path]]) -> None:
    model, folders = saved
    bank = filled(model, folders)
    bank.use(["few", "plain"])
    with pytest.raises(ValueError, match=r"B the 2 names in use or a multiple of it, got \(3, 7, 32\)"):
        logits(model, tokens(3))
    bank.use(None)
    model.merge_adapter()
    bank.use(["few", "plain"])
    with pytest.raises(ValueError, match="are merged into a layer; call unmerge_adapter"):
        logits(model, tokens(2))
    model.unmerge_adapter()
    # Last, since PEFT leaves its hooks behind where a call raises.
    with pytest.raises(ValueError, match=r"a layer takes x alone, got \['adapter_names'\]"):
        logits(model, tokens(2), adapter_names=["few", "few"])
