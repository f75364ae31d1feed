"""Fused kernels for parameter-efficient fine-tuning. One import line per family; importing does nothing else."""

import sys as _sys
from typing import TYPE_CHECKING as _TYPE_CHECKING

if _TYPE_CHECKING:
    from peft_kernels.integrations.peft.bank import AdapterBank

try:
    # In order, but that _core is the first, which says so where torch is too old.
    from peft_kernels._core.dispatch import use_backend  # noqa: I001
    from peft_kernels._core.errors import UnsupportedError
    from peft_kernels._core.explain import explain
    from peft_kernels._core.invariance import use_row_invariant
    from peft_kernels._core.rows import Rows
    from peft_kernels.adapter import ParallelAdapter, SerialAdapter, bottleneck_adapter, insert_adapters
    from peft_kernels.integrations import apply, mixed_batch, revert
    from peft_kernels.lora import (
        FusedLoRALinear,
        Member,
        add_adapter,
        delete_adapter,
        disable_adapters,
        dora_gain,
        enable_adapters,
        inject_lora,
        lora_group,
        lora_linear,
        lora_linear_dropout_mask,
        lora_parameters,
        lora_state_dict,
        lora_update,
        set_adapter,
        set_scale,
    )
    from peft_kernels.prefix import PrefixEncoder, prefix_attention
    from peft_kernels.prompt import PromptEmbedding, PromptEnsemble, prompt_tuning
    from peft_kernels import four_bit_weight as four_bit
except Exception as error:
    # `python -m peft_kernels.info` imports this file first, and is there to say what is broken.
    if _sys.argv[:1] != ["-m"] or "peft_kernels.info" not in (each.removeprefix("-m") for each in _sys.orig_argv):
        raise
    _import_error = error

__version__ = "0.1.0"

__all__ = [
    "AdapterBank",
    "FusedLoRALinear",
    "Member",
    "ParallelAdapter",
    "PrefixEncoder",
    "PromptEmbedding",
    "PromptEnsemble",
    "Rows",
    "SerialAdapter",
    "UnsupportedError",
    "add_adapter",
    "apply",
    "bottleneck_adapter",
    "delete_adapter",
    "disable_adapters",
    "dora_gain",
    "enable_adapters",
    "explain",
    "four_bit",
    "inject_lora",
    "insert_adapters",
    "lora_group",
    "lora_linear",
    "lora_linear_dropout_mask",
    "lora_parameters",
    "lora_state_dict",
    "lora_update",
    "mixed_batch",
    "prefix_attention",
    "prompt_tuning",
    "revert",
    "set_adapter",
    "set_scale",
    "use_backend",
    "use_row_invariant",
]


def __getattr__(name: str) -> object:
    # It stands on the room of one library, which nothing else here needs.
    if name == "AdapterBank":
        from peft_kernels.integrations.peft.bank import AdapterBank

        return AdapterBank
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
