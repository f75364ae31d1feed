"""What a bottleneck adapter call is made of: the tensors, the facts that backends decide on, and every check, once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from peft_kernels._core import checks
from peft_kernels.adapter.kernels.activations import ACTIVATIONS

FAMILY = "bottleneck_adapter"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Inputs(NamedTuple):
    """The tensors of one call, ``x`` and ``residual`` flattened to two dimensions.

    Attributes:
        x: (M, K), any strides.
        down_weight: (r, K), in x's dtype or float32, as nn.Linear stores it.
        up_weight: (N, r), in down_weight's dtype.
        down_bias: (r,) in down_weight's dtype, or None.
        up_bias: (N,) in down_weight's dtype, or None.
        residual: (M, N), in x's dtype or float32, any strides; None where the problem is serial or has none.
        scale: float, or a 0-d tensor on x's device.
    """

    x: Tensor
    down_weight: Tensor
    up_weight: Tensor
    down_bias: Tensor | None
    up_bias: Tensor | None
    residual: Tensor | None
    scale: float | Tensor


class Needs(NamedTuple):
    """Which gradients a backward pass is asked for. The residual's is dy itself and asks for nothing."""

    x: bool
    down_weight: bool
    up_weight: bool
    down_bias: bool
    up_bias: bool

    @property
    def dz(self) -> bool:
        """Whether the gradient of the pre-activation is on the way to one of them."""
        return self.x or self.down_weight or self.down_bias


class Gradients(NamedTuple):
    """Gradients of one call, None where not asked for; shapes and dtypes are those of ``Inputs``."""

    x: Tensor | None
    down_weight: Tensor | None
    up_weight: Tensor | None
    down_bias: Tensor | None
    up_bias: Tensor | None


@dataclass(frozen=True)
class BottleneckAdapterProblem:
    """The facts that choose a backend and its configs.

    Attributes:
        m, n, k, r: tokens, out-features, in-features, width of the bottleneck.
        dtype: of x and its gradient.
        adapter_dtype: of the weights and biases.
        out_dtype: of the result: the residual's, or x's where there is none.
        serial: whether x is the residual.
        activation: a name of ``ACTIVATIONS``.
        device: of all tensors.
    """

    m: int
    n: int
    k: int
    r: int
    dtype: torch.dtype
    adapter_dtype: torch.dtype
    out_dtype: torch.dtype
    serial: bool
    activation: str
    device: torch.device

    @property
    def is_empty(self) -> bool:
        """Whether no product has an element or a term."""
        return self.m == 0 or self.n == 0 or self.k == 0

    @property
    def is_mixed(self) -> bool:
        """Whether float32 weights meet half-precision activations, so that no product may round a weight."""
        return self.adapter_dtype != self.dtype

    @property
    def wide_dtype(self) -> torch.dtype:
        """Of z and dz on every backend: never below float32."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32


def describe(
    x: Tensor,
    down_weight: Tensor,
    up_weight: Tensor,
    down_bias: Tensor | None,
    up_bias: Tensor | None,
    residual: Tensor | None,
    serial: bool,
    activation: str,
    scale: float | Tensor,
) -> BottleneckAdapterProblem:
    """Check the arguments of a call and describe it. Where ``serial``, x is the residual and ``residual`` is None.

    Raises:
        ValueError: naming the argument, what it must be and what it was.
    """
    _check_tensors(x, down_weight, up_weight, down_bias, up_bias)
    n, r = up_weight.shape
    if serial or residual is not None:
        _check_residual(x if residual is None else residual, x, n)
    if activation not in ACTIVATIONS:
        raise ValueError(f"{FAMILY}: activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    _check_scale(scale)
    return BottleneckAdapterProblem(
        m=math.prod(x.shape[:-1]),
        n=n,
        k=x.shape[-1],
        r=r,
        dtype=x.dtype,
        adapter_dtype=down_weight.dtype,
        out_dtype=x.dtype if residual is None else residual.dtype,
        serial=serial,
        activation=activation,
        device=x.device,
    )


def _check_tensors(
    x: Tensor, down_weight: Tensor, up_weight: Tensor, down_bias: Tensor | None, up_bias: Tensor | None
) -> None:
    adapter = [("down_weight", down_weight), ("up_weight", up_weight)]
    adapter += [(name, bias) for name, bias in (("down_bias", down_bias), ("up_bias", up_bias)) if bias is not None]
    for name, tensor in [("x", x), *adapter]:
        checks.is_tensor(FAMILY, name, tensor)
    if x.dim() == 0:
        raise ValueError(f"{FAMILY}: x must be (..., K), got a 0-d tensor")
    checks.dims(FAMILY, "down_weight", down_weight, "(r, K)", 2)
    r, k = down_weight.shape
    if x.shape[-1] != k:
        raise ValueError(f"{FAMILY}: x must be (..., K) with K = {k}, down_weight's in-features, got {tuple(x.shape)}")
    if r == 0:
        raise ValueError(f"{FAMILY}: down_weight must be (r, K) with a bottleneck r >= 1, got r = 0")
    checks.dims(FAMILY, "up_weight", up_weight, "(N, r)", 2)
    n = up_weight.shape[0]
    checks.shape(FAMILY, "up_weight", up_weight, "(N, r)", (n, r))
    if down_bias is not None:
        checks.shape(FAMILY, "down_bias", down_bias, "(r,)", (r,))
    if up_bias is not None:
        checks.shape(FAMILY, "up_bias", up_bias, "(N,)", (n,))

    checks.floating(FAMILY, "x", x, DTYPES)
    wide = x.dtype if x.dtype == torch.float64 else torch.float32
    checks.same_dtype(FAMILY, "down_weight", down_weight, "x, or float32", x.dtype, wide)
    for name, tensor in adapter[1:]:
        checks.same_dtype(FAMILY, name, tensor, "down_weight", down_weight.dtype)
    for name, tensor in adapter:
        checks.same_device(FAMILY, name, tensor, "x", x.device)


def _check_residual(residual: Tensor, x: Tensor, n: int) -> None:
    checks.is_tensor(FAMILY, "residual", residual)
    checks.shape(FAMILY, "residual", residual, "(..., N), x's leading dimensions and N,", (*x.shape[:-1], n))
    wide = x.dtype if x.dtype == torch.float64 else torch.float32
    checks.same_dtype(FAMILY, "residual", residual, "x, or float32", x.dtype, wide)
    checks.same_device(FAMILY, "residual", residual, "x", x.device)


def _check_scale(scale: float | Tensor) -> None:
    if isinstance(scale, Tensor):
        if scale.dim() != 0 or not scale.is_floating_point():
            raise ValueError(
                f"{FAMILY}: scale must be a float or a 0-d floating tensor, got {scale.dtype} {tuple(scale.shape)}"
            )
    elif not isinstance(scale, (int, float, torch.SymFloat, torch.SymInt)):
        raise ValueError(f"{FAMILY}: scale must be a float or a 0-d floating tensor, got {type(scale).__name__}")
