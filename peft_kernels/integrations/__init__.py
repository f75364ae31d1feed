"""Other libraries' models on this package's kernels. Nothing is imported or patched before ``apply`` is called.

apply.py          which library a model is of; apply, revert
report.py         what apply found, and what fell back since
peft.py           the names for users of PEFT
peft_layers.py    PEFT's LoRA layers: class swap, eligibility, the fused forward
peft_files.py     PEFT's adapter files for models built from FusedLoRALinear
adapterhub*.py    the same for AdapterHub: names for users, layers (with activations and deferred results), files
class_swap.py     what swapping a class takes
file_readers.py   reading adapter files
transformers.py   a callback for transformers' Trainer and what derives from it
"""

from __future__ import annotations

import importlib
from types import ModuleType

from peft_kernels.integrations.apply import apply, revert
from peft_kernels.integrations.report import Report

__all__ = ["Report", "apply", "revert"]

_LAZY = ("adapterhub", "peft", "transformers")


def __getattr__(name: str) -> ModuleType:
    if name in _LAZY:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
