"""The public function, its autograd, and its registration with torch.library. The only file that knows autograd.

Eager calls go through ``_BottleneckAdapter``; compiled ones through the operators ``peft_kernels::adapter``
and ``peft_kernels::adapter_backward``. Both end in ``_forward`` and ``_backward``. The residual's gradient
is dy itself, which no operator may return: the autograd formulas do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from peft_kernels._core import library
from peft_kernels._core.autocast import autocast_dtype, without_autocast
from peft_kernels._core.dispatch import Implementation, choose, requested_backend
from peft_kernels._core.graph import is_recorded
from peft_kernels.adapter import cuda_impl, torch_impl, triton_impl
from peft_kernels.adapter.problem import (
    FAMILY,
    BottleneckAdapterProblem,
    Gradients,
    Inputs,
    Needs,
    describe,
)

# In the order that `auto` tries them; the last one runs everything.
IMPLEMENTATIONS: tuple[Implementation, ...] = (
    cuda_impl.IMPLEMENTATION,
    triton_impl.IMPLEMENTATION,
    torch_impl.IMPLEMENTATION,
)


def bottleneck_adapter(
    x: Tensor,
    down_weight: Tensor,
    up_weight: Tensor,
    *,
    down_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "relu",
    scale: float | Tensor = 1.0,
    backend: str | None = None,
) -> Tensor:
    """Apply a bottleneck adapter and add it to a residual (Houlsby et al. 2019, arXiv:1902.00751).

    Semantics: ``y = residual + scale * (act(x @ down_weight.T + down_bias) @ up_weight.T + up_bias)``, where a bias or
    residual that is None adds nothing. Serial adapter: ``residual=x``, the same tensor object, is read once and its
    gradient is summed with x's own. Parallel adapter (He et al. 2022, arXiv:2110.04366): ``residual=sublayer(x)``.

    Args:
        x (..., K): float32, bfloat16, float16 or float64; any strides, but leading dimensions that do not flatten to
            one without a copy are copied. The CUDA backend also copies rows that are not contiguous or do not start at
            multiples of 16 bytes, of every matrix.
        down_weight (r, K): x's dtype or float32; a bottleneck r >= 1; as nn.Linear stores it.
        up_weight (N, r): down_weight's dtype.
        down_bias (r,), up_bias (N,): down_weight's dtype, or None.
        residual (..., N): x's dtype or float32, x's leading dimensions; strides as x's; or None.
        activation: "relu", "gelu" (with erf), "gelu_tanh", "silu", "tanh", "sigmoid", "leaky_relu" (slope 0.01) or
            "identity".
        scale: float, or 0-d floating tensor, which is never read by the host; not differentiated. Under torch.compile
            another float recompiles, as for every operator, and another tensor does not.
        backend: "torch", "triton" or "cuda" forces a backend; None takes ``use_backend``'s, then the variable
            PEFT_KERNELS_BACKEND, then chooses.

    Returns:
        y (..., N) in the residual's dtype, or in x's where there is none; under autocast in the dtype that F.linear,
        the activation and the sum would give.

    Raises:
        ValueError: a shape, dtype, device, activation or backend name is wrong.
        UnsupportedError: the forced backend cannot run this problem.

    Numerics: products accumulate in float32 (float64 for float64). Against a float64 oracle the relative error is at
    most 1.1 times that of eager torch in the same dtypes plus a quarter of the dtype's epsilon (python_ref/compare.py).
    Gradients of x, weights, biases and residual are computed only where asked for, the residual's without a copy, and
    two runs give the same bits. Besides x, which is kept only for down_weight's gradient, an (M, r) tensor is saved.

    Example:
        >>> import torch, peft_kernels as pk
        >>> x, down, up = torch.tensor([[1.0, -2.0]]), torch.eye(2), torch.ones(2, 2)
        >>> pk.bottleneck_adapter(x, down, up, residual=x, scale=0.5)
        tensor([[ 1.5000, -1.5000]])
    """
    serial = residual is not None and residual is x
    dtype = autocast_dtype(x.device.type) if isinstance(x, Tensor) else None
    if dtype is not None and x.dtype != torch.float64:
        x, residual = _cast(x, dtype), _cast_residual(residual, dtype)
        down_weight, up_weight = _cast(down_weight, dtype), _cast(up_weight, dtype)
        down_bias, up_bias = (None if bias is None else _cast(bias, dtype) for bias in (down_bias, up_bias))
        # A float32 residual stays float32 in the sum, and is then another tensor than the x of the products.
        serial = residual is not None and residual is x
    if serial:
        residual = None
    if isinstance(scale, Tensor) and isinstance(x, Tensor):
        scale = scale.to(device=x.device)

    if torch.compiler.is_compiling():
        number, tensor = (1.0, scale) if isinstance(scale, Tensor) else (scale, None)
        y, _ = torch.ops.peft_kernels.bottleneck_adapter(
            x, down_weight, up_weight, down_bias, up_bias, residual, serial, activation, number, tensor, backend
        )
        return y
    problem = describe(x, down_weight, up_weight, down_bias, up_bias, residual, serial, activation, scale)
    # Asked for here: this choice holds for the backward pass too, which may run outside a use_backend block.
    backend = requested_backend(backend)
    if not is_recorded():
        return _forward(problem, Inputs(x, down_weight, up_weight, down_bias, up_bias, residual, scale), backend)[0]
    return _BottleneckAdapter.apply(problem, backend, x, down_weight, up_weight, down_bias, up_bias, residual, scale)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    # The very same object where nothing is cast, so that `residual is x` still holds.
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _cast_residual(residual: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The residual in the dtype that its sum with a branch of ``dtype`` has."""
    return None if residual is None else _cast(residual, torch.promote_types(residual.dtype, dtype))


