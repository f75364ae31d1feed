"""Who computes the masks of the torch backend: on a GPU a kernel that this machine has found right, or torch.

The kernels are checked as the torch backend that runs on them, which op.py has beside the operator's implementations.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache

import torch
from torch import Tensor

from peft_kernels._core import cuda_tools, dispatch, records, verdicts
from peft_kernels.lora import qualification
from peft_kernels.lora.kernels import dropout, masks
from peft_kernels.lora.kernels.dropout import Rows
from peft_kernels.lora.kernels.masks import Mask

# By the names under which a machine's record has them.
KERNELS: dict[str, type[Mask]] = {"triton masks": masks.TritonMask, "cuda masks": masks.ByteMask}
_NAMES = {kind: name for name, kind in KERNELS.items()}

_bound: ContextVar[type[Mask] | None] = ContextVar("peft_kernels_mask", default=None)


def mask_of(part: Rows, device: torch.device) -> Mask:
    """The mask of some rows by the best that is right here."""
    return (provider(device) if masks.has_memory(part.seed) else masks.TorchMask)(part)


def provider(device: torch.device) -> type[Mask]:
    """Who computes masks for tensors with memory on a device."""
    if device.type == "cpu":
        return masks.kinds(device)[0]
    bound = _bound.get()
    if bound is not None:
        return bound
    # While a CUDA graph is captured nothing is found out, and what is unknown then may be known later.
    find = _provider.__wrapped__ if cuda_tools.is_capturing(device) else _provider
    return find(device, dispatch.generation)


@lru_cache(maxsize=64)
def _provider(device: torch.device, generation: int) -> type[Mask]:
    return next(kind for kind in masks.kinds(device) if _why_not(kind, device) is None)


def _why_not(kind: type[Mask], device: torch.device) -> str | None:
    """Reason why a kind of masks is not known to be right on a device, or None; may start a check and wait for it."""
    name = _NAMES.get(kind)
    if name is None:
        return None
    wanted = [verdicts.wanted_of(name, qualification.MASKS, part) for part in qualification.MASKS.parts]
    return verdicts.why_not_parts(records.signature(device), wanted, device)


@contextmanager
def bound_to(kind: type[Mask]) -> Iterator[None]:
    """Have a kind compute all masks on GPUs inside a ``with`` block, whether it is right or not."""
    token = _bound.set(kind)
    try:
        yield
    finally:
        _bound.reset(token)


def lora_linear_dropout_mask(
    seed: int | Tensor, rows: int, cols: int, p: float, device: torch.device | str = "cpu", lane: int = 0
) -> Tensor:
    """Return the keep-mask that ``lora_linear`` uses for a seed, on every backend, or another lane's of that seed.

    Semantics: ``drop(x) = where(mask, x, 0) / (1 - q)`` with ``q = round(p * 65536) / 65536``.

    Args:
        seed: int, or 0-d int64 tensor.
        rows, cols: M and K of the flattened x.
        p: dropout probability in [0, 1).
        device: where the mask is made.
        lane: int in 0 ... 2^32 - 1; ``lora_linear`` is lane 0.

    Returns:
        (rows, cols) bool tensor, True where the element is kept.

    Raises:
        ValueError: p outside [0, 1), a seed that is no 64-bit integer, a lane that is no 32-bit unsigned integer, a
            negative size.

    Example:
        >>> lora_linear_dropout_mask(seed=0, rows=2, cols=3, p=0.0)
        tensor([[True, True, True],
                [True, True, True]])
    """
    if rows < 0 or cols < 0:
        raise ValueError(f"lora_linear_dropout_mask: rows and cols must not be negative, got ({rows}, {cols})")
    limit, lane = dropout.threshold(p), dropout.as_lane(lane)
    seed_tensor = dropout.as_seed(seed, torch.device(device)).to(device)
    if not masks.has_memory(seed_tensor):
        return dropout.keep_mask(seed_tensor, rows, cols, limit, lane)
    return provider(seed_tensor.device)(Rows(seed_tensor, 0, rows, cols, limit, lane)).keep()
