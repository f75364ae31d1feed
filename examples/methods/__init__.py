"""Ways to fine-tune the encoder. One file each, with one record named METHOD; a new file is a new method."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

PutOn = Callable[[nn.Module], nn.Module]
Change = Callable[[nn.Module], None]


@dataclass(frozen=True)
class Serving:
    """What a trained encoder is turned into when it is only used.

    Attributes:
        name: how the table calls it.
        change: turns the encoder into it, in place.
        exact: whether the answers keep their bits; else they may move by a rounding.
        undo: turns it back, to the bits that it had; None where what was trained is given up.
    """

    name: str
    change: Change
    exact: bool
    undo: Change | None = None


@dataclass(frozen=True)
class Method:
    """What the demo has to know about a method.

    Attributes:
        name: how the table calls it.
        settings: what was chosen, for the reader of the report.
        learning_rate: peak of the schedule.
        unfused: makes an encoder trainable with the usual library, or with torch alone, and returns what to call;
            what it leaves with ``requires_grad`` is trained.
        unfused_by: who made that layer.
        fused: the same with this package, from torch's generator; None where the package has nothing to fuse.
        copy_start: gives the second (unfused) encoder the trainable values of the first (fused) one.
        serving: what the fused encoder becomes after training; None where it stays as it is.
    """

    name: str
    settings: Mapping[str, object]
    learning_rate: float
    unfused: PutOn
    unfused_by: str
    fused: PutOn | None = None
    copy_start: Callable[[nn.Module, nn.Module], None] | None = None
    serving: Serving | None = None


def names() -> list[str]:
    """The names of this folder's files, in their order."""
    return sorted(found.name for found in pkgutil.iter_modules(__path__))


def discover(chosen: Sequence[str] | None = None) -> list[Method]:
    """Collect the METHOD of every file in this folder, or of those chosen, in the order of the files' names."""
    return [
        importlib.import_module(f"{__name__}.{name}").METHOD for name in names() if chosen is None or name in chosen
    ]
