"""What a family hands to the harness. A module of this package that defines ``FAMILY`` is found by ``discover``."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Mode = Literal["forward", "backward", "both"]
Role = Literal["limit", "baseline", "ours"]


@dataclass(frozen=True)
class Grid:
    """Which problems are asked for: a CPU gets smaller ones, ``quick`` a few of each."""

    device_type: str
    quick: bool


@dataclass(frozen=True)
class Work:
    """The least that a problem can cost: each input read once, each output written once, and the arithmetic."""

    bytes: int
    flops: int


@dataclass(frozen=True)
class Call:
    """One provider on one set of inputs.

    Attributes:
        apply: computes the output, or all of several; records a graph where gradients are enabled.
        wrt: the tensors whose gradients a training step needs; none where there is no other mode than "forward".
        dy: gradient of the output, or of each.
    """

    apply: Callable[[], Tensor | tuple[Tensor, ...]]
    wrt: tuple[Tensor, ...]
    dy: Tensor | tuple[Tensor, ...]


@dataclass(frozen=True)
class Provider:
    """One way to compute the family's operation.

    Attributes:
        name: as recorded.
        role: "limit" is the time that no provider should be expected to beat, "baseline" what users have without it.
        why_not: (problem, device) -> reason why it is not timed, or None.
        make: (problem, inputs) -> Call.
        refusals: exceptions of its first call that mean "cannot run this problem".
    """

    name: str
    role: Role
    why_not: Callable[[Any, torch.device], str | None]
    make: Callable[[Any, Any], Call]
    refusals: tuple[type[Exception], ...] = ()


@dataclass(frozen=True)
class Family:
    """One operator of a kernel family.

    Attributes:
        name: letter for letter the public function's.
        problems: grid -> frozen dataclasses of numbers and strings, the most telling ones first.
        modes: problem -> what is timed.
        make_inputs: (problem, device, seed) -> random inputs.
        input_bytes: problem -> size of one set of inputs, the gradient of the output included.
        work: (problem, mode, provider) -> the least that it must do.
        dtype: problem -> the dtype whose matrix product rate bounds it.
        providers: in the order of the tables' columns.
        summarize_by: fields of a problem by which the tables sum up.
        checker: (problem, inputs) -> a function that takes a provider, raises AssertionError where its results are
            wrong, and returns their errors against the float64 oracle by tensor, None where there is none.
    """

    name: str
    problems: Callable[[Grid], list[Any]]
    modes: Callable[[Any], tuple[Mode, ...]]
    make_inputs: Callable[[Any, torch.device, int], Any]
    input_bytes: Callable[[Any], int]
    work: Callable[[Any, Mode, Provider], Work]
    dtype: Callable[[Any], torch.dtype]
    providers: tuple[Provider, ...]
    summarize_by: tuple[str, ...]
    checker: Callable[[Any, Any], Callable[[Provider], Mapping[str, float | None]]]

    def names(self, *roles: Role) -> list[str]:
        """Names of the providers with these roles, in the order of the tables' columns."""
        return [provider.name for provider in self.providers if provider.role in roles]


def discover() -> dict[str, Family]:
    """Import this package's modules and collect their ``FAMILY``, by name."""
    import benchmarks

    found: dict[str, Family] = {}
    for module in pkgutil.iter_modules(benchmarks.__path__):
        if module.name == "__main__" or module.name.startswith("test_"):
            continue
        family = getattr(importlib.import_module(f"benchmarks.{module.name}"), "FAMILY", None)
        if family is not None:
            found[family.name] = family
    return found
