"""LoRA linear for at most 16 tokens in one launch of csrc/lora/decode.cuh.

Equation  y = x W^T + bias + scale S B^T,  S = x A^T
Tensors   x (M, K), W (N, K), A (r, K): contiguous rows on 16-byte boundaries; B (N, r), bias (N,): any strides
Refused   M > 16, float32 and float64, factors of a dtype that is neither x's nor float32, K no multiple of 8
"""

from __future__ import annotations

import torch
from torch import Tensor

from peft_kernels._core import cuda_tools, extension
from peft_kernels._core.cuda_tools import address, dtype_name, strided
from peft_kernels.lora.kernels import cuda_workspace
from peft_kernels.lora.kernels.config import DecodeConfig

MAX_TOKENS = 16
MAX_SIZE = 2**30
MINIMUM_ARCH = 80


def forward(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float | Tensor,
    bias: Tensor | None,
    config: DecodeConfig,
) -> tuple[Tensor, Tensor]:
    """Return y (M, N) and S (M, r) float32."""
    kernels, device = extension.load().lora, x.device
    (m, k), (n, r) = x.shape, lora_b.shape
    shape = {"m": m, "n": n, "k": k, "r": r, "splits": config.SPLITS, "down_splits": config.DOWN_SPLITS}
    scale_tensor, scale_value = cuda_tools.float32_scale(scale)

    with cuda_tools.stream_of(device) as stream:
        y = torch.empty(m, n, dtype=x.dtype, device=device)
        s = torch.empty(m, r, dtype=torch.float32, device=device)
        flags, size = kernels.decode_workspace(**shape)
        workspace = cuda_workspace.allocate(flags, size, device)
        kernels.decode_forward(
            x=strided(x), weight=strided(weight), lora_a=strided(lora_a), lora_b=(address(lora_b), *lora_b.stride()),
            bias=strided(bias), scale=(address(scale_tensor), scale_value), y=address(y), s=address(s),
            workspace=address(workspace.tensor), nonce=workspace.nonce, dtype=dtype_name(x.dtype),
            adapter_dtype=dtype_name(lora_a.dtype), grid=config.GRID, stream=stream, **shape,
        )  # fmt: skip
    return y, s
