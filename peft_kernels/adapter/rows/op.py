"""What ``rows=`` of ``bottleneck_adapter`` runs, and the declaration that makes it an operator."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from peft_kernels._core import checks
from peft_kernels._core.autocast import without_autocast
from peft_kernels._core.dispatch import Implementation
from peft_kernels._core.operator import Operator
from peft_kernels._core.rows import Rows
from peft_kernels._core.slots import Scales, check_ranks, scales_of, table_of
from peft_kernels.adapter.rows import torch_impl, triton_impl
from peft_kernels.adapter.rows.composite import composite
from peft_kernels.adapter.rows.problem import NAME, AdapterRowsProblem, Gradients, Inputs, Needs, make_problem


def adapter_rows(
    x: Tensor,
    weights: tuple[Tensor, Tensor],
    biases: tuple[Tensor | None, Tensor | None],
    residual: Tensor | None,
    serial: bool,
    activation: str,
    scale: Scales,
    rows: Rows,
    ranks: Sequence[int] | None,
    backend: str | None = None,
) -> Tensor:
    """Apply to each row the adapter that it uses.

    ``y[m] = residual[m] + s_t (act(x[m] Wd_t^T + bd_t) Wu_t^T + bu_t),  t = rows.slot[m]``

    Args:
        x (..., K): its leading dimensions hold as many rows as ``rows`` has.
        weights, biases: down and up of all slots, as ``bottleneck_adapter`` has them with ``rows``; autocast is done.
        residual, serial: another tensor, or None; whether x is the residual.
        activation, scale, rows, ranks, backend: as ``bottleneck_adapter``'s.

    Returns:
        y (..., N). A row without an adapter has the residual's bits, or zeros.

    Raises:
        ValueError: a shape, dtype, device, rank, activation or backend name is wrong.
        UnsupportedError: the forced backend cannot run this problem.
    """
    return OPERATOR(call_of(x, weights, biases, residual, serial, activation, scale, rows, ranks), backend)


def call_of(
    x: Tensor,
    weights: tuple[Tensor, Tensor],
    biases: tuple[Tensor | None, Tensor | None],
    residual: Tensor | None,
    serial: bool,
    activation: str,
    scale: Scales,
    rows: Rows,
    ranks: Sequence[int] | None,
) -> Inputs:
    """The operator's arguments; as ``adapter_rows``."""
    if not isinstance(rows, Rows):
        raise ValueError(f"{NAME}: rows must be a Rows, as Rows.of makes it, got {type(rows).__name__}")
    down = weights[0]
    if not isinstance(down, Tensor) or down.dim() != 2:
        got = tuple(down.shape) if isinstance(down, Tensor) else type(down).__name__
        raise ValueError(f"{NAME}: down_weight must be (sum of ranks, K), got {got}")
    known = check_ranks(NAME, ranks, "down_weight", down.shape[0])
    device, dtype = rows.slot.device, checks.wide_dtype(x.dtype) if isinstance(x, Tensor) else torch.float32
    scales = scales_of(NAME, scale, rows.slots, dtype, device)
    table = table_of(known, down.device)
    return Inputs(
        x, *weights, *biases, residual, serial, activation, scales, table, known,
        rows.slot, rows.order, rows.first, rows.runs,
    )  # fmt: skip


def _flat(problem: AdapterRowsProblem, call: Inputs) -> Inputs:
    x = call.x if call.x is None else call.x.reshape(problem.m, problem.k)
    residual = None if call.residual is None else call.residual.reshape(problem.m, problem.n)
    return call._replace(x=x, residual=residual)


def _forward(problem: AdapterRowsProblem, call: Inputs, implementation: Implementation) -> tuple[Tensor, Tensor]:
    with without_autocast(problem.device.type):
        y, z = implementation.forward(problem, _flat(problem, call))
    return y.view(*call.x.shape[:-1], problem.n), z


def _backward(
    problem: AdapterRowsProblem,
    call: Inputs,
    kept: tuple[Tensor],
    dy: Tensor,
    needs: Needs,
    implementation: Implementation,
) -> Gradients:
    with without_autocast(problem.device.type):
        of_rows = dy.reshape(problem.m, problem.n)
        gradients: Gradients = implementation.backward(problem, _flat(problem, call), *kept, of_rows, needs)
    return gradients if gradients.x is None else gradients._replace(x=gradients.x.view(*dy.shape[:-1], problem.k))


def _results(problem: AdapterRowsProblem, call: Inputs, implementation: Implementation) -> tuple[Tensor, Tensor]:
    y = call.x.new_empty((*call.x.shape[:-1], problem.n), dtype=problem.out_dtype)
    return y, call.x.new_empty((problem.m, problem.width), dtype=problem.wide_dtype)


def _reads(needs: Needs) -> Iterable[str]:
    yield from ("table", "scales", "slot", "order", "first", "runs")
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
    implementations=(triton_impl.IMPLEMENTATION, torch_impl.IMPLEMENTATION),
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
)