def _implementation(problem: BottleneckAdapterProblem, backend: str | None) -> Implementation:
    chosen = choose(FAMILY, IMPLEMENTATIONS, problem, requested_backend(backend))
    # With nothing to multiply there is nothing to launch; torch knows what empty products are.
    return torch_impl.IMPLEMENTATION if problem.is_empty else chosen


def _forward(problem: BottleneckAdapterProblem, inputs: Inputs, backend: str | None) -> tuple[Tensor, Tensor]:
    residual = inputs.residual
    flat = inputs._replace(
        x=inputs.x.reshape(problem.m, problem.k),
        residual=None if residual is None else residual.reshape(problem.m, problem.n),
    )
    with without_autocast(problem.device.type):
        y, z = _implementation(problem, backend).forward(problem, flat)
    return y.view(*inputs.x.shape[:-1], problem.n), z


def _backward(
    problem: BottleneckAdapterProblem, inputs: Inputs, z: Tensor, dy: Tensor, needs: Needs, backend: str | None
) -> Gradients:
    """Gradients of ``inputs``, of which x is read only for down_weight's; dx is shaped like dy."""
    with without_autocast(problem.device.type):
        gradients = _implementation(problem, backend).backward(
            problem, inputs, z, dy.reshape(problem.m, problem.n), needs
        )
    if gradients.x is None:
        return gradients
    return gradients._replace(x=gradients.x.view(*dy.shape[:-1], problem.k))


class _BottleneckAdapter(torch.autograd.Function):
    """Eager calls: the direct launch, with z saved, and of what exists anyway only what a gradient needs."""

    @staticmethod
    def forward(
        ctx: Any,
        problem: BottleneckAdapterProblem,
        backend: str,
        x: Tensor,
        down_weight: Tensor,
        up_weight: Tensor,
        down_bias: Tensor | None,
        up_bias: Tensor | None,
        residual: Tensor | None,
        scale: float | Tensor,
    ) -> Tensor:
        inputs = Inputs(x, down_weight, up_weight, down_bias, up_bias, residual, scale)
        y, z = _forward(problem, inputs, backend)
        if any(ctx.needs_input_grad):
            needs = Needs(*ctx.needs_input_grad[2:7])
            number, tensor = (1.0, scale) if isinstance(scale, Tensor) else (scale, None)
            ctx.problem, ctx.backend, ctx.scale = problem, backend, number
            ctx.save_for_backward(
                x if needs.down_weight else None,
                down_weight if needs.x else None,
                up_weight if needs.dz else None,
                tensor,
                z if any(needs) else None,
            )
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, down_weight, up_weight, tensor, z = ctx.saved_tensors
        needs, problem = Needs(*ctx.needs_input_grad[2:7]), ctx.problem
        grads = Gradients(None, None, None, None, None)
        if any(needs):
            flat: Any = x if x is None else x.reshape(problem.m, problem.k)
            inputs = Inputs(flat, down_weight, up_weight, None, None, None, ctx.scale if tensor is None else tensor)
            grads = _backward(problem, inputs, z, dy, needs, ctx.backend)
        return (None, None, *grads, dy if ctx.needs_input_grad[7] else None, None)


