"""What a prefix attention call is made of: the tensors, the facts that backends decide on, and every check, once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from peft_kernels._core import checks
from peft_kernels.prefix.kernels.attention import Attention

FAMILY = "prefix_attention"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_HALF = (torch.bfloat16, torch.float16)


class Inputs(NamedTuple):
    """The tensors of one call, as backends get them.

    Attributes:
        q: (B, H, S, D), contiguous last dimension, as in all of them.
        k, v: (B, H_kv, L, D), in q's dtype.
        prefix_k, prefix_v: (H_kv, P, D) or (B, H_kv, P, D), in q's dtype.
        key_padding_mask: bool (B, L), True where a key may be attended to; or None.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    prefix_k: Tensor
    prefix_v: Tensor
    key_padding_mask: Tensor | None


class Needs(NamedTuple):
    """Which gradients a backward pass is asked for."""

    q: bool
    k: bool
    v: bool
    prefix_k: bool
    prefix_v: bool


class Gradients(NamedTuple):
    """Gradients of one call, None where not asked for; those of the prefix have the dtype it was given in."""

    q: Tensor | None
    k: Tensor | None
    v: Tensor | None
    prefix_k: Tensor | None
    prefix_v: Tensor | None


@dataclass(frozen=True)
class PrefixAttentionProblem(Attention):
    """The facts that choose a backend and its configs: an attention and the device of its tensors."""

    device: torch.device

    @property
    def is_empty(self) -> bool:
        """Whether there is no query, or nothing to attend to."""
        return 0 in (self.b, self.h, self.s, self.d) or self.l + self.p == 0

    @property
    def wide_dtype(self) -> torch.dtype:
        """Of scores, weights and sums, on every backend: never below float32."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32


def describe(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    causal: bool,
    scale: float | None,
    key_padding_mask: Tensor | None,
) -> PrefixAttentionProblem:
    """Check the arguments of a call and describe it.

    Raises:
        ValueError: naming the argument, what it must be and what it was.
    """
    _check_shapes(q, k, v, prefix_k, prefix_v)
    _check_dtypes_and_devices(q, k, v, prefix_k, prefix_v)
    if key_padding_mask is not None:
        _check_mask(key_padding_mask, k)
    if not isinstance(causal, bool):
        raise ValueError(f"{FAMILY}: causal must be a bool, got {causal!r}")
    if scale is not None and (isinstance(scale, bool) or not isinstance(scale, (int, float, torch.SymFloat))):
        raise ValueError(f"{FAMILY}: scale must be a float or None, got {type(scale).__name__}")
    b, h, s, d = q.shape
    return PrefixAttentionProblem(
        b=b,
        h=h,
        h_kv=k.shape[1],
        s=s,
        l=k.shape[2],
        p=prefix_k.shape[-2],
        d=d,
        dtype=q.dtype,
        prefix_dtype=prefix_k.dtype,
        device=q.device,
        causal=causal,
        scale=default_scale(d) if scale is None else scale,
        shared=prefix_k.dim() == 3,
        padded=key_padding_mask is not None,
    )


def default_scale(d: int) -> float:
    """1 / sqrt(D), as F.scaled_dot_product_attention takes it."""
    return float(max(d, 1) ** -0.5)


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v), ("prefix_k", prefix_k), ("prefix_v", prefix_v)):
        checks.is_tensor(FAMILY, name, tensor)
    checks.dims(FAMILY, "q", q, "(B, H, S, D)", 4)
    checks.dims(FAMILY, "k", k, "(B, H_kv, L, D)", 4)
    b, h, _, d = q.shape
    h_kv, length = k.shape[1], k.shape[2]
    checks.shape(FAMILY, "k", k, "(B, H_kv, L, D)", (b, h_kv, length, d))
    checks.shape(FAMILY, "v", v, "(B, H_kv, L, D)", (b, h_kv, length, d))
    if h_kv == 0 or h % h_kv:
        raise ValueError(f"{FAMILY}: H_kv, k's heads, must divide H = {h}, q's heads, got {h_kv}")
    if prefix_k.dim() not in (3, 4):
        shape = tuple(prefix_k.shape)
        raise ValueError(f"{FAMILY}: prefix_k must be (H_kv, P, D) or (B, H_kv, P, D), got a tensor of shape {shape}")
    own = prefix_k.dim() == 4
    symbols, size = ("(B, H_kv, P, D)", (b,)) if own else ("(H_kv, P, D)", ())
    checks.shape(FAMILY, "prefix_k", prefix_k, symbols, (*size, h_kv, prefix_k.shape[-2], d))
    checks.shape(FAMILY, "prefix_v", prefix_v, symbols, prefix_k.shape)


def _check_dtypes_and_devices(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor) -> None:
    checks.floating(FAMILY, "q", q, DTYPES)
    checks.same_dtype(FAMILY, "k", k, "q", q.dtype)
    checks.same_dtype(FAMILY, "v", v, "q", q.dtype)
    masters = torch.float32 if q.dtype in _HALF else q.dtype
    checks.same_dtype(FAMILY, "prefix_k", prefix_k, "q, or float32 beside half precision", q.dtype, masters)
    checks.same_dtype(FAMILY, "prefix_v", prefix_v, "prefix_k", prefix_k.dtype)
    for name, tensor in (("k", k), ("v", v), ("prefix_k", prefix_k), ("prefix_v", prefix_v)):
        checks.same_device(FAMILY, name, tensor, "q", q.device)


def _check_mask(mask: Tensor, k: Tensor) -> None:
    checks.is_tensor(FAMILY, "key_padding_mask", mask)
    if mask.dtype != torch.bool:
        raise ValueError(f"{FAMILY}: key_padding_mask must be torch.bool, True = attend, got {mask.dtype}")
    checks.shape(FAMILY, "key_padding_mask", mask, "(B, L)", (k.shape[0], k.shape[2]))
    checks.same_device(FAMILY, "key_padding_mask", mask, "q", k.device)
