"""What ``apply`` did to a model: what is fused, what is not and why, and which calls fell back since."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn

from peft_kernels._core.explain import note

# Calls that a fused layer handed to its library's own code, by layer and reason. Beside the layers, not on them:
# they stay what their library made them, for pickling and for revert.
_fallen_back: WeakKeyDictionary[nn.Module, Counter[str]] = WeakKeyDictionary()


class Grouped(NamedTuple):
    """A module whose layers may be groups, by its name, and what they share: ``formed()`` and ``dissolved``."""

    parent: str
    siblings: Any

    def groups(self) -> Iterator[tuple[str, ...]]:
        """Those that there are."""
        yield from map(self._full, self.siblings.formed())

    def dissolved(self) -> Iterator[tuple[str, ...]]:
        """Those that there were."""
        yield from map(self._full, self.siblings.dissolved)

    def _full(self, names: Sequence[str]) -> tuple[str, ...]:
        return tuple(f"{self.parent}.{name}" if self.parent else name for name in names)


@dataclass(frozen=True)
class Report:
    """The answer of ``apply``.

    Attributes:
        fused: names of the modules that now run on this package's kernels.
        fallbacks: name of each module of a known kind that does not, as things stand, and the reason. One that is in a
            state for it (merged, disabled, on several devices) runs on the kernels as soon as it is out of it.
        unused: names of modules none of whose adapters is active; they run on the kernels as soon as one is.
        grouped: modules whose layers may be groups.
    """

    fused: tuple[str, ...]
    fallbacks: dict[str, str]
    unused: tuple[str, ...] = ()
    _modules: tuple[nn.Module, ...] = field(default=(), repr=False, compare=False)
    grouped: tuple[Grouped, ...] = field(default=(), repr=False, compare=False)

    @property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """Names of the layers of each group, in the order of their calls; those found since ``apply`` too."""
        return tuple(group for each in self.grouped for group in each.groups())

    @property
    def dissolved(self) -> tuple[tuple[str, ...], ...]:
        """The same of groups whose members did not take what was made for them, and that are none any more."""
        return tuple(group for each in self.grouped for group in each.dissolved())

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
        for kind, groups in (("groups", self.groups), ("groups dissolved", self.dissolved)):
            if groups:
                lines.append(f"  {len(groups)} {kind} ({_shortened(_counted(groups))})")
        for reason, names in _by_reason(self.fallbacks).items():
            lines.append(f"  {len(names)} not fused: {reason} ({_shortened(names)})")
        for reason, count in self.fallback_calls.most_common():
            lines.append(f"  {count} calls fell back: {reason}")
        return "\n".join(lines)


def count_fallback(module: nn.Module, reason: str) -> None:
    """Remember that a fused module ran its library's code; a compiled graph is not made to remember."""
    if not torch.compiler.is_dynamo_compiling():
        counts = _fallen_back.get(module)
        if counts is None:
            counts = _fallen_back[module] = Counter()
        counts[reason] += 1
        note(lambda: f"{type(module).__name__}: its library's own code\n  peft_kernels: {reason}")


def forget(module: nn.Module) -> None:
    """Drop what is remembered of a module."""
    _fallen_back.pop(module, None)


def _by_reason(fallbacks: dict[str, str]) -> dict[str, list[str]]:
    grouped: dict[str, list[str]] = {}
    for name, reason in fallbacks.items():
        grouped.setdefault(reason, []).append(name)
    return grouped


def _counted(groups: Sequence[tuple[str, ...]]) -> list[str]:
    """The layers' own names, of groups that have the same once."""
    counts = Counter(" + ".join(name.rpartition(".")[2] for name in group) for group in groups)
    return [f"{names}: {count}" for names, count in counts.items()]


def _shortened(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
