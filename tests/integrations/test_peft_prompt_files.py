"""Prefix and prompt files: written here and read by PEFT, the other way round, and every fault named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")

import peft_kernels as pk
from peft_kernels import FusedLoRALinear, PrefixEncoder, PromptEmbedding, PromptEnsemble
from peft_kernels.integrations import peft as files
from peft_kernels.integrations import transformers as integration
from python_ref import compare
from tests.integrations.models import HIDDEN, LAYERS, tokens
from tests.integrations.peft_prompts import CONFIGS, build, task_base
from tests.integrations.prefixes import CLOSE, P, padding

TASKS = [("llama", "CAUSAL_LM"), ("gpt2", "CAUSAL_LM"), ("bert", "SEQ_CLS"), ("bert", "FEATURE_EXTRACTION")]


def _ours(kind: str, architecture: str, task: str, reparam_hidden: int | None = None, seed: int = 7) -> nn.Module:
    model = task_base(architecture, task).requires_grad_(False)
    torch.manual_seed(seed)
    if kind == "prefix":
        integration.add_prefix(model, integration.prefix_encoder(model, P, reparam_hidden))
    else:
        integration.add_prompt(model, PromptEmbedding(P, HIDDEN))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "classifier" in name:
                parameter.normal_()
    return model


def _first(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(tokens(), attention_mask=padding("left"))[0]


@pytest.mark.parametrize(("architecture", "task"), TASKS)
@pytest.mark.parametrize(("kind", "reparam"), [("prefix", None), ("prefix", 6), ("prompt", None)])
def test_peft_reads_what_is_written_here(
    kind: str, reparam: int | None, architecture: str, task: str, tmp_path: Path
) -> None:
    model = _ours(kind, architecture, task, reparam)
    files.save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(task_base(architecture, task), tmp_path)
    assert theirs.active_peft_config.task_type == task
    torch.testing.assert_close(_first(theirs), _first(model), **CLOSE)


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize(("architecture", "task"), TASKS)
@pytest.mark.parametrize(
    ("kind", "options"),
    [("prefix", {}), ("prefix", {"prefix_projection": True, "encoder_hidden_size": 6}), ("prompt", {})],
)
def test_what_peft_wrote_is_read_here(
    kind: str, options: dict[str, object], architecture: str, task: str, safe: bool, tmp_path: Path
) -> None:
    theirs = build(kind, architecture, task, **options)
    theirs.save_pretrained(tmp_path)
    if not safe:
        weights = tmp_path / "adapter_model.safetensors"
        torch.save(safetensors_torch.load_file(weights), tmp_path / "adapter_model.bin")
        weights.unlink()
    ours = _ours(kind, architecture, task)
    held = dict(ours.named_parameters())
    files.load_adapter(ours, tmp_path)
    assert all(parameter is held[name] for name, parameter in ours.named_parameters())
    torch.testing.assert_close(_first(ours), _first(theirs), **CLOSE)


def test_alone(tmp_path: Path) -> None:
    encoder, prompt = PrefixEncoder(LAYERS, 2, 8, P, reparam_hidden=6), PromptEmbedding(P, HIDDEN)
    for part, read in ((encoder, PrefixEncoder(LAYERS, 2, 8, P)), (prompt, PromptEmbedding(P, HIDDEN))):
        with pytest.raises(ValueError, match="task_type must be given"):
            files.save_adapter(part, tmp_path)
        files.save_adapter(part, tmp_path, task_type="CAUSAL_LM")
        files.load_adapter(read, tmp_path)
        rows = part.fold().embedding if isinstance(part, PrefixEncoder) else part.weight
        compare.assert_bitwise_equal("rows", next(read.parameters()), rows)


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    model = _ours("prefix", "llama", "CAUSAL_LM")
    model.lm_head = FusedLoRALinear.from_linear(model.lm_head)
    with pytest.raises(ValueError, match=r"must have one kind of adapter, got \['LORA', 'PREFIX_TUNING'\]"):
        files.save_adapter(model, tmp_path / "new")
    ensemble = PromptEnsemble([PromptEmbedding(P, HIDDEN) for _ in range(2)])
    with pytest.raises(ValueError, match="must have one PromptEmbedding, got 2"):
        files.save_adapter(ensemble, tmp_path / "new", task_type="CAUSAL_LM")
    with pytest.raises(KeyError, match="no FusedLoRALinear"):
        files.save_adapter(nn.Linear(2, 2), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def _write(folder: Path, key: str, value: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))


def _tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = safetensors_torch.load_file(path)
    change(tensors)
    safetensors_torch.save_file(tensors, path)


def _truncate(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _pickle(folder: Path, what: object) -> None:
    (folder / "adapter_model.safetensors").unlink()
    torch.save(what, folder / "adapter_model.bin")


KEY = "prompt_embeddings"
FAULTS = [
    (_truncate, ValueError, r"adapter_model\.safetensors cannot be read"),
    (lambda f: _pickle(f, nn.Linear(2, 2)), ValueError, r"adapter_model\.bin cannot be read"),
    (lambda f: _pickle(f, {KEY: 3}), ValueError, "'prompt_embeddings' must be a tensor's name, holds a int"),
    (lambda f: (f / "adapter_model.safetensors").unlink(), FileNotFoundError, "must hold adapter_model.safetensors or"),
    (lambda f: (f / "adapter_config.json").unlink(), FileNotFoundError, "adapter_config.json"),
    (lambda f: (f / "adapter_config.json").write_text("{"), ValueError, "must be JSON"),
    (lambda f: _write(f, "peft_type", "P_TUNING"), ValueError, r"must have peft_type .*, got 'P_TUNING'"),
    (lambda f: _write(f, "num_virtual_tokens", P + 1), ValueError, "must have num_virtual_tokens = 5, got 6"),
    (lambda f: _write(f, "token_dim", "16"), ValueError, r"must have token_dim = \d+, got '16'"),
    (lambda f: _write(f, "num_transformer_submodules", 2), ValueError, "num_transformer_submodules = 1, got 2"),
    (lambda f: _write(f, "num_transformer_submodules", True), ValueError, "submodules = 1, got True"),
    (lambda f: _tensors(f, lambda t: t.pop(KEY)), ValueError, r"must hold the key 'prompt_embeddings', holds \["),
    (
        lambda f: _tensors(f, lambda t: t.update({KEY: t[KEY][:4]})),
        ValueError,
        r"'prompt_embeddings' must be floating \(5, \d+\), got torch\.float32 \(4, \d+\)",
    ),
    (lambda f: _tensors(f, lambda t: t.update({KEY: t[KEY].long()})), ValueError, "got torch.int64"),
    (lambda f: _tensors(f, lambda t: t.update({"prompt": t[KEY].clone()})), ValueError, "key 'prompt' must be"),
    (
        lambda f: _tensors(f, lambda t: t.update({"base_model.pooler.weight": torch.ones(2)})),
        ValueError,
        r"key 'base_model\.pooler\.weight' must be .* BertForSequenceClassification has none there",
    ),
    (
        lambda f: _tensors(f, lambda t: t.update({"base_model.classifier.bias": torch.ones(4)})),
        ValueError,
        r"'base_model\.classifier\.bias' must be floating \(3,\), got torch\.float32 \(4,\)",
    ),
]


@pytest.mark.parametrize(("damage", "error", "message"), FAULTS)
@pytest.mark.parametrize("kind", CONFIGS)
def test_faults_are_named_and_change_nothing(
    kind: str, damage: Callable[[Path], None], error: type[Exception], message: str, tmp_path: Path
) -> None:
    files.save_adapter(_ours(kind, "bert", "SEQ_CLS"), tmp_path)
    damage(tmp_path)
    _assert_refused(_ours(kind, "bert", "SEQ_CLS", seed=8), tmp_path, error, message)


def _assert_refused(model: nn.Module, folder: Path, error: type[Exception], message: str) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(error, match=message):
        pk.integrations.peft.load_adapter(model, folder)
    assert list(model.state_dict()) == list(before)
    for name, tensor in model.state_dict().items():
        compare.assert_bitwise_equal(name, tensor, before[name])


class TestMismatches:
    """Files that are sound, and for something else."""

    def test_sizes_with_the_same_product(self, tmp_path: Path) -> None:
        files.save_adapter(PrefixEncoder(2, 4, 4, P), tmp_path, task_type="CAUSAL_LM")
        _assert_refused(PrefixEncoder(2, 2, 8, P), tmp_path, ValueError, "must have num_attention_heads = 2, got 4")
        _assert_refused(PrefixEncoder(4, 2, 4, P), tmp_path, ValueError, "must have num_layers = 4, got 2")

    def test_the_other_kind(self, tmp_path: Path) -> None:
        files.save_adapter(PromptEmbedding(P, HIDDEN), tmp_path, task_type="CAUSAL_LM")
        _assert_refused(
            _ours("prefix", "llama", "CAUSAL_LM"), tmp_path, ValueError, "must have one PromptEmbedding, got 0"
        )

    def test_a_head_that_nobody_takes(self, tmp_path: Path) -> None:
        model = _ours("prompt", "bert", "SEQ_CLS")
        files.save_adapter(model, tmp_path)
        _assert_refused(PromptEmbedding(P, HIDDEN), tmp_path, ValueError, r"key 'base_model\.classifier\.")

    def test_an_encoder_with_an_mlp(self, tmp_path: Path) -> None:
        files.save_adapter(PrefixEncoder(2, 2, 8, P), tmp_path, task_type="CAUSAL_LM")
        _assert_refused(PrefixEncoder(2, 2, 8, P, 6), tmp_path, ValueError, r"must have no MLP.* fold\(\) it")
