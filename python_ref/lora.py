"""LoRA linear (Hu et al. 2021, arXiv:2106.09685, section 4.1): equations, their derivatives by hand, and eager torch.

    x' = where(mask, x, 0) / (1 - q)     inverted dropout on the low-rank branch's input, q the effective probability
    S  = x' A^T
    y  = x W^T + bias + s S B^T

x (..., K), W (N, K), A (r, K), B (N, r), bias (N,), y (..., N); sizes with leading dimensions are flattened to M rows.
A group is several such layers on one x, each with a mask of its own. With a gain g (N,), as DoRA has (Liu et al. 2024,
arXiv:2402.09353), y = g (x W^T + s S B^T) + bias. The derivations are in docs/design/lora.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_LEVELS = 1 << 16  # a decision is a 16-bit draw
_ROUNDS = 7
_WORD = 0xFFFFFFFF


class Gradients(NamedTuple):
    """Gradients of every input of ``forward``."""

    x: Tensor
    weight: Tensor
    lora_a: Tensor
    lora_b: Tensor
    bias: Tensor


def effective_dropout(p: float) -> float:
    """The probability that 16-bit draws realise for a requested one: the nearest multiple of 2^-16 below 1.

    Raises:
        ValueError: p is not in [0, 1).
    """
    return _threshold(p) / _LEVELS


def forward(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float | Tensor = 1.0,
    bias: Tensor | None = None,
    *,
    dropout_mask: Tensor | None = None,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Return y (..., N) and S (..., r), in the dtype of the arguments.

    Args:
        dropout_mask: bool (M, K), True where an element of the flattened x is kept; None drops nothing.
        dropout_p: requested probability, which fixes the factor of the kept elements.
    """
    s = _dropped(x, dropout_mask, dropout_p) @ lora_a.transpose(0, 1)
    y = x @ weight.transpose(0, 1) + scale * (s @ lora_b.transpose(0, 1))
    return (y if bias is None else y + bias), s


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float | Tensor = 1.0,
    *,
    dropout_mask: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Gradients:
    """Return the gradients of sum(dy * y); arguments as in ``forward``, dy (..., N)."""
    m = math.prod(x.shape[:-1])
    rows, flat_x = dy.reshape(m, weight.shape[0]), x.reshape(m, weight.shape[1])
    dropped = _dropped(flat_x, dropout_mask, dropout_p)
    s = dropped @ lora_a.transpose(0, 1)
    ds = scale * (rows @ lora_b)
    dx = rows @ weight + _dropped(ds @ lora_a, dropout_mask, dropout_p)
    return Gradients(
        x=dx.reshape(x.shape),
        weight=rows.transpose(0, 1) @ flat_x,
        lora_a=ds.transpose(0, 1) @ dropped,
        lora_b=scale * (rows.transpose(0, 1) @ s),
        bias=rows.sum(0),
    )


