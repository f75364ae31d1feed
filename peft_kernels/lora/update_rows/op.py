"""What ``rows=`` of ``lora_update`` runs, and the declaration that makes it an operator."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from peft_kernels._core import checks
from peft_kernels._core.dispatch import Implementation
from peft_kernels._core.operator import Operator
from peft_kernels._core.rows import Rows
from peft_kernels._core.slots import Scales, scales_of
from peft_kernels.lora import members
from peft_kernels.lora.kernels import dropout
from peft_kernels.lora.rows.op import Probabilities, SlotUpdate, slots_of_member
from peft_kernels.lora.update.problem import Needs, cast_for_y
from peft_kernels.lora.update_rows import torch_impl, triton_impl
from peft_kernels.lora.update_rows.composite import composite
from peft_kernels.lora.update_rows.native import native
from peft_kernels.lora.update_rows.problem import NAME, Inputs, LoraUpdateRowsProblem, make_problem


def update_rows_call(
    y: Tensor,
    x: Tensor,
    update: SlotUpdate,
    rows: Rows,
    seed: int | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """A given y, and on each row the update of the adapter that the row uses.

    ``y'[m] = y[m] + s_t (drop_t(x[m]) A_t^T) B_t^T,  t = rows.slot[m]``

    Args:
        y, x: as ``lora_update``'s; x has as many rows as ``rows``.
        update: of the one member that there is, by its first lane.
        rows: on x's device.
        seed, backend: as ``lora_update``'s. A row's mask is that which it would have without ``rows``.

    Returns:
        y' (..., N) in y's dtype, a tensor of its own. A row without an adapter has y's bits.

    Raises:
        ValueError: a shape, dtype, device, probability, seed or backend name is wrong.
        UnsupportedError: the forced backend cannot run this problem.
    """
    if not isinstance(rows, Rows):
        raise ValueError(f"{NAME}: rows must be a Rows, as Rows.of makes it, got {type(rows).__name__}")
    x, lora_a, lora_b = cast_for_y(y, x, update.lora_a, update.lora_b)
    table = update.table
    seed_tensor: Tensor | None = None
    if table.drops:
        seed_tensor = dropout.draw_seed(x.device) if seed is None else dropout.as_seed(seed, x.device, NAME)
    dtype = checks.wide_dtype(x.dtype) if isinstance(x, Tensor) else torch.float32
    scales = scales_of(NAME, update.scales, rows.slots, dtype, rows.slot.device)
    plan = rows.slot, rows.order, rows.first, rows.runs
    call = Inputs(x, y, lora_a, lora_b, scales, table.device, table.host, table.width, *plan, seed_tensor)
    made: Tensor = OPERATOR(call, backend)
    return made


def update_by_rows(
    y: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: Scales,
    rows: Rows,
    ranks: Sequence[int] | None,
    dropout_p: Probabilities,
    seed: int | Tensor | None,
    backend: str | None,
) -> Tensor:
    """``lora_update`` with ``rows``."""
    update = slots_of_member(0, lora_a, lora_b, scale, ranks, dropout_p, rows, NAME)
    return update_rows_call(y, x, update, rows, seed, backend)


def _results(problem: LoraUpdateRowsProblem, call: Inputs, implementation: Implementation) -> tuple[Tensor, Tensor]:
    y = call.y.new_empty((*call.x.shape[:-1], problem.n))
    return y, call.x.new_empty((problem.m, problem.width), dtype=problem.wide_dtype)


def _reads(needs: Needs) -> Iterable[str]:
    if any(needs):
        yield from ("table", "host_table", "scales", "slot", "order", "first", "runs")
    if needs.x or needs.lora_a:
        yield from ("seed", "lora_b")
    if needs.x:
        yield "lora_a"
    if needs.lora_a:
        yield "x"
    if needs.lora_b:
        yield "s"


OPERATOR = Operator(
    name=NAME,
    call=Inputs,
    needs=Needs,
    implementations=(triton_impl.IMPLEMENTATION, torch_impl.IMPLEMENTATION),
    make_problem=make_problem,
    forward=members.forward_of_given,
    backward=members.backward_of_one,
    results=_results,
    composite=composite,
    reads=_reads,
    varying=("m",),
    kept=("s",),
    activations=("x", "y"),
    adds=("y",),
    passes="y",
    native=native,
)
