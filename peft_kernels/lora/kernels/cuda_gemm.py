"""LoRA linear in one launch each way on Hopper, by csrc/lora/gemm_sm90.cuh.

Equation  y = x W^T + bias + scale S B^T, S = x' A^T | dX = dY W + drop(dS A), dS = scale dY B
          x' = drop(x), drop(z) = D z / (1 - p) by the mask D of dropout.py; without dropout z itself
Tensors   x (M, K), W (N, K), A (r, K), B (N, r), bias (N,), dY (M, N): any strides, but what TMA cannot read is copied
Workspace S or dS (M, r up to 16, 32, 64 or 128) in half precision, and flags (cuda_workspace.py)
Refused   other architectures, ranks above 128, operands of two dtypes, float32 and float64, N or K no multiple of 8
"""

from __future__ import annotations

import torch
from torch import Tensor

from peft_kernels._core import cuda_tools, extension
from peft_kernels._core.cuda_tools import address, dtype_name, strided
from peft_kernels._core.device import hardware
from peft_kernels._core.tma import readable
from peft_kernels.lora.kernels import cuda_workspace
from peft_kernels.lora.kernels.dropout import NO_DROPOUT, Dropout, require_lane_0

ARCH = 90
MAX_SIZE = 2**31 - 1024  # TMA's coordinates are 32-bit, and tiles reach past the end


def forward(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float | Tensor,
    bias: Tensor | None,
    dropout: Dropout = NO_DROPOUT,
) -> tuple[Tensor, Tensor]:
    """Return y (M, N) and S (M, r) float32."""
    return _launch(x, weight, lora_a, lora_b, scale, bias, dropout, backward=False)


def input_gradient(
    dy: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float | Tensor,
    dropout: Dropout = NO_DROPOUT,
) -> tuple[Tensor, Tensor]:
    """Return dX (M, K) and dS (M, r) float32."""
    return _launch(dy, weight, lora_b, lora_a, scale, None, dropout, backward=True)


def busy(m: int, n: int, k: int, r: int, dtype: torch.dtype, has_dropout: bool, device: torch.device) -> float:
    """The part of the multiprocessors' time that tiles of y (M, N) fill."""
    tiles = extension.load().lora.gemm_tiles(
        m=m, n=n, k=k, r=r, dtype=dtype_name(dtype), backward=False, dropout=has_dropout,
        multiprocessors=hardware(device).sm_count,
    )  # fmt: skip
    return float(tiles[2])


def _launch(
    x: Tensor,
    w: Tensor,
    down: Tensor,
    up: Tensor,
    scale: float | Tensor,
    bias: Tensor | None,
    dropout: Dropout,
    backward: bool,
) -> tuple[Tensor, Tensor]:
    """One product as GemmParams in csrc/lora/params.h describes it."""
    require_lane_0(dropout)
    kernels, device = extension.load().lora, x.device
    m, k = x.shape
    n, r = (up.shape[1], up.shape[0]) if backward else up.shape
    x, w, down, up = (readable(matrix) for matrix in (x, w, down, up))
    bias = _pairs(bias)
    scale_tensor, scale_value = cuda_tools.float32_scale(scale)

    with cuda_tools.stream_of(device) as stream:
        y = torch.empty(m, n, dtype=x.dtype, device=device)
        s = torch.empty(m, r, dtype=torch.float32, device=device)
        flags, size = kernels.gemm_workspace(m=m, r=r)
        workspace = cuda_workspace.allocate(flags, size, device)
        kernels.gemm_sm90(
            x=strided(x), w=strided(w), down=strided(down), up=strided(up), bias=address(bias),
            scale=(address(scale_tensor), scale_value), seed=address(dropout.seed), threshold=dropout.threshold,
            keep_scale=dropout.keep_scale, y=address(y), s=address(s),
            workspace=address(workspace.tensor), nonce=workspace.nonce, m=m, n=n, k=k, r=r,
            dtype=dtype_name(x.dtype), backward=backward, multiprocessors=hardware(device).sm_count, stream=stream,
        )  # fmt: skip
    return y, s


def _pairs(bias: Tensor | None) -> Tensor | None:
    """The bias as the kernel reads it, two elements at a time: itself, or a copy."""
    if bias is None or (bias.is_contiguous() and bias.data_ptr() % 4 == 0):
        return bias
    return bias.clone(memory_format=torch.contiguous_format)
