"""Bottleneck adapters (Houlsby et al. 2019, arXiv:1902.00751): equations, their derivatives by hand, and eager torch.

    z = x Wd^T + bd
    h = act(z)
    y = residual + s (h Wu^T + bu)

x (..., K), Wd (r, K), bd (r,), Wu (N, r), bu (N,), residual and y (..., N); leading dimensions are flattened to M rows.
Serial: the residual is x itself. Parallel (He et al. 2022, arXiv:2110.04366): it is another tensor. Or there is none.
The derivation of ``backward`` is in docs/design/adapter.md.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LEAKY_SLOPE = 0.01  # torch's default


class Activation(NamedTuple):
    """An elementwise function, its derivative as an equation, and torch's own function of the same name."""

    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]
    eager: Callable[[Tensor], Tensor]


class Gradients(NamedTuple):
    """Gradients of every input of ``forward``; x's holds the residual's where the residual is x."""

    x: Tensor
    down_weight: Tensor
    up_weight: Tensor
    down_bias: Tensor
    up_bias: Tensor
    residual: Tensor


def forward(
    x: Tensor,
    down_weight: Tensor,
    up_weight: Tensor,
    *,
    down_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "relu",
    scale: float | Tensor = 1.0,
) -> tuple[Tensor, Tensor]:
    """Return y (..., N) and z (..., r), in the dtype of the arguments."""
    z = x @ down_weight.transpose(0, 1)
    if down_bias is not None:
        z = z + down_bias
    branch = ACTIVATIONS[activation].value(z) @ up_weight.transpose(0, 1)
    if up_bias is not None:
        branch = branch + up_bias
    return (scale * branch if residual is None else residual + scale * branch), z


def backward(
    dy: Tensor,
    x: Tensor,
    down_weight: Tensor,
    up_weight: Tensor,
    *,
    down_bias: Tensor | None = None,
    serial: bool = False,
    activation: str = "relu",
    scale: float | Tensor = 1.0,
) -> Gradients:
    """Return the gradients of sum(dy * y); arguments as in ``forward``, dy (..., N), serial where the residual is x."""
    m = math.prod(x.shape[:-1])
    rows, flat_x = dy.reshape(m, up_weight.shape[0]), x.reshape(m, down_weight.shape[1])
    z = flat_x @ down_weight.transpose(0, 1)
    if down_bias is not None:
        z = z + down_bias
    act = ACTIVATIONS[activation]
    dz = scale * (rows @ up_weight) * act.slope(z)
    dx = dz @ down_weight
    return Gradients(
        x=(dx + rows if serial else dx).reshape(x.shape),
        down_weight=dz.transpose(0, 1) @ flat_x,
        up_weight=scale * (rows.transpose(0, 1) @ act.value(z)),
        down_bias=dz.sum(0),
        up_bias=scale * rows.sum(0),
        residual=dy,
    )


def eager(
    x: Tensor,
    down_weight: Tensor,
    up_weight: Tensor,
    *,
    down_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "relu",
    scale: float | Tensor = 1.0,
) -> Tensor:
    """What linear, activation, linear and a sum compute in the arguments' own dtypes; the error budget's yardstick.

    x is cast to the adapter's dtype, and the sum back to the residual's, or to x's where there is none.
    """
    hidden = ACTIVATIONS[activation].eager(F.linear(x.to(down_weight.dtype), down_weight, down_bias))
    branch = F.linear(hidden, up_weight, up_bias) * scale
    if residual is None:
        return branch.to(x.dtype)
    return (residual + branch).to(residual.dtype)


class Slot(NamedTuple):
    """An adapter that rows choose: Wd (r, K), Wu (N, r), bd (r,) and bu (N,) or None."""

    down_weight: Tensor
    up_weight: Tensor
    down_bias: Tensor | None = None
    up_bias: Tensor | None = None
    scale: float = 1.0


class RowsGradients(NamedTuple):
    """Gradients of every input of ``rows_forward``; those of the adapters for each slot."""

    x: Tensor
    down_weight: list[Tensor]
    up_weight: list[Tensor]
    down_bias: list[Tensor]
    up_bias: list[Tensor]
    residual: Tensor


def rows_forward(
    x: Tensor, slots: Sequence[Slot], slot: Sequence[int], residual: Tensor | None = None, activation: str = "relu"
) -> Tensor:
    """Return y (M, N), row by row: row m has the branch of slots[slot[m]], or none where slot[m] is -1.

    Args:
        x: (M, K). slots: at least one. residual: (M, N), or None, where a row without a branch is zero.
    """
    n = slots[0].up_weight.shape[0]
    base = x.new_zeros(x.shape[0], n) if residual is None else residual
    rows = []
    for m, t in enumerate(slot):
        row = base[m]
        if t >= 0:
            down_weight, up_weight, down_bias, up_bias, scale = slots[t]
            z = down_weight @ x[m] + (0 if down_bias is None else down_bias)
            h = ACTIVATIONS[activation].value(z)
            row = row + scale * (up_weight @ h + (0 if up_bias is None else up_bias))
        rows.append(row)
    return torch.stack(rows) if rows else base