def _operator(
    x: Tensor,
    down_weight: Tensor,
    up_weight: Tensor,
    down_bias: Tensor | None,
    up_bias: Tensor | None,
    residual: Tensor | None,
    serial: bool,
    activation: str,
    scale: float,
    scale_tensor: Tensor | None,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    factor = scale if scale_tensor is None else scale_tensor
    problem = describe(x, down_weight, up_weight, down_bias, up_bias, residual, serial, activation, factor)
    return _forward(problem, Inputs(x, down_weight, up_weight, down_bias, up_bias, residual, factor), backend)


def _operator_fake(
    x: Tensor,
    down_weight: Tensor,
    up_weight: Tensor,
    down_bias: Tensor | None,
    up_bias: Tensor | None,
    residual: Tensor | None,
    serial: bool,
    activation: str,
    scale: float,
    scale_tensor: Tensor | None,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    factor = scale if scale_tensor is None else scale_tensor
    problem = describe(x, down_weight, up_weight, down_bias, up_bias, residual, serial, activation, factor)
    y = x.new_empty((*x.shape[:-1], problem.n), dtype=problem.out_dtype)
    return y, x.new_empty((problem.m, problem.r), dtype=problem.wide_dtype)


def _operator_backward(
    dy: Tensor,
    x: Tensor,
    down_weight: Tensor,
    up_weight: Tensor,
    z: Tensor,
    serial: bool,
    activation: str,
    scale: float,
    scale_tensor: Tensor | None,
    needs: list[bool],
    backend: str | None,
) -> Gradients:
    factor = scale if scale_tensor is None else scale_tensor
    # dy has the dtype and the shape of the residual, and stands for it.
    residual = None if serial else dy
    problem = describe(x, down_weight, up_weight, None, None, residual, serial, activation, factor)
    flat = Inputs(x.reshape(problem.m, problem.k), down_weight, up_weight, None, None, None, factor)
    return _backward(problem, flat, z, dy, Needs(*needs), backend)


def _operator_backward_fake(
    dy: Tensor,
    x: Tensor,
    down_weight: Tensor,
    up_weight: Tensor,
    z: Tensor,
    serial: bool,
    activation: str,
    scale: float,
    scale_tensor: Tensor | None,
    needs: list[bool],
    backend: str | None,
) -> Gradients:
    r, n = down_weight.shape[0], up_weight.shape[0]
    shapes = (x.shape, down_weight.shape, up_weight.shape, (r,), (n,))
    like = (x, down_weight, up_weight, down_weight, up_weight)
    return Gradients(
        *(tensor.new_empty(shape) if need else None for tensor, shape, need in zip(like, shapes, needs, strict=True))
    )


_WEIGHTS = "Tensor x, Tensor down_weight, Tensor up_weight"
_KIND = "bool serial, str activation, float scale, Tensor? scale_tensor"
_FORWARD = library.define(
    f"bottleneck_adapter({_WEIGHTS}, Tensor? down_bias, Tensor? up_bias, Tensor? residual, {_KIND}, str? backend)"
    " -> (Tensor, Tensor)",
    _operator,
    _operator_fake,
)
library.define(
    f"bottleneck_adapter_backward(Tensor dy, {_WEIGHTS}, Tensor z, {_KIND}, bool[] needs, str? backend)"
    " -> (Tensor?, Tensor?, Tensor?, Tensor?, Tensor?)",
    _operator_backward,
    _operator_backward_fake,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, down_weight, up_weight, _, _, _, ctx.serial, ctx.activation, ctx.scale, scale_tensor, ctx.backend = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, down_weight, up_weight, scale_tensor, output[1])


def _registered_backward(ctx: Any, dy: Tensor | None, dz: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 11
    x, down_weight, up_weight, scale_tensor, z = ctx.saved_tensors
    needed = ctx.needs_input_grad
    gradients = torch.ops.peft_kernels.bottleneck_adapter_backward(
        dy, x, down_weight, up_weight, z, ctx.serial, ctx.activation, ctx.scale, scale_tensor, needed[:5], ctx.backend
    )
    return (*gradients, dy if needed[5] else None, *(None,) * 5)


library.register_autograd(_FORWARD, _registered_backward, _setup_context)
