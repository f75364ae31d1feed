"""PEFT's prefix and prompt tuning files for PrefixEncoder and PromptEmbedding, on a model or alone.

Both have one key, ``prompt_embeddings``: for prefixes (P, 2 * num_layers * H_kv * D) in PrefixEncoder's own layout, for
a prompt (P, D). A model with a task's head has it beside that, as ``base_model.<path>``. A file has no MLP: PEFT drops
it when it saves, and so does this.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peft_kernels.integrations.peft import adapter_folder
from peft_kernels.prefix import PrefixEncoder
from peft_kernels.prompt import PromptEmbedding

KEY = "prompt_embeddings"
_BASE = "base_model."
_HEADS = ("classifier", "score", "qa_outputs")

# The end of a transformers class's name tells PEFT's task.
_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "Model": "FEATURE_EXTRACTION",
}

Part = PrefixEncoder | PromptEmbedding


def save(model: nn.Module, part: Part, folder: str | Path, task_type: str | None) -> None:
    """See ``peft.save_adapter``.

    Raises:
        ValueError: ``task_type`` is None, and the model's class does not tell it.
    """
    task = task_type or _task(model)
    if task is None:
        raise ValueError(
            f"save_adapter: task_type must be given for a {type(model).__name__}: without one PEFT builds a model that "
            "ignores the prompt"
        )
    rows = part.fold().embedding if isinstance(part, PrefixEncoder) else part.weight
    heads = {} if model is part else dict(_head(model))
    config = {
        **_sizes(part),
        "task_type": task,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "modules_to_save": sorted({name.split(".")[0] for name in heads}) or None,
    }
    adapter_folder.write(folder, config, {KEY: rows, **{f"{_BASE}{name}": tensor for name, tensor in heads.items()}})


def load(model: nn.Module, part: Part, folder: Path, config: Mapping[str, Any]) -> None:
    """See ``peft.load_adapter``."""
    if isinstance(part, PrefixEncoder) and part.mlp is not None:
        raise ValueError("load_adapter: a PrefixEncoder must have no MLP: a file holds what the MLP made; fold() it")
    for option, expected in _sizes(part).items():
        adapter_folder.require(folder, config, option, expected)
    tensors = adapter_folder.read_tensors(folder)
    if KEY not in tensors:
        raise ValueError(f"load_adapter: {folder} must hold the key {KEY!r}, holds {sorted(tensors)}")
    parameters = {} if model is part else dict(model.named_parameters())
    targets: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(_BASE)
        target = _rows(part) if key == KEY else parameters.get(name) if key.startswith(_BASE) else None
        if target is None:
            raise ValueError(
                f"load_adapter: {folder}: key {key!r} must be {KEY!r}, or {_BASE}<path> of a parameter; "
                f"{type(model).__name__} has none there"
            )
        if tensor.shape != target.shape or not tensor.is_floating_point():
            raise ValueError(
                f"load_adapter: {folder}: {key!r} must be floating {tuple(target.shape)}, "
                f"got {tensor.dtype} {tuple(tensor.shape)}"
            )
        targets[key] = target
    with torch.no_grad():
        for key, target in targets.items():
            # In place, for an optimizer that holds the parameter.
            target.copy_(tensors[key])


def _task(model: nn.Module) -> str | None:
    if not hasattr(model, "base_model_prefix"):
        return None
    return next((task for end, task in _TASKS.items() if type(model).__name__.endswith(end)), None)


def _rows(part: Part) -> Tensor:
    return part.embedding if isinstance(part, PrefixEncoder) else part.weight


def _head(model: nn.Module) -> list[tuple[str, Tensor]]:
    """What PEFT trains and saves beside the prompt: the layer on top of a task's model."""
    named = [(name, child) for name, child in model.named_children() if name in _HEADS]
    return [(f"{name}.{key}", tensor) for name, child in named for key, tensor in child.named_parameters()]


def _sizes(part: Part) -> dict[str, Any]:
    """What a configuration says, and must say."""
    if isinstance(part, PromptEmbedding):
        return {
            "peft_type": "PROMPT_TUNING",
            "num_virtual_tokens": part.num_tokens,
            "token_dim": part.embedding_dim,
            "num_transformer_submodules": 1,
        }
    return {
        "peft_type": "PREFIX_TUNING",
        "num_virtual_tokens": part.prefix_length,
        "num_layers": part.num_layers,
        "num_attention_heads": part.num_kv_heads,
        "token_dim": part.num_kv_heads * part.head_dim,
        "num_transformer_submodules": 1,
    }
