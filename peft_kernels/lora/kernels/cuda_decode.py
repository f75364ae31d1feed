"""LoRA linear for at most 16 tokens in one launch: of one adapter by csrc/lora/decode.cuh, of one for each token by
decode_rows.cuh.

Equation  y = x W^T + bias + scale S B^T,  S = x A^T; with A, B and the scale of the token's slot
Tensors   x (M, K), W (N, K), A (r, K): contiguous rows on 16-byte boundaries; B (N, r), bias (N,): any strides
Refused   M > 16, float32 and float64, factors of a dtype that is neither x's nor float32, K no multiple of 8
"""

from __future__ import annotations

from typing import NamedTuple

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


class Slots(NamedTuple):
    """The adapters that tokens choose, and which one each has; all on x's device, and nothing of it the host's to read.

    Attributes:
        slot: (M,) int32, of each token; what is not 0 ... T - 1 is no adapter.
        order: (M,) int32, a permutation of the tokens.
        table: (2 or more, T) int32: where a slot's ranks begin in A and B, and how many it has.
        scales: (T,) float32.
        width: no less than any slot's rank.
    """

    slot: Tensor
    order: Tensor
    table: Tensor
    scales: Tensor
    width: int


def most_chosen(m: int, slots: int, r: int, width: int) -> int:
    """The most ranks that the slots of M tokens can have together, of r in all."""
    return min(r, min(m, slots) * width)


def decode_rows(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None,
    slots: Slots,
    s: Tensor,
    config: DecodeConfig,
) -> Tensor:
    """Return y (M, N).

    Args:
        lora_a: (r, K), the slots' factors under each other. lora_b: (N, r), side by side.
        s: (M, width) float32, rows contiguous: row i becomes S of token ``order[i]``; what is beyond the rank of its
            slot stays as it is.
        config: for ``most_chosen`` ranks.
    """
    kernels, device = extension.load().lora, x.device
    (m, k), (n, r), count = x.shape, lora_b.shape, slots.scales.shape[0]
    chosen = most_chosen(m, count, r, slots.width)
    shape = {"m": m, "n": n, "k": k, "r": chosen, "splits": config.SPLITS, "down_splits": config.DOWN_SPLITS}
    table = slots.table.contiguous()

    with cuda_tools.stream_of(device) as stream:
        y = torch.empty(m, n, dtype=x.dtype, device=device)
        flags, size = kernels.decode_workspace(**shape)
        workspace = cuda_workspace.allocate(flags, size, device)
        kernels.decode_rows(
            x=strided(x), weight=strided(weight), lora_a=strided(lora_a), lora_b=(address(lora_b), *lora_b.stride()),
            bias=strided(bias), scales=strided(slots.scales), slot=strided(slots.slot), order=strided(slots.order),
            table=strided(table), slots=count, a_rows=r, y=address(y), s=strided(s),
            workspace=address(workspace.tensor), nonce=workspace.nonce, dtype=dtype_name(x.dtype),
            adapter_dtype=dtype_name(lora_a.dtype), grid=config.GRID, stream=stream, **shape,
        )  # fmt: skip
    return y
