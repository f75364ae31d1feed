"""What a LoRA linear call is made of: the tensors, the facts that backends decide on, and every check, once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from peft_kernels._core import checks, cuda_tools
from peft_kernels.lora.kernels import dropout

FAMILY = "lora_linear"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Inputs(NamedTuple):
    """The tensors of one call, ``x`` flattened to two dimensions.

    Attributes:
        x: (M, K), any strides.
        weight: (N, K), in x's dtype, as nn.Linear stores it.
        lora_a: (r, K), in x's dtype or float32.
        lora_b: (N, r), in lora_a's dtype.
        scale: float, or a 0-d tensor on x's device.
        bias: (N,) in x's dtype, or None.
        seed: 0-d int64 tensor on x's device; None exactly when nothing is dropped.
    """

    x: Tensor
    weight: Tensor
    lora_a: Tensor
    lora_b: Tensor
    scale: float | Tensor
    bias: Tensor | None
    seed: Tensor | None


class Needs(NamedTuple):
    """Which gradients a backward pass is asked for."""

    x: bool
    weight: bool
    lora_a: bool
    lora_b: bool
    bias: bool


class Gradients(NamedTuple):
    """Gradients of one call, None where not asked for; shapes and dtypes are those of ``Inputs``."""

    x: Tensor | None
    weight: Tensor | None
    lora_a: Tensor | None
    lora_b: Tensor | None
    bias: Tensor | None


@dataclass(frozen=True)
class LoraLinearProblem:
    """The facts that choose a backend and its configs.

    Attributes:
        m, n, k, r: tokens, out-features, in-features, rank.
        dtype: of x, weight, bias and the result.
        adapter_dtype: of lora_a and lora_b.
        device: of all tensors.
        dropout_threshold: a 16-bit draw below it drops its element; 0 is no dropout.
        rows_aligned: on a CUDA device, whether rows of x, weight and lora_a can be read 16 bytes at a time.
    """

    m: int
    n: int
    k: int
    r: int
    dtype: torch.dtype
    adapter_dtype: torch.dtype
    device: torch.device
    dropout_threshold: int
    rows_aligned: bool = False

    @property
    def has_dropout(self) -> bool:
        return self.dropout_threshold > 0

    @property
    def is_empty(self) -> bool:
        """Whether no product has an element or a term."""
        return self.m == 0 or self.n == 0 or self.k == 0

    @property
    def wide_dtype(self) -> torch.dtype:
        """Of S and dS on every backend: never below float32."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def keep_scale(self) -> float:
        """What kept elements are multiplied with: one over the exact keep probability."""
        return dropout.keep_scale(self.dropout_threshold)


def describe(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float | Tensor,
    bias: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
) -> LoraLinearProblem:
    """Check the arguments of a call and describe it.

    Raises:
        ValueError: naming the argument, what it must be and what it was.
    """
    _check_tensors(x, weight, lora_a, lora_b, bias)
    _check_scale(scale)
    threshold = dropout.threshold(dropout_p)
    if seed is not None:
        _check_seed(seed, x.device)
    n, k = weight.shape
    return LoraLinearProblem(
        m=math.prod(x.shape[:-1]),
        n=n,
        k=k,
        r=lora_a.shape[0],
        dtype=x.dtype,
        adapter_dtype=lora_a.dtype,
        device=x.device,
        dropout_threshold=threshold,
        rows_aligned=_can_be_launched_on(x) and cuda_tools.rows_aligned(x, weight, lora_a),
    )


def _can_be_launched_on(x: Tensor) -> bool:
    # Tensors that only stand for shapes, as when a graph is traced, have no addresses.
    return x.device.type == "cuda" and not isinstance(x, FakeTensor)


def _check_tensors(x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, bias: Tensor | None) -> None:
    named: Sequence[tuple[str, Tensor]] = [("x", x), ("weight", weight), ("lora_a", lora_a), ("lora_b", lora_b)]
    if bias is not None:
        named = [*named, ("bias", bias)]
    for name, tensor in named:
        checks.is_tensor(FAMILY, name, tensor)
    if x.dim() == 0:
        raise ValueError(f"{FAMILY}: x must be (..., K), got a 0-d tensor")
    checks.dims(FAMILY, "weight", weight, "(N, K)", 2)
    n, k = weight.shape
    if x.shape[-1] != k:
        raise ValueError(f"{FAMILY}: x must be (..., K) with K = {k}, weight's in-features, got {tuple(x.shape)}")
    checks.dims(FAMILY, "lora_a", lora_a, "(r, K)", 2)
    r = lora_a.shape[0]
    if r == 0:
        raise ValueError(f"{FAMILY}: lora_a must be (r, K) with rank r >= 1, got rank 0")
    checks.shape(FAMILY, "lora_a", lora_a, "(r, K)", (r, k))
    checks.shape(FAMILY, "lora_b", lora_b, "(N, r)", (n, r))
    if bias is not None:
        checks.shape(FAMILY, "bias", bias, "(N,)", (n,))

    checks.floating(FAMILY, "x", x, DTYPES)
    checks.same_dtype(FAMILY, "weight", weight, "x", x.dtype)
    wide = x.dtype if x.dtype == torch.float64 else torch.float32
    checks.same_dtype(FAMILY, "lora_a", lora_a, "x, or float32", x.dtype, wide)
    checks.same_dtype(FAMILY, "lora_b", lora_b, "lora_a", lora_a.dtype)
    if bias is not None:
        checks.same_dtype(FAMILY, "bias", bias, "x", x.dtype)
    for name, tensor in named[1:]:
        checks.same_device(FAMILY, name, tensor, "x", x.device)


def _check_scale(scale: float | Tensor) -> None:
    if isinstance(scale, Tensor):
        if scale.dim() != 0 or not scale.is_floating_point():
            raise ValueError(
                f"{FAMILY}: scale must be a float or a 0-d floating tensor, got {scale.dtype} {tuple(scale.shape)}"
            )
    elif not isinstance(scale, (int, float, torch.SymFloat, torch.SymInt)):
        raise ValueError(f"{FAMILY}: scale must be a float or a 0-d floating tensor, got {type(scale).__name__}")


def _check_seed(seed: Tensor, device: torch.device) -> None:
    if seed.dim() != 0 or seed.dtype != torch.int64:
        raise ValueError(f"{FAMILY}: seed must be a 0-d int64 tensor, got {seed.dtype} {tuple(seed.shape)}")
    checks.same_device(FAMILY, "seed", seed, "x", device)
