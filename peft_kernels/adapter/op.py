"""The public function, and the declaration that makes it an operator."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from peft_kernels._core.autocast import autocast_dtype, without_autocast
from peft_kernels._core.dispatch import Implementation
from peft_kernels._core.operator import Operator
from peft_kernels._core.rows import Rows
from peft_kernels._core.slots import Scales
from peft_kernels.adapter import cuda_impl, torch_impl, triton_impl
from peft_kernels.adapter.composite import composite
from peft_kernels.adapter.native import native
from peft_kernels.adapter.problem import NAME, BottleneckAdapterProblem, Gradients, Inputs, Needs, make_problem
from peft_kernels.adapter.rows.op import adapter_rows


def bottleneck_adapter(
    x: Tensor,
    down_weight: Tensor,
    up_weight: Tensor,
    *,
    down_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "relu",
    scale: Scales = 1.0,
    rows: Rows | None = None,
    ranks: Sequence[int] | None = None,
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
        scale: float, or 0-d floating tensor, which is never read by the host; not differentiated. With ``rows`` also
            one for each slot: floats, or a floating tensor (T,), which the host does not read on a GPU.
        rows: which adapter each row uses, a ``Rows`` with T slots on x's device: ``y[m] = residual[m] + scale_t *
            (act(x[m] @ down_t.T + down_bias_t) @ up_t.T + up_bias_t)``, t = rows.slot[m]. A row without a slot, or
            whose slot has rank 0, has the residual's bits, or zeros where there is none. Weights are then stacked:
            down_weight (sum of ranks, K) and down_bias (sum of ranks,), the slots' under each other, up_weight (N, sum
            of ranks), side by side, up_bias (T, N). A slot without rows has zeros in their gradients.
        ranks: the width of each slot, T ints; with ``rows``.
        backend: "torch", "triton" or "cuda" forces a backend; None takes ``use_backend``'s, then the variable
            PEFT_KERNELS_BACKEND, then chooses.

    Returns:
        y (..., N) in the residual's dtype, or in x's where there is none; under autocast in the dtype that F.linear,
        the activation and the sum would give.

    Raises:
        ValueError: a shape, dtype, device, activation or backend name is wrong.
        UnsupportedError: the forced backend cannot run this problem.

    Numerics: products accumulate in float32 (float64 for float64). Against a float64 oracle the relative error is at
    most 1.1 times that of eager torch in the same dtypes plus one epsilon of float32, or a quarter of half precision's,
    over enough values that chance evens out (``peft_kernels.testing``).
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
    if rows is not None:
        weights, biases = (down_weight, up_weight), (down_bias, up_bias)
        return adapter_rows(x, weights, biases, residual, serial, activation, scale, rows, ranks, backend)
    if ranks is not None:
        raise ValueError(f"{NAME}: ranks are for rows, which are None, got {ranks!r}")
    if isinstance(scale, Tensor) and isinstance(x, Tensor):
        scale = scale.to(device=x.device)
    elif isinstance(scale, bool):
        scale = float(scale)

    call = Inputs(x, down_weight, up_weight, down_bias, up_bias, residual, serial, activation, scale)  # type: ignore[arg-type]
    return OPERATOR(call, backend)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    # The very same object where nothing is cast, so that `residual is x` still holds.
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _cast_residual(residual: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The residual in the dtype that its sum with a branch of ``dtype`` has."""
    return None if residual is None else _cast(residual, torch.promote_types(residual.dtype, dtype))


def _flat(problem: BottleneckAdapterProblem, call: Inputs) -> Inputs:
    x = call.x if call.x is None else call.x.reshape(problem.m, problem.k)
    residual = None if call.residual is None else call.residual.reshape(problem.m, problem.n)
    return call._replace(x=x, residual=residual)


def _forward(problem: BottleneckAdapterProblem, call: Inputs, implementation: Implementation) -> tuple[Tensor, Tensor]:
    with without_autocast(problem.device.type):
        y, z = implementation.forward(problem, _flat(problem, call))
    return y.view(*call.x.shape[:-1], problem.n), z


def _backward(
    problem: BottleneckAdapterProblem,
    call: Inputs,
    kept: tuple[Tensor],
    dy: Tensor,
    needs: Needs,
    implementation: Implementation,
) -> Gradients:
    with without_autocast(problem.device.type):
        rows = dy.reshape(problem.m, problem.n)
        gradients: Gradients = implementation.backward(problem, _flat(problem, call), *kept, rows, needs)
    return gradients if gradients.x is None else gradients._replace(x=gradients.x.view(*dy.shape[:-1], problem.k))


def _results(problem: BottleneckAdapterProblem, call: Inputs, implementation: Implementation) -> tuple[Tensor, Tensor]:
    y = call.x.new_empty((*call.x.shape[:-1], problem.n), dtype=problem.out_dtype)
    return y, call.x.new_empty((problem.m, problem.r), dtype=problem.wide_dtype)


def _reads(needs: Needs) -> Iterable[str]:
    if needs.dz or needs.up_weight:
        yield "z"
    if needs.dz:
        yield "up_weight"
    if needs.x:
        yield "down_weight"
    if needs.down_weight:
        yield "x"


OPERATOR = Operator(
    name=NAME,
    call=Inputs,
    needs=Needs,
    implementations=(cuda_impl.IMPLEMENTATION, triton_impl.IMPLEMENTATION, torch_impl.IMPLEMENTATION),
    make_problem=make_problem,
    forward=_forward,
    backward=_backward,
    results=_results,
    composite=composite,
    reads=_reads,
    varying=("m",),
    kept=("z",),
    activations=("x", "residual"),
    adds=("residual", "up_bias"),
    passes="residual",
    native=native,
)
