"""Other libraries' models on this package's kernels. Nothing is imported or patched before ``apply`` is called.

peft/, adapterhub/, transformers/   what concerns one library, and the names for its users
apply_revert.py                     which libraries a model is of; apply, revert
mixed_batches.py                    mixed_batch
report.py                           what apply found, and what fell back since
kept.py                             base weights of before a merge, kept beside the layers
rules.py                            the reasons for fallbacks, and docs/integrations.md's tables of them
sites.py                            what is swapped as one, and the swap itself
versions.py                         the oldest releases of other libraries
calls.py                            calls that no fused layer takes, whatever library it is of
faster.py                           whether a library's own forward is faster here
hooks.py                            what others put on a library's modules: hooks, other methods
adapter_files.py                    reading and writing other libraries' adapter folders

Imports: shared files <- transformers/ <- peft/, and shared files <- adapterhub/. PEFT's prefixes run on transformers'.
"""

from __future__ import annotations

import importlib
from types import ModuleType

from peft_kernels.integrations.apply_revert import apply, revert
from peft_kernels.integrations.mixed_batches import mixed_batch
from peft_kernels.integrations.report import Report

__all__ = ["Report", "apply", "mixed_batch", "revert"]

_LAZY = ("adapterhub", "peft", "transformers")


def __getattr__(name: str) -> ModuleType:
    if name in _LAZY:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
