"""What ``apply`` did to a model: what is fused, what is not and why, and which calls fell back since."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
from torch import nn

from peft_kernels._core.explain import note

# Calls that a fused layer handed to its library's own code, by layer and reason. Beside the layers, not on them:
# they stay what their library made them, for pickling and for revert.
_fallen_back: WeakKeyDictionary[nn.Module, Counter[str]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Report:
    """The answer of ``apply``.

    Attributes:
        fused: names of the modules that now run on this package's kernels.
        fallbacks: name of each module of a known kind that does not, as things stand, and the reason. One that is in a
            state for it (merged, disabled, on several devices) runs on the kernels as soon as it is out of it.
        unused: names of modules none of whose adapters is active; they run on the kernels as soon as one is.
    """

    fused: tuple[str, ...]
    fallbacks: dict[str, str]
    unused: tuple[str, ...] = ()
    _modules: tuple[nn.Module, ...] = field(default=(), repr=False, compare=False)

    @property
    def fallback_calls(self) -> Counter[str]:
        """Calls of fused modules, merges too, that ran their library's own code after all; none while compiling."""
        total: Counter[str] = Counter()
        for module in self._modules:
            total += _fallen_back.get(module, Counter())
        return total

    def __str__(self) -> str:
        lines = [f"peft_kernels: {len(self.fused)} modules fused, {len(self.fallbacks)} not"]
        if self.unused:
            lines.append(f"  {len(self.unused)} without an active adapter ({_shortened(self.unused)})")
        for reason, names in _by_reason(self.fallbacks).items():
            lines.append(f"  {len(names)} not fused: {reason} ({_shortened(names)})")
        for reason, count in self.fallback_calls.most_common():
            lines.append(f"  {count} calls fell back: {reason}")
        return "\n".join(lines)


def count_fallback(module: nn.Module, reason: str) -> None:
    """Remember that a fused module ran its library's code; a compiled graph is not made to remember."""
    if not torch.compiler.is_dynamo_compiling():
        _fallen_back.setdefault(module, Counter())[reason] += 1
        note(lambda: f"{type(module).__name__}: its library's own code\n  peft_kernels: {reason}")


def forget(module: nn.Module) -> None:
    """Drop what is remembered of a module."""
    _fallen_back.pop(module, None)


def _by_reason(fallbacks: dict[str, str]) -> dict[str, list[str]]:
    grouped: dict[str, list[str]] = {}
    for name, reason in fallbacks.items():
        grouped.setdefault(reason, []).append(name)
    return grouped


def _shortened(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
