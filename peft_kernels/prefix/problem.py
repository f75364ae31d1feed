"""What a prefix attention call is made of: the tensors, the facts that backends decide on, and every check, once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from peft_kernels._core import checks
from peft_kernels.prefix.kernels.attention import Attention
from peft_kernels.prefix.kernels.fused_operators import is_deterministic

NAME = "prefix_attention"


def _wrong_heads(sizes: checks.Sizes) -> str | None:
    h, h_kv = sizes["H"], sizes["H_kv"]
    if h_kv > 0 and h % h_kv == 0:
        return None
    return f"H_kv, k's heads, must divide H = {h}, q's heads, got {h_kv}"


TENSORS = checks.Table(
    NAME,
    "q",
    (
        checks.Row("q", "B H S D"),
        checks.Row("k", "B H_kv L D", dtype_of="q"),
        checks.Row("v", "B H_kv L D", dtype_of="q", then=_wrong_heads),
        checks.Row("prefix_k", "H_kv P D | B H_kv P D", dtype_of="q", or_float32=True),
        checks.Row("prefix_v", "H_kv P D | B H_kv P D", dtype_of="prefix_k"),
        checks.Row("key_padding_mask", "B L", optional=True),
    ),
)


class Inputs(NamedTuple):
    """The arguments of one call.

    Attributes:
        q: (B, H, S, D); the last dimension is contiguous where an implementation takes it, as in all of them.
        k, v: (B, H_kv, L, D), in q's dtype.
        prefix_k, prefix_v: (H_kv, P, D) or (B, H_kv, P, D), in q's dtype where an implementation takes them.
        causal: whether a query sees only what is not after it.
        scale: factor of the products of queries and keys.
        key_padding_mask: bool (B, L), True where a key may be attended to; or None.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    prefix_k: Tensor
    prefix_v: Tensor
    causal: bool
    scale: float
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
    """The facts that choose a backend and its configs: an attention, and where and how it is to be computed.

    Attributes:
        device: of its tensors.
        deterministic: whether torch was told to take algorithms that give the same bits twice, and to raise where it
            has none.
    """

    device: torch.device
    deterministic: bool = False

    @property
    def is_empty(self) -> bool:
        """Whether there is no query, or nothing to attend to."""
        return 0 in (self.b, self.h, self.s, self.d) or self.l + self.p == 0

    @property
    def wide_dtype(self) -> torch.dtype:
        """Of scores, weights and sums, on every backend."""
        return checks.wide_dtype(self.dtype)


def make_problem(call: Inputs) -> PrefixAttentionProblem:
    """Check the arguments of a call and describe it.

    Raises:
        ValueError: naming the argument, what it must be and what it was.
    """
    q, mask = call.q, call.key_padding_mask
    sizes = TENSORS.check(call)
    if call.prefix_v.dim() != call.prefix_k.dim():
        got = tuple(call.prefix_v.shape)
        raise ValueError(f"{NAME}: prefix_v must be {tuple(call.prefix_k.shape)} as prefix_k is, got {got}")
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(f"{NAME}: key_padding_mask must be torch.bool, True = attend, got {mask.dtype}")
    if not isinstance(call.causal, bool):
        raise ValueError(f"{NAME}: causal must be a bool, got {call.causal!r}")
    if isinstance(call.scale, bool) or not isinstance(call.scale, (int, float, torch.SymFloat)):
        raise ValueError(f"{NAME}: scale must be a float or None, got {type(call.scale).__name__}")
    return PrefixAttentionProblem(
        b=sizes["B"],
        h=sizes["H"],
        h_kv=sizes["H_kv"],
        s=sizes["S"],
        l=sizes["L"],
        p=sizes["P"],
        d=sizes["D"],
        dtype=q.dtype,
        prefix_dtype=call.prefix_k.dtype,
        device=q.device,
        causal=call.causal,
        scale=call.scale,
        shared=call.prefix_k.dim() == 3,
        padded=mask is not None,
        deterministic=is_deterministic(),
    )


def default_scale(d: int) -> float:
    """1 / sqrt(D), as F.scaled_dot_product_attention takes it."""
    return float(max(d, 1) ** -0.5)
