"""What may run a call, and which of it does: implementations on each of their paths, or a library's own forward.

timing.py decides between them by the clock. Here a call becomes something to time, and its problem a class of shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from peft_kernels._core import dispatch, records, timing
from peft_kernels._core.dispatch import Implementation, able_backends
from peft_kernels._core.explain import note
from peft_kernels._core.timing import ShapeClass

OURS, LIBRARY = "peft_kernels", "library"
"""Names of the candidates for a library's layer."""

_read: dict[records.Signature, tuple[int, Mapping[str, str]]] = {}


class Recorded:
    """Winners on the record of a device; read once for each generation of choices, so that a plan costs no file."""

    def __init__(self, device: torch.device) -> None:
        self.machine = records.signature(device)

    def read(self, again: bool = False) -> Mapping[str, str]:
        generation, winners = _read.get(self.machine, (-1, {}))
        if again or generation != dispatch.generation:
            found = records.read(self.machine).winners
            winners = {key: name for key, name in found.items() if isinstance(name, str)}
            _read[self.machine] = dispatch.generation, winners
        return winners

    def add(self, key: str, winner: str) -> None:
        records.update(self.machine, "winners", {key: winner}, keep=True)


def fastest(operator: Any, problem: Any, call: Any) -> Implementation:
    """Choose an implementation by the clock, among all that are right for a problem on this machine.

    Args:
        operator: an ``Operator``.
        problem, call: as the operator describes them.
    """
    able = able_backends(operator.implementations, problem)
    runs = {each.title: _runner(operator, problem, call, each) for each in able}
    name = _decide(shape_class(operator, problem, call), runs, problem, call, operator)
    return next(each for each in able if each.title == name)


def is_library_faster(
    operator: Any,
    problem: Any,
    call: Any,
    library: str,
    runs: tuple[Callable[[Tensor], Any], Callable[[Tensor], Any]],
    parameters: Sequence[Tensor],
) -> bool:
    """Whether a library's own forward is faster than the operator at what a layer of it, or several, computes.

    Args:
        operator, problem, call: as above; the call's first argument is x.
        library: name of the layer's class, whose calls are a class of their own.
        runs: ours and the library's: x -> y or a tuple of such, with autograd as it is enabled.
        parameters: what the layer computes with, beside x.
    """
    ours, theirs = (_autograd_runner(run, call[0], parameters) for run in runs)
    shapes = shape_class(operator, problem, call, library)
    return _decide(shapes, {OURS: ours, LIBRARY: theirs}, problem, call, operator) == LIBRARY


def _decide(
    shapes: ShapeClass, runs: Mapping[str, Callable[[], object]], problem: Any, call: Any, operator: Any
) -> str:
    why_not = timing.why_not_timed(problem.device, _bytes_of(operator, problem, call))
    name = timing.fastest(shapes, runs, Recorded(problem.device), why_not, timing.clock_of(problem.device))
    how = "" if why_not is None else f" (not timed now: {why_not})"
    note(lambda: f"{operator.name}: {name} among {', '.join(runs)}{how}")
    return name


def shape_class(operator: Any, problem: Any, call: Any, library: str | None = None) -> ShapeClass:
    """The class of a call: all that its problem says, with the sizes that change from call to call rounded up."""
    facts = {each.name: getattr(problem, each.name) for each in fields(problem) if each.name != "device"}
    rows = [facts.pop(name) for name in operator.varying]
    needed = [name for name, value in zip(call._fields, call, strict=True) if _needs_gradient(value)]
    words = [operator.name, *(f"{name}={str(value).removeprefix('torch.')}" for name, value in facts.items())]
    words += [f"gradients={','.join(needed) or 'none'}"] + ([] if library is None else [f"library={library}"])
    return ShapeClass.of(" ".join(words), *rows)


def _runner(operator: Any, problem: Any, call: Any, implementation: Implementation) -> Callable[[], object]:
    """The operator's passes on one implementation, without autograd around them, which costs all of them the same."""
    lengths, *leaves = operator.signature.leaves(call)
    asked = operator.asked(tuple(map(_needs_gradient, leaves)), lengths)

    def run() -> None:
        with torch.no_grad():
            results = operator.fresh(problem, call, implementation)
            if any(operator.signature.spread(asked.needs)):
                # Of dy only the shape costs time, and y is there already.
                dy, kept = operator.visible(results), operator.keeps(results, asked.reads)
                operator.differentiate(problem, call, kept, dy, asked.needs, implementation)

    return run


def _autograd_runner(layer: Callable[[Tensor], Any], x: Tensor, parameters: Sequence[Tensor]) -> Callable[[], object]:
    """A layer's passes as the caller runs them, but for what is done with the gradients: they are dropped."""

    def run() -> None:
        # Dropout draws from generators, which are the caller's.
        devices = [x.device] if x.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            given = x.detach().requires_grad_(_needs_gradient(x))
            y = layer(given)
            made = [each for each in (y if isinstance(y, tuple) else (y,)) if each.requires_grad]
            asked = [each for each in (given, *parameters) if each.requires_grad]
            if made and asked:
                torch.autograd.grad(made, asked, [each.detach() for each in made], allow_unused=True)

    return run


def _bytes_of(operator: Any, problem: Any, call: Any) -> int:
    """About what a call allocates: its results, as much again on the way, and its gradients."""
    lengths, *leaves = operator.signature.leaves(call)
    on_meta = [leaf.to("meta") if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    on_meta_call = operator.signature.from_leaves(lengths, on_meta)
    results = operator.results(problem, on_meta_call, operator.implementations[0])
    made = sum(map(_bytes, operator.signature.spread(results)))
    return 2 * made + sum(_bytes(leaf) for leaf in leaves if _needs_gradient(leaf))


def _bytes(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.numel() * tensor.element_size()


def _needs_gradient(value: Any) -> bool:
    if isinstance(value, tuple):
        return any(map(_needs_gradient, value))
    return isinstance(value, Tensor) and value.requires_grad and torch.is_grad_enabled()
