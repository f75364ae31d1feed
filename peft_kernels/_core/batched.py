"""Backward passes under vmap: is_grads_batched=True, jacobian(vectorize=True), or torch.func.vmap over autograd.grad.

A kernel, or an operation in place, takes no batch of gradients: the pass runs for one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch._C import _functorch

Gradients = Sequence[Tensor | None]
Run = Callable[[Gradients], Gradients]


def is_batched(dy: Gradients) -> bool:
    """Whether gradients of results are a batch of them."""
    return _functorch.peek_interpreter_stack() is not None or any(map(_is_legacy, dy))


def one_by_one(run: Run, dy: Gradients) -> Gradients:
    """Run a backward pass for each gradient of a batch, and batch what it returns."""
    if not any(map(_is_legacy, dy)):
        return _OneByOne.apply(run, *dy)
    # torch.autograd's own vmap, which knows no rule of a Function.
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    parts = [[each] if not _is_legacy(each) else torch._remove_batch_dim(each, level, 1, 0).unbind() for each in dy]
    size = max(map(len, parts))
    rows = ([part[i if len(part) > 1 else 0] for part in parts] for i in range(size))
    return [None if each is None else torch._add_batch_dim(each, 0, level) for each in _stacked(map(run, rows))]


def _is_legacy(tensor: Tensor | None) -> TypeGuard[Tensor]:
    return tensor is not None and _functorch.is_legacy_batchedtensor(tensor)


def _stacked(rows: Any) -> list[Tensor | None]:
    return [None if column[0] is None else torch.stack(column) for column in zip(*rows, strict=True)]


class _OneByOne(torch.autograd.Function):
    @staticmethod
    def forward(run: Run, *dy: Tensor | None) -> Any:
        return tuple(run(dy))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing is kept: a second derivative raises."""

    @staticmethod
    def vmap(info: Any, in_dims: Any, run: Run, *dy: Tensor | None) -> Any:
        """Return each result with a first dimension for the batch."""
        rows = (
            [x if x is None or dim is None else x.select(dim, i) for x, dim in zip(dy, in_dims[1:], strict=True)]
            for i in range(info.batch_size)
        )
        found = _stacked(_OneByOne.apply(run, *row) for row in rows)
        return tuple(found), tuple(None if each is None else 0 for each in found)