def eager(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float | Tensor = 1.0,
    bias: Tensor | None = None,
    *,
    dropout_mask: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """What PEFT's LoRA layer computes in the arguments' own dtypes, op by op; the yardstick of the error budget.

    x is cast to the adapters' dtype, and the sum back to the base product's. Arguments as in ``forward``.
    """
    result = F.linear(x, weight, bias)
    return eager_update(result, x, lora_a, lora_b, scale, dropout_mask=dropout_mask, dropout_p=dropout_p)


class UpdateGradients(NamedTuple):
    """Gradients of every input of ``update_forward``."""

    y: Tensor
    x: Tensor
    lora_a: Tensor
    lora_b: Tensor


def update_forward(
    y: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float | Tensor = 1.0,
    *,
    dropout_mask: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Return y + s S B^T (..., N), the update of what another layer made of x; arguments as in ``forward``."""
    s = _dropped(x, dropout_mask, dropout_p) @ lora_a.transpose(0, 1)
    return y + scale * (s @ lora_b.transpose(0, 1))


def update_backward(
    dy: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float | Tensor = 1.0,
    *,
    dropout_mask: Tensor | None = None,
    dropout_p: float = 0.0,
) -> UpdateGradients:
    """Return the gradients of sum(dy * (y + update)): those of ``backward`` where the frozen weight is zero."""
    nothing = x.new_zeros(lora_b.shape[0], lora_a.shape[1])
    found = backward(dy, x, nothing, lora_a, lora_b, scale, dropout_mask=dropout_mask, dropout_p=dropout_p)
    return UpdateGradients(dy, found.x, found.lora_a, found.lora_b)


def eager_update(
    y: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float | Tensor = 1.0,
    *,
    dropout_mask: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """What PEFT's LoRA layers add to their base layer's output, in the arguments' own dtypes; the sum has y's."""
    branch = x.to(lora_a.dtype)
    if dropout_mask is not None:
        # nn.Dropout on a CPU rounds the factor to the dtype before it multiplies; so does this, on every device.
        branch = branch * dropout_mask.reshape(x.shape).to(branch.dtype).div_(1.0 - effective_dropout(dropout_p))
    return (y + F.linear(F.linear(branch, lora_a), lora_b) * scale).to(y.dtype)


class GainGradients(NamedTuple):
    """Gradients of every input of ``gain_forward``."""

    x: Tensor
    weight: Tensor
    lora_a: Tensor
    lora_b: Tensor
    gain: Tensor
    bias: Tensor


def gain_forward(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    gain: Tensor,
    scale: float | Tensor = 1.0,
    bias: Tensor | None = None,
    **dropout: Any,
) -> Tensor:
    """Return y (..., N); gain (N,), other arguments as in ``forward``."""
    y = gain * forward(x, weight, lora_a, lora_b, scale, **dropout)[0]
    return y if bias is None else y + bias


def gain_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    gain: Tensor,
    scale: float | Tensor = 1.0,
    **dropout: Any,
) -> GainGradients:
    """Return the gradients of sum(dy * y): those of the layer without a gain for g * dy, and dg."""
    found = backward(gain * dy, x, weight, lora_a, lora_b, scale, **dropout)
    u = forward(x, weight, lora_a, lora_b, scale, **dropout)[0]
    n = weight.shape[0]
    rows = dy.reshape(-1, n) if n else dy.reshape(math.prod(dy.shape[:-1]), n)
    dg = (rows * u.reshape(rows.shape)).sum(0)
    return GainGradients(*found[:4], gain=dg, bias=rows.sum(0))


def eager_gain(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    gain: Tensor,
    scale: float | Tensor = 1.0,
    bias: Tensor | None = None,
    *,
    dropout_mask: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """PEFT's formulas of DoRA in the arguments' own dtypes, op by op: what it adds to its base layer's result.

    The base product is that of x, which PEFT has where nothing is dropped. Arguments as in ``gain_forward``.
    """
    result = F.linear(x, weight, bias)
    base = result if bias is None else result - bias
    branch = x.to(lora_a.dtype)
    if dropout_mask is not None:
        noise = dropout_mask.reshape(x.shape).to(branch.dtype).div_(1.0 - effective_dropout(dropout_p))
        branch = branch * noise
    update = F.linear(F.linear(branch, lora_a), lora_b)
    return (result + ((gain - 1) * base + gain * update * scale)).to(result.dtype)


class GainAloneGradients(NamedTuple):
    """Gradients of every input of ``gain_alone_forward``."""

    x: Tensor
    weight: Tensor
    gain: Tensor
    bias: Tensor


def gain_alone_forward(x: Tensor, weight: Tensor, gain: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return gain * (x W^T + bias) (..., N), as (IA)^3 has it (Liu et al. 2022, arXiv:2205.05638); gain (N,)."""
    y = x @ weight.t()
    return gain * (y if bias is None else y + bias)


def gain_alone_backward(
    dy: Tensor, x: Tensor, weight: Tensor, gain: Tensor, bias: Tensor | None = None
) -> GainAloneGradients:
    """Return the gradients of sum(dy * y)."""
    (n, k), m = weight.shape, math.prod(dy.shape[:-1])
    rows, flat = dy.reshape(m, n), x.reshape(m, k)
    product = flat @ weight.t() if bias is None else flat @ weight.t() + bias
    dp = rows * gain
    return GainAloneGradients((dp @ weight).view(x.shape), dp.t() @ flat, (rows * product).sum(0), dp.sum(0))


def eager_gain_alone(x: Tensor, weight: Tensor, gain: Tensor, bias: Tensor | None = None) -> Tensor:
    """PEFT's (IA)^3 in the arguments' own dtypes, op by op."""
    result = F.linear(x, weight, bias)
    return (result * gain).to(result.dtype)


def row_norms(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float | Tensor = 1.0) -> Tensor:
    """Return the norms (N,) of the rows of W + scale * B A: what DoRA divides its magnitudes by."""
    return torch.linalg.vector_norm(weight + scale * (lora_b @ lora_a), dim=1)


class Member(NamedTuple):
    """A layer of a group: what ``forward`` takes beside x; dropout_mask bool (M, K) or None."""

    weight: Tensor
    lora_a: Tensor
    lora_b: Tensor
    scale: float | Tensor = 1.0
    bias: Tensor | None = None
    dropout_mask: Tensor | None = None
    dropout_p: float = 0.0


def group_forward(x: Tensor, members: Sequence[Member]) -> list[Tensor]:
    """Return y_j (..., N_j) of each member, in the dtype of the arguments."""
    return [forward(x, *member[:5], **_dropout_of(member))[0] for member in members]


def group_backward(
    dys: Sequence[Tensor | None], x: Tensor, members: Sequence[Member]
) -> tuple[Tensor, list[Gradients | None]]:
    """Return the gradient of x of sum over j of sum(dy_j * y_j), and all of each member's; None where its dy is None.

    dX = [dY_1 | dY_2 | ...] [W_1; W_2; ...] + sum over j of drop'_j(dS_j A_j): the layers have x alone in common.
    """
    found = [
        None if dy is None else backward(dy, x, *member[:4], **_dropout_of(member))
        for dy, member in zip(dys, members, strict=True)
    ]
    there = [gradients.x for gradients in found if gradients is not None]
    return (torch.stack(there).sum(0) if there else torch.zeros_like(x)), found


def eager_group(x: Tensor, members: Sequence[Member]) -> list[Tensor]:
    """What PEFT's layers compute one after another in the arguments' own dtypes; autograd adds the gradients of x."""
    return [eager(x, *member[:5], **_dropout_of(member)) for member in members]


class Slot(NamedTuple):
    """An adapter that rows choose: its factors A (r, K), B (N, r); dropout_mask bool (M, K) of all rows, or None."""

    lora_a: Tensor
    lora_b: Tensor
    scale: float | Tensor = 1.0
    dropout_mask: Tensor | None = None
    dropout_p: float = 0.0


def rows_forward(
    x: Tensor, weight: Tensor, slots: Sequence[Slot], slot: Sequence[int], bias: Tensor | None = None
) -> Tensor:
    """Return y (M, N), row by row: row m has the update of slots[slot[m]], or none where slot[m] is -1.

    Args:
        x: (M, K). weight: (N, K). bias: (N,) or None.
    """
    y = x @ weight.transpose(0, 1) + (0 if bias is None else bias)
    rows = []
    for m, t in enumerate(slot):
        row = y[m]
        if t >= 0:
            lora_a, lora_b, scale, mask, p = slots[t]
            dropped = _dropped(x[m], None if mask is None else mask[m], p)
            row = row + scale * (lora_b @ (lora_a @ dropped))
        rows.append(row)
    return torch.stack(rows) if rows else y


class RowsGradients(NamedTuple):
    """Gradients of every input of ``rows_forward``; those of the factors for each slot."""

    x: Tensor
    weight: Tensor
    lora_a: list[Tensor]
    lora_b: list[Tensor]
    bias: Tensor


def rows_backward(dy: Tensor, x: Tensor, weight: Tensor, slots: Sequence[Slot], slot: Sequence[int]) -> RowsGradients:
    """Return the gradients of sum(dy * y), row by row; dy (M, N).

    dS[m] = s_t dY[m] B_t;  dX[m] = dY[m] W + drop'_t(dS[m] A_t);  dA_t, dB_t: sums over the rows of t
    """
    dx = dy @ weight
    da, db = [torch.zeros_like(each.lora_a) for each in slots], [torch.zeros_like(each.lora_b) for each in slots]
    rows = []
    for m, t in enumerate(slot):
        row = dx[m]
        if t >= 0:
            lora_a, lora_b, scale, mask, p = slots[t]
            of_row = None if mask is None else mask[m]
            dropped = _dropped(x[m], of_row, p)
            ds = scale * (dy[m] @ lora_b)
            row = row + _dropped(ds @ lora_a, of_row, p)
            da[t] = da[t] + torch.outer(ds, dropped)
            db[t] = db[t] + scale * torch.outer(dy[m], lora_a @ dropped)
        rows.append(row)
    return RowsGradients(torch.stack(rows) if rows else dx, dy.transpose(0, 1) @ x, da, db, dy.sum(0))


def eager_rows(
    x: Tensor, weight: Tensor, slots: Sequence[Slot], slot: Sequence[int], bias: Tensor | None = None
) -> Tensor:
    """PEFT's loop over the adapters of a mixed batch (``adapter_names``), in the arguments' own dtypes."""
    return eager_update_rows(F.linear(x, weight, bias), x, slots, slot)


def update_rows_forward(y: Tensor, x: Tensor, slots: Sequence[Slot], slot: Sequence[int]) -> Tensor:
    """Return y (M, N) and what ``rows_forward`` adds to the frozen product."""
    return y + rows_forward(x, x.new_zeros(y.shape[1], x.shape[1]), slots, slot)


def update_rows_backward(dy: Tensor, x: Tensor, slots: Sequence[Slot], slot: Sequence[int]) -> RowsGradients:
    """Return the gradients of sum(dy * y'): those of ``rows_backward`` where the frozen weight is zero; y's is dy."""
    return rows_backward(dy, x, x.new_zeros(dy.shape[1], x.shape[1]), slots, slot)


def eager_update_rows(result: Tensor, x: Tensor, slots: Sequence[Slot], slot: Sequence[int]) -> Tensor:
    """What PEFT's loop adds to its base layer's output, in the arguments' own dtypes; the sum has the output's."""
    for t, (lora_a, lora_b, scale, mask, p) in enumerate(slots):
        rows = torch.tensor([m for m, used in enumerate(slot) if used == t], device=x.device, dtype=torch.int64)
        if len(rows) == 0 or lora_a.shape[0] == 0:
            continue
        branch = x[rows].to(lora_a.dtype)
        if mask is not None:
            branch = branch * mask[rows].to(branch.dtype).div_(1.0 - effective_dropout(p))
        update = F.linear(F.linear(branch, lora_a), lora_b) * scale
        result = result.index_add(0, rows, update.to(result.dtype))
    return result


def _dropout_of(member: Member) -> dict[str, Any]:
    return {"dropout_mask": member.dropout_mask, "dropout_p": member.dropout_p}


def dropout_mask(seed: int, rows: int, cols: int, p: float, lane: int = 0) -> Tensor:
    """The keep-mask of a seed and a lane, bool (rows, cols), one element after another in Python integers.

    Philox4x32 with 7 rounds (Salmon et al., SC'11): key = seed, counter = (column // 8, row low, row high, lane);
    column c takes the 16-bit half c % 8 of the output words, low half first, and is kept when that half reaches the
    threshold.
    """
    limit = _threshold(p)
    mask = torch.empty(rows, cols, dtype=torch.bool)
    for row in range(rows):
        for group in range((cols + 7) // 8):
            words = _philox((group, row & _WORD, row >> 32, lane), seed % 2**64)
            for half in range(min(8, cols - 8 * group)):
                mask[row, 8 * group + half] = (words[half // 2] >> (16 * (half % 2))) & 0xFFFF >= limit
    return mask


def _threshold(p: float) -> int:
    if not 0.0 <= p < 1.0:
        raise ValueError(f"dropout probability must be in [0, 1), got {p}")
    return min(int(p * _LEVELS + 0.5), _LEVELS - 1)


def _dropped(x: Tensor, mask: Tensor | None, p: float) -> Tensor:
    if mask is None:
        return x
    # Selected, not multiplied: a dropped inf is zero, where inf * 0 would be nan.
    return torch.where(mask.reshape(x.shape), x, 0.0) / (1.0 - effective_dropout(p))


def _philox(counter: tuple[int, int, int, int], key: int) -> tuple[int, int, int, int]:
    c0, c1, c2, c3 = counter
    k0, k1 = key & _WORD, key >> 32
    for _ in range(_ROUNDS):
        product_0, product_1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (product_1 >> 32) ^ c1 ^ k0, product_1 & _WORD, (product_0 >> 32) ^ c3 ^ k1, product_0 & _WORD
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3
