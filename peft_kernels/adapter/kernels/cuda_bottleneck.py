"""A bottleneck adapter's forward pass in one launch on Hopper, by csrc/adapter/forward_sm90.cuh.

Equation  y = residual + scale (act(z) Wu^T + bu),  z = x Wd^T + bd
Tensors   x (M, K), Wd (r, K), Wu (N, r), residual (M, N), bd (r,), bu (N,), all of one half-precision dtype: any
          strides, but what TMA cannot read is copied
Refused   other architectures, float32 and float64, N or K no multiple of 8, r and columns above the extension's limits
"""

from __future__ import annotations

import torch
from torch import Tensor

from peft_kernels._core import cuda_tools, extension
from peft_kernels._core.cuda_tools import address, dtype_name, strided
from peft_kernels._core.tma import readable
from peft_kernels.adapter.kernels.config import CudaForwardConfig

INDEX_LIMIT = 2**31  # TMA's coordinates are 32-bit


def forward(
    x: Tensor,
    weights: tuple[Tensor, Tensor],
    biases: tuple[Tensor | None, Tensor | None],
    residual: Tensor | None,
    scale: float | Tensor,
    serial: bool,
    activation: str,
    config: CudaForwardConfig,
) -> tuple[Tensor, Tensor]:
    """Return y (M, N) and z (M, r) float32.

    Args:
        weights, biases: down, then up.
        serial: whether x is the residual; else it is ``residual``, or there is none.
    """
    (m, k), (n, r) = x.shape, weights[1].shape
    x, down_weight, up_weight = (readable(matrix) for matrix in (x, *weights))
    residual = None if residual is None else readable(residual)
    down_bias, up_bias = (None if bias is None else bias.contiguous() for bias in biases)
    scale_tensor, scale_value = cuda_tools.float32_scale(scale)

    with cuda_tools.stream_of(x.device) as stream:
        z = torch.empty(m, r, dtype=torch.float32, device=x.device)
        y = torch.empty(m, n, dtype=x.dtype, device=x.device)
        extension.load().adapter.forward(
            x=strided(x), down_weight=strided(down_weight), up_weight=strided(up_weight),
            down_bias=address(down_bias), up_bias=address(up_bias), residual=strided(residual),
            scale=(address(scale_tensor), scale_value), z=address(z), y=address(y), m=m, n=n, k=k, r=r, serial=serial,
            activation=activation, dtype=dtype_name(x.dtype), cluster=config.CLUSTER, stream=stream,
        )  # fmt: skip
    return y, z
