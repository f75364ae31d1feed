"""Numbers of an adapter for each slot: scales on the device, and where the ranks of stacked factors begin."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from peft_kernels._core import checks
from peft_kernels._core.plans import is_seen_into

Scales = float | Sequence[float] | Tensor


def scales_of(operator: str, scale: object, slots: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the scale of each slot, (T,) on the device.

    Args:
        operator: name for messages.
        scale: a float or 0-d tensor for all slots, a sequence of a float for each, or a floating tensor (T,), which the
            host does not read.

    Raises:
        ValueError: it is none of them, or there are not as many as slots.
    """
    if isinstance(scale, Tensor):
        given = scale.expand(slots) if scale.dim() == 0 else scale
        if given.shape != (slots,) or not given.is_floating_point():
            got = f"{scale.dtype} {tuple(scale.shape)}"
            raise ValueError(
                f"{operator}: scale must be a float, or a floating one for each slot, ({slots},), got {got}"
            )
        return given.detach().to(device, dtype)
    if isinstance(scale, (list, tuple)):
        if len(scale) != slots:
            raise ValueError(f"{operator}: scale must be a float, or one for each slot, ({slots},), got {len(scale)}")
        values = tuple([float(each) for each in scale])
    else:
        checks.scalar(operator, "scale", scale)
        values = (float(scale),) * slots  # type: ignore[arg-type]
    return tensor_of((values,), dtype, device)[0]


def check_ranks(operator: str, ranks: object, owner: str, total: int) -> tuple[int, ...]:
    """The rank of each slot, once it is seen that they add up to the rows of ``owner``.

    Raises:
        ValueError: they are no ints of at least 0, or do not add up.
    """
    if not isinstance(ranks, Sequence) or any(
        isinstance(rank, bool) or not isinstance(rank, int) or rank < 0 for rank in ranks
    ):
        raise ValueError(f"{operator}: with rows, ranks must be a sequence of ints of at least 0, got {ranks!r}")
    found = tuple(ranks)
    if sum(found) != total:
        raise ValueError(f"{operator}: ranks must add up to {owner}'s rows, {total}, got {sum(found)} of {found}")
    return found


def table_of(ranks: tuple[int, ...], device: torch.device) -> Tensor:
    """(2, T) int32 on the device: the first row of stacked factors, and the rank, of each slot."""
    return tensor_of((firsts_of(ranks), ranks), torch.int32, device)


def firsts_of(ranks: tuple[int, ...]) -> tuple[int, ...]:
    """The first row of stacked factors of each slot."""
    return tuple([sum(ranks[:slot]) for slot in range(len(ranks))])


def tensor_of(values: tuple[tuple[float, ...], ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A matrix of these rows, on the device, which nobody changes: the same one where the values are the same."""
    return (_tensor if _is_traced() else _kept_tensor)(values, dtype, device)


def _is_traced() -> bool:
    # What is made there belongs to the trace, the transform or the mode, and serves no call outside of it.
    return torch.compiler.is_compiling() or is_seen_into()


def _tensor(values: tuple[tuple[float, ...], ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=device)


@lru_cache(maxsize=4096)
def _kept_tensor(values: tuple[tuple[float, ...], ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    # What inference mode makes, no backward pass may keep.
    with torch.inference_mode(False):
        return _tensor(values, dtype, device)
