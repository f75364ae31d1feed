"""What may run a call: implementations on each of their paths, and a library's own forward; and which of them does.

timing.py decides between them by the clock. Here a call becomes something to time, and its problem a class of shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peft_kernels._core import records, timing
from peft_kernels._core.dispatch import Implementation
from peft_kernels._core.explain import note
from peft_kernels._core.timing import ShapeClass

LIBRARY = "library"
"""The name of a library's own forward among the candidates."""


class Library(NamedTuple):
    """A library's own way to what a call computes.

    Attributes:
        name: of what it is, with its version's facts if they matter: calls with another library are timed apart.
        run: x -> y, with autograd as it is enabled.
        parameters: of what gets a gradient beside x.
    """

    name: str
    run: Callable[[Tensor], Tensor]
    parameters: Callable[[], Sequence[Tensor]]


class Recorded:
    """Winners on the record of a device."""

    def __init__(self, device: torch.device) -> None:
        self.machine = records.signature(device)

    def read(self) -> Mapping[str, str]:
        return records.read(self.machine).winners

    def add(self, key: str, winner: str) -> None:
        records.update(self.machine, "winners", {key: winner}, keep=True)


def fastest(
    operator: Any, problem: Any, call: Any, able: Sequence[Implementation], library: Library | None = None
) -> Implementation | None:
    """Choose by the clock among all that may run a call.

    Args:
        operator: an ``Operator``.
        problem, call: as the operator describes them.
        able: implementations that are right for the problem, the first guess first.
        library: the library's own forward, where a layer of it is called.

    Returns:
        The implementation; None for the library.
    """
    device, has_gradients = problem.device, torch.is_grad_enabled()
    runs: dict[str, Callable[[], object]] = {
        each.title: _runner(operator, problem, call, each, has_gradients) for each in able
    }
    if library is not None:
        runs[LIBRARY] = _library_runner(library, call[0], has_gradients)
    why_not = timing.why_not_timed(device, _bytes_of(operator, problem, call, able[0], has_gradients))
    shapes = shape_class(operator, problem, call, has_gradients, library)
    name = timing.fastest(shapes, runs, Recorded(device), why_not, timing.EventClock())
    note(lambda: f"  fastest of {', '.join(runs)}: {name}{'' if why_not is None else f' (not timed now: {why_not})'}")
    return next((each for each in able if each.title == name), None)


def shape_class(operator: Any, problem: Any, call: Any, has_gradients: bool, library: Library | None) -> ShapeClass:
    """The class of a call: all that its problem says, with the sizes that change from call to call rounded up."""
    facts = {each.name: getattr(problem, each.name) for each in fields(problem) if each.name != "device"}
    rows = [facts.pop(name) for name in operator.varying]
    needed = [
        name for name, value in zip(call._fields, call, strict=True) if has_gradients and _requires_gradient(value)
    ]
    words = [operator.name, *(f"{name}={str(value).removeprefix('torch.')}" for name, value in facts.items())]
    words += [f"gradients={','.join(needed) or 'none'}"] + ([] if library is None else [f"library={library.name}"])
    return ShapeClass.of(" ".join(words), *rows)


def _runner(
    operator: Any, problem: Any, call: Any, implementation: Implementation, has_gradients: bool
) -> Callable[[], object]:
    lengths, *leaves = operator.signature.leaves(call)
    asked = operator.asked(tuple(has_gradients and _requires_gradient(leaf) for leaf in leaves), lengths)

    def run() -> None:
        with torch.no_grad():
            results = operator.fresh(problem, call, implementation)
            if any(operator.signature.spread(asked.needs)):
                # Of dy only the shape costs time, and y is there already.
                dy, kept = operator.visible(results), operator.keeps(results, asked.reads)
                operator.differentiate(problem, call, kept, dy, asked.needs, implementation)

    return run


def _library_runner(library: Library, x: Tensor, has_gradients: bool) -> Callable[[], object]:
    def run() -> None:
        # Its dropout draws from the generators, which are the caller's.
        devices = [x.device] if x.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            given = x.detach().requires_grad_(has_gradients and x.requires_grad)
            y = library.run(given)
            asked = [tensor for tensor in (given, *library.parameters()) if tensor.requires_grad]
            if has_gradients and asked and y.requires_grad:
                # Gradients are returned and dropped: none is added to a parameter's.
                torch.autograd.grad(y, asked, y.detach(), allow_unused=True)

    return run


def _bytes_of(operator: Any, problem: Any, call: Any, implementation: Implementation, has_gradients: bool) -> int:
    """About what a call allocates: its results, as much again on the way, and its gradients."""
    lengths, *leaves = operator.signature.leaves(call)
    on_meta = [leaf.to("meta") if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    results = operator.results(problem, operator.signature.from_leaves(lengths, on_meta), implementation)
    made = sum(_bytes(each) for each in operator.signature.spread(results))
    return 2 * made + sum(_bytes(leaf) for leaf in leaves if has_gradients and _requires_gradient(leaf))


def _bytes(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.numel() * tensor.element_size()


def _requires_gradient(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad
