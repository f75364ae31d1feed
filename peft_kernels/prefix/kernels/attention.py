"""What a launch computes, beside the tensors that it reads; known without Triton."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Attention:
    """The attention that kernels compute: sizes and dtypes of its tensors, and what these do not show.

    Attributes:
        b, s, l, p, d: batch, queries, keys of the sequence, keys of the prefix, head dimension.
        h, h_kv: query heads; key and value heads.
        dtype: of q, k, v and the result.
        prefix_dtype: of the prefix's gradients: dtype, or float32 beside half precision.
        causal: query i sees the sequence's keys up to i + l - s.
        scale: factor of the products of queries and keys.
        shared: one prefix for the whole batch.
        padded: there is a padding mask.
    """

    b: int
    h: int
    h_kv: int
    s: int
    l: int  # noqa: E741
    p: int
    d: int
    dtype: torch.dtype
    prefix_dtype: torch.dtype
    causal: bool
    scale: float
    shared: bool
    padded: bool

    @property
    def group(self) -> int:
        """Query heads that read one key head."""
        return self.h // self.h_kv

    @property
    def shift(self) -> int:
        """Query i sees key j of the sequence if j <= i + shift; without a causal mask, if j < l."""
        return self.l - self.s

    @property
    def scale_log2(self) -> float:
        """Factor of the scores whose powers of two, instead of e, are the weights."""
        return self.scale * math.log2(math.e)


class Segment(NamedTuple):
    """Keys and values of the prefix, or of the sequence, in q's dtype; last dimension contiguous.

    Attributes:
        k, v: (B, H_kv, keys, D), or (H_kv, keys, D) where the batch shares them.
        mask: bool (B, keys), True where a key may be attended to; or None.
    """

    k: Tensor
    v: Tensor
    mask: Tensor | None = None

    def strides(self) -> tuple[int, ...]:
        """Of batch, head and key in k, then in v; what is shared is the same in every batch row."""
        batch = (0,) if self.k.dim() == 3 else ()
        return (*batch, *self.k.stride()[:-1], *batch, *self.v.stride()[:-1])

    def mask_bytes(self) -> tuple[Tensor | None, tuple[int, ...]]:
        """The mask as bytes, a view, and its strides."""
        return (None, (0, 0)) if self.mask is None else (self.mask.view(torch.uint8), self.mask.stride())
