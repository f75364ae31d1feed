"""Base weights as they were before a merge, kept beside the layers until they are put back.

Beside the layers, not on them: they stay what their library made them, for pickling and for revert. What is kept goes
when its layer does. Nothing writes to it, so copies of a layer share it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from peft_kernels.integrations.calls import is_plain

KeepBase = Literal["device", "host", False]
# Temporaries of a fingerprint have so many elements.
_CHUNK = 1 << 22


@dataclass(frozen=True)
class Fingerprint:
    """What tells a tensor's bits from others, wherever it lies: a sum of its 16-bit words modulo 2^64.

    Each word is multiplied by a random number of its row and one of its column, so that a change goes unnoticed by a
    chance of about 2^-48, whether an operation made it, ``.data``, or another tensor on the same memory.
    """

    dtype: torch.dtype
    shape: torch.Size
    total: int


@dataclass(frozen=True)
class Kept:
    """What a layer's merge left behind.

    Attributes:
        adapters: that are merged, in the order of their merges.
        originals: base tensors before the first merge, by their names.
        merged: fingerprints of the same tensors after the last one.
        where: the choice under which they were kept.
    """

    adapters: tuple[str, ...]
    originals: Mapping[str, Tensor]
    merged: Mapping[str, Fingerprint | None]
    where: KeepBase

    def is_of(self, adapters: list[str], tensors: Mapping[str, Tensor | None]) -> bool:
        """Whether these adapters are merged, and the tensors are as the merge left them."""
        return tuple(adapters) == self.adapters and all(
            mark is not None and fingerprint(tensors.get(name)) == mark for name, mark in self.merged.items()
        )


_kept: WeakKeyDictionary[nn.Module, Kept] = WeakKeyDictionary()
_chosen: WeakKeyDictionary[nn.Module, KeepBase] = WeakKeyDictionary()


def check_choice(caller: str, where: object) -> None:
    """Raise a ValueError unless ``where`` is a choice or None."""
    if where is not None and where is not False and (not isinstance(where, str) or where not in ("device", "host")):
        raise ValueError(f'{caller}: keep_base must be "device", "host" or False, got {where!r}')


def choose(module: nn.Module, where: KeepBase | None) -> None:
    """Say where the module's next merge keeps its weights; None leaves it as it is, at first "device"."""
    if where is not None:
        _chosen[module] = where


def chosen(module: nn.Module) -> KeepBase:
    """Where the module's merges keep its weights."""
    return _chosen.get(module, "device")


def of(module: nn.Module) -> Kept | None:
    """What is kept of the module."""
    return _kept.get(module)


def put(module: nn.Module, kept: Kept) -> None:
    """Keep it, in the place of what was kept before."""
    _kept[module] = kept


def drop(module: nn.Module) -> None:
    """Keep nothing of the module any more."""
    _kept.pop(module, None)


def forget(module: nn.Module) -> None:
    """Drop what is kept, and the choice."""
    drop(module)
    _chosen.pop(module, None)


def share(module: nn.Module, other: nn.Module, *, is_copied: bool) -> None:
    """Let a copy of a module have its choice and, where the base weight is a copy too, what is kept."""
    if module in _chosen:
        _chosen[other] = _chosen[module]
    if is_copied and module in _kept:
        _kept[other] = _kept[module]


def follow(module: nn.Module, weight: Tensor | None) -> None:
    """Bring what is kept on the weight's device to where that is now; drop it where a weight has no memory."""
    kept = _kept.get(module)
    if kept is None or weight is None:
        return
    if weight.is_meta:
        drop(module)
    elif kept.where == "device":
        _kept[module] = replace(
            kept, originals={name: original.to(weight.device) for name, original in kept.originals.items()}
        )


@torch.no_grad()
def copied(tensor: Tensor, where: KeepBase) -> Tensor:
    """A copy beside the tensor, or on the host; in pinned memory where the tensor is a GPU's."""
    if where == "device":
        return tensor.detach().clone()
    copy = torch.empty_like(tensor, device="cpu", requires_grad=False, pin_memory=tensor.is_cuda)
    return copy.copy_(tensor)


@torch.no_grad()
def fingerprint(tensor: Tensor | None) -> Fingerprint | None:
    """The fingerprint of a floating tensor of one or two dimensions; None where no plain bits are to be read."""
    if tensor is None or not is_plain(tensor) or tensor.is_meta:
        return None
    table = torch.atleast_2d(tensor.detach())
    rows, words = table.shape[0], table.shape[1] * table.element_size() // 2
    of_rows, of_words = _multipliers(rows, 0, table.device), _multipliers(words, 1, table.device)
    total = torch.zeros((), dtype=torch.int64, device=table.device)
    step = max(1, _CHUNK // max(words, 1))
    for start in range(0, rows if words else 0, step):
        part = table[start : start + step].contiguous().view(torch.int16).to(torch.int64)
        total += part.mul_(of_words).sum(1).mul_(of_rows[start : start + step]).sum()
    return Fingerprint(tensor.dtype, tensor.shape, int(total))


def _multipliers(count: int, seed: int, device: torch.device) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    drawn = torch.randint(-(1 << 63), (1 << 63) - 1, (count,), generator=generator, device="cpu", dtype=torch.int64)
    return drawn.to(device)
