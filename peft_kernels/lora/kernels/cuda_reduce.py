"""The gradients of LoRA's factors, sums over all tokens, in one launch of csrc/lora/reduce.cuh.

Equation  dB = scale dY^T S, dbias = sum of dY's rows, dA = dS^T drop(x); dS = scale dY B in the same pass over dY as dB
Tensors   dY (M, N), x (M, K): any strides, but rows off 16-byte boundaries are copied; B (N, r): any strides
          S, dS (M, r) float32; gradients in the dtype of what they are of
Workspace partial sums of blocks that share columns, and tickets (cuda_workspace.py)
Refused   float32 and float64, factors of a dtype that is neither x's nor float32
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from peft_kernels._core import cuda_tools, extension
from peft_kernels._core.cuda_tools import address, dtype_name, strided
from peft_kernels._core.device import hardware
from peft_kernels._core.tma import readable
from peft_kernels.lora.kernels import cuda_workspace
from peft_kernels.lora.kernels.dropout import NO_DROPOUT, Dropout, require_lane_0

MINIMUM_ARCH = 80
TILE_COLUMNS = 256  # csrc/lora/reduce_config.h: dS comes in a part for each of these of dY


class OverDy(NamedTuple):
    """What one pass over dY makes.

    Attributes:
        dy: (M, N).
        scale: float, or a 0-d tensor on dY's device.
        s: (M, r) float32, contiguous, for dB; None: no dB.
        lora_b: (N, r), for dS; None: no dS.
        dbias: whether to sum dY's rows.
    """

    dy: Tensor
    scale: float | Tensor
    s: Tensor | None
    lora_b: Tensor | None
    dbias: bool


class OverX(NamedTuple):
    """What one pass over x (M, K) makes: dA, of dS (M, r) float32, contiguous."""

    x: Tensor
    ds: Tensor
    dropout: Dropout


class Sums(NamedTuple):
    """dA (r, K), dB (N, r), dbias (N,), dS (M, r) float32; None where not asked for."""

    da: Tensor | None
    db: Tensor | None
    dbias: Tensor | None
    ds: Tensor | None


def reduce_rows(over_dy: OverDy | None, over_x: OverX | None, r: int, adapter_dtype: torch.dtype) -> Sums:
    """Launch one or both passes.

    Args:
        adapter_dtype: of lora_b, dA and dB: x's or float32.
    """
    dy = None if over_dy is None else readable(over_dy.dy)
    x = None if over_x is None else readable(over_x.x)
    some = dy if x is None else x
    if some is None:
        return Sums(None, None, None, None)
    ds, dropout = (None, NO_DROPOUT) if over_x is None else over_x[1:]
    require_lane_0(dropout)
    kernels, m, device = extension.load().lora, some.shape[0], some.device
    scale, s, lora_b, asks_dbias = (0.0, None, None, False) if over_dy is None else over_dy[1:]
    n, k = 0 if dy is None else dy.shape[1], 0 if x is None else x.shape[1]
    scale_tensor, scale_value = cuda_tools.float32_scale(scale)
    sm_count = hardware(device).sm_count

    with cuda_tools.stream_of(device) as stream:
        da = None if x is None else torch.empty(r, k, dtype=adapter_dtype, device=device)
        db = None if s is None else torch.empty(n, r, dtype=adapter_dtype, device=device)
        dbias = torch.empty(n, dtype=some.dtype, device=device) if asks_dbias else None
        parts = None
        if lora_b is not None:
            parts = torch.empty(-(-n // TILE_COLUMNS), m, r, dtype=torch.float32, device=device)
        tickets, size = kernels.reduce_workspace(
            m=m, n=n, k=k, r=r, exact=adapter_dtype != some.dtype, narrow=parts is not None, multiprocessors=sm_count
        )
        workspace = cuda_workspace.allocate(tickets, size, device)
        kernels.reduce_rows(
            dy=strided(dy), s=address(s), db=_matrix(db), dbias=address(dbias),
            scale=(address(scale_tensor), scale_value), x=strided(x), ds=address(ds), da=_matrix(da),
            keep_scale=dropout.keep_scale, seed=address(dropout.seed), threshold=dropout.threshold,
            lora_b=_matrix(lora_b), ds_parts=address(parts), workspace=address(workspace.tensor),
            nonce=workspace.nonce, m=m, n=n, k=k, r=r, dtype=dtype_name(some.dtype),
            adapter_dtype=dtype_name(adapter_dtype), multiprocessors=sm_count, stream=stream,
        )  # fmt: skip
    return Sums(da, db, dbias, None if parts is None else parts[0] if len(parts) == 1 else parts.sum(0))


def _matrix(matrix: Tensor | None) -> tuple[int, int, int] | None:
    return None if matrix is None else (matrix.data_ptr(), matrix.stride(0), matrix.stride(1))
