"""Fused kernels for parameter-efficient fine-tuning. One import line per family; importing does nothing else."""

from peft_kernels._core.dispatch import use_backend
from peft_kernels._core.errors import UnsupportedError
from peft_kernels._core.explain import explain
from peft_kernels.adapter import ParallelAdapter, SerialAdapter, bottleneck_adapter, insert_adapters
from peft_kernels.integrations import apply, revert
from peft_kernels.lora import (
    FusedLoRALinear,
    Member,
    inject_lora,
    lora_group,
    lora_linear,
    lora_linear_dropout_mask,
)
from peft_kernels.prefix import PrefixEncoder, prefix_attention
from peft_kernels.prompt import PromptEmbedding, PromptEnsemble, prompt_tuning

__version__ = "0.1.0"

__all__ = [
    "FusedLoRALinear",
    "Member",
    "ParallelAdapter",
    "PrefixEncoder",
    "PromptEmbedding",
    "PromptEnsemble",
    "SerialAdapter",
    "UnsupportedError",
    "apply",
    "bottleneck_adapter",
    "explain",
    "inject_lora",
    "insert_adapters",
    "lora_group",
    "lora_linear",
    "lora_linear_dropout_mask",
    "prefix_attention",
    "prompt_tuning",
    "revert",
    "use_backend",
]
