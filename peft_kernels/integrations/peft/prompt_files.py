"""PEFT's prefix and prompt tuning files for PrefixEncoder and PromptEmbedding, on a model or alone.

Both have one key, ``prompt_embeddings``: for prefixes (P, 2 * num_layers * H_kv * D) in PrefixEncoder's own layout, for
a prompt (P, D). A model with a task's head has it beside that, as ``base_model.<path>``. A file has no MLP: PEFT drops
it when it saves, and so does this.
"""

from __future__ import annotations

import os
from typing import Any

from torch import Tensor, nn

from peft_kernels.integrations.adapter_files import AdapterFolder, check_tensor, fitted, short, write_values
from peft_kernels.integrations.peft import adapter_folder
from peft_kernels.prefix import PrefixEncoder
from peft_kernels.prompt import PromptEmbedding

KEY = "prompt_embeddings"
_BASE = "base_model."
_ADAPTERS = (PrefixEncoder, PromptEmbedding)

# What they concern is not in a file: how the rows were made.
_WITHOUT_EFFECT = (
    "num_layers",
    "num_attention_heads",
    "modules_to_save",
    "init_weights",
    "encoder_hidden_size",
    "prefix_projection",
    "prompt_tuning_init",
    "prompt_tuning_init_text",
    "tokenizer_name_or_path",
    "tokenizer_kwargs",
)

Part = PrefixEncoder | PromptEmbedding


def save(model: nn.Module, part: Part, folder: str | os.PathLike[str], task_type: str | None) -> None:
    """See ``peft.save_adapter``.

    Raises:
        ValueError: ``task_type`` is None, and the model's class does not tell it.
    """
    task, head = adapter_folder.task_and_head(model, task_type, _ADAPTERS)
    if task is None:
        raise ValueError(
            f"save_adapter: task_type must be given for a {type(model).__name__}: without one PEFT builds a model that "
            "ignores the prompt"
        )
    folded = part.fold() if isinstance(part, PrefixEncoder) and part.mlp is not None else part
    rows = _rows(folded)
    sizes = _sizes(part)
    width = 2 * sizes.get("num_layers", 0.5) * sizes["token_dim"]
    check_tensor(
        f"save_adapter: {KEY} (whole: gather one that is sharded)", rows, (sizes["num_virtual_tokens"], int(width))
    )
    config = {**sizes, **adapter_folder.base_of(model, task, head)}
    adapter_folder.write(folder, config, {KEY: rows, **{f"{_BASE}{name}": value for name, value in head.items()}})


def load(model: nn.Module, part: Part, files: AdapterFolder, strict: bool) -> None:
    """See ``peft.load_adapter``."""
    if isinstance(part, PrefixEncoder) and part.mlp is not None:
        raise ValueError("load_adapter: a PrefixEncoder must have no MLP: a file holds what the MLP made; fold() it")
    sizes = _sizes(part)
    for option, expected in sizes.items():
        got = files.config.get(option)
        if type(got) is not type(expected) or got != expected:
            raise ValueError(f"{adapter_folder.where_of(files)} must have {option} = {expected!r}, got {short(got)}")
    adapter_folder.refuse_others(files, (*sizes, *_WITHOUT_EFFECT))
    if KEY not in files.tensors:
        raise ValueError(f"load_adapter: {files.weights_file} must hold the key {KEY!r}, holds {sorted(files.tensors)}")
    others = {key: tensor for key, tensor in files.tensors.items() if key != KEY}
    head = adapter_folder.head_values(model, files, others, (_BASE, repr(KEY)), _ADAPTERS, strict)
    rows = _rows(part)
    where = f"load_adapter: {files.weights_file}: {KEY!r}"
    check_tensor(where, files.tensors[KEY], tuple(rows.shape))
    write_values([(rows, fitted(where, files.tensors[KEY], rows)), *head])


def _rows(part: Part) -> Tensor:
    return part.embedding if isinstance(part, PrefixEncoder) else part.weight


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