def rows_backward(
    dy: Tensor, x: Tensor, slots: Sequence[Slot], slot: Sequence[int], serial: bool = False, activation: str = "relu"
) -> RowsGradients:
    """Return the gradients of sum(dy * y), row by row; dy (M, N), serial where the residual is x.

    dz[m] = s_t (dY[m] Wu_t) * act'(z[m]);  dX[m] = dz[m] Wd_t (+ dY[m]);  the adapters': sums over the rows of t
    """
    act = ACTIVATIONS[activation]
    dwd, dwu = (
        [torch.zeros_like(each.down_weight) for each in slots],
        [torch.zeros_like(each.up_weight) for each in slots],
    )
    dbd, dbu = [dy.new_zeros(each.down_weight.shape[0]) for each in slots], [dy.new_zeros(dy.shape[1]) for _ in slots]
    dx = dy if serial else torch.zeros_like(x)
    rows = []
    for m, t in enumerate(slot):
        row = dx[m]
        if t >= 0:
            down_weight, up_weight, down_bias, _, scale = slots[t]
            z = down_weight @ x[m] + (0 if down_bias is None else down_bias)
            dz = scale * (dy[m] @ up_weight) * act.slope(z)
            row = row + dz @ down_weight
            dwd[t] = dwd[t] + torch.outer(dz, x[m])
            dwu[t] = dwu[t] + scale * torch.outer(dy[m], act.value(z))
            dbd[t] = dbd[t] + dz
            dbu[t] = dbu[t] + scale * dy[m]
        rows.append(row)
    return RowsGradients(torch.stack(rows) if rows else dx, dwd, dwu, dbd, dbu, dy)


def eager_rows(
    x: Tensor, slots: Sequence[Slot], slot: Sequence[int], residual: Tensor | None = None, activation: str = "relu"
) -> Tensor:
    """AdapterHub's MultiTask in the arguments' own dtypes: rows sorted by slot, BatchSplit, and back in their order.

    BatchSplit runs each adapter on its neighbours and joins the results.
    """
    n = slots[0].up_weight.shape[0]
    base = x.new_zeros(x.shape[0], n) if residual is None else residual
    if not slot:
        return base
    places = sorted(range(len(slot)), key=lambda m: slot[m])
    order = torch.tensor(places, device=x.device)
    x, base = x[order], base[order]
    chunks, start = [], 0
    for t, of_slot in itertools.groupby(slot[m] for m in places):
        end = start + len(list(of_slot))
        chunk = base[start:end]
        if t >= 0:
            down_weight, up_weight, down_bias, up_bias, scale = slots[t]
            chunk = eager(
                x[start:end],
                down_weight,
                up_weight,
                down_bias=down_bias,
                up_bias=up_bias,
                residual=None if residual is None else chunk,
                activation=activation,
                scale=scale,
            )
        chunks.append(chunk)
        start = end
    return torch.cat(chunks)[order.argsort()]


def _ones(z: Tensor) -> Tensor:
    return torch.ones_like(z)


def _normal_cdf(z: Tensor) -> Tensor:
    return 0.5 * torch.erfc(-z / math.sqrt(2))


def _normal_pdf(z: Tensor) -> Tensor:
    return torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)


def _tanh_argument(z: Tensor) -> Tensor:
    return math.sqrt(2 / math.pi) * (z + 0.044715 * z * z * z)


def _gelu_tanh(z: Tensor) -> Tensor:
    return 0.5 * z * (1 + torch.tanh(_tanh_argument(z)))


def _gelu_tanh_slope(z: Tensor) -> Tensor:
    t = torch.tanh(_tanh_argument(z))
    inner = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * z * z)
    return 0.5 * (1 + t) + 0.5 * z * (1 - t) * (1 + t) * inner


def _sigmoid_slope(z: Tensor) -> Tensor:
    return torch.sigmoid(z) * torch.sigmoid(-z)


def _silu_slope(z: Tensor) -> Tensor:
    return torch.sigmoid(z) + z * _sigmoid_slope(z)


def _tanh_slope(z: Tensor) -> Tensor:
    t = torch.tanh(z)
    return (1 - t) * (1 + t)


# At a kink the slope is the one that torch takes: the left one.
ACTIVATIONS: dict[str, Activation] = {
    "relu": Activation(lambda z: torch.where(z > 0, z, 0), lambda z: (z > 0).to(z.dtype), F.relu),
    "gelu": Activation(
        lambda z: z * _normal_cdf(z), lambda z: _normal_cdf(z) + z * _normal_pdf(z), lambda z: F.gelu(z)
    ),
    "gelu_tanh": Activation(_gelu_tanh, _gelu_tanh_slope, lambda z: F.gelu(z, approximate="tanh")),
    "silu": Activation(lambda z: z * torch.sigmoid(z), _silu_slope, F.silu),
    "tanh": Activation(torch.tanh, _tanh_slope, torch.tanh),
    "sigmoid": Activation(torch.sigmoid, _sigmoid_slope, torch.sigmoid),
    "leaky_relu": Activation(
        lambda z: torch.where(z > 0, z, LEAKY_SLOPE * z),
        lambda z: torch.where(z > 0, _ones(z), LEAKY_SLOPE),
        F.leaky_relu,
    ),
    "identity": Activation(lambda z: z, _ones, lambda z: z),
}
