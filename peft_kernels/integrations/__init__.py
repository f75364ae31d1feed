"""Other libraries' models on this package's kernels. Nothing is imported or patched before ``apply`` is called.

models.py            which libraries a model is of; apply, revert
report.py            what apply found, and what fell back since
class_swap.py        what swapping a class takes
hooks.py             what hooks on other libraries' modules need
file_readers.py      reading adapter files

peft.py              the names for users of PEFT
peft_layers.py       PEFT's LoRA layers: class swap, eligibility, the fused forward
peft_prompts.py      PEFT's prefix and prompt tuning models: class swap, eligibility, what replaces the repeated prompt
peft_prefixes.py     the same models' prefixes, and the hooks that carry them
peft_adapter.py      the two files of a PEFT adapter
peft_lora_files.py   LoRA files for models built from FusedLoRALinear
peft_prompt_files.py prefix and prompt files for PrefixEncoder and PromptEmbedding

adapterhub.py        the names for users of AdapterHub
adapterhub_layers.py AdapterHub's bottlenecks: class swap, eligibility, the fused forward
adapterhub_deferred.py, adapterhub_rules.py  results that are made when they are read; the reasons for fallbacks
adapterhub_files.py  AdapterHub's adapter files for models with SerialAdapter and ParallelAdapter
adapterhub_activations.py  AdapterHub's names for activations

transformers.py      the names for users of transformers: prefixes and prompts on its models, a callback for its Trainer
prefix_state.py      the prefixes of a call, and a cache that counts them without holding them
prefix_interface.py  the attention function and its mask function
prefix_model.py      which models can carry prefixes, and the hooks that bring them
prompt_model.py      the hooks that put a prompt in front of the embeddings
"""

from __future__ import annotations

import importlib
from types import ModuleType

from peft_kernels.integrations.models import apply, revert
from peft_kernels.integrations.report import Report

__all__ = ["Report", "apply", "revert"]

_LAZY = ("adapterhub", "peft", "transformers")


def __getattr__(name: str) -> ModuleType:
    if name in _LAZY:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
