"""LoRA by rows with torch alone: each slot's rows as ``lora_linear`` computes them, added to the base products.

Forward   y_j = x W_j^T + bias_j; for each slot t on its rows: S = drop(x) A_t^T, y_j += scale_t S B_t^T
Backward  dX = sum of dY_j W_j; for each slot on its rows: dS = scale_t dY_j B_t, dX += drop'(dS A_t),
          dA_t = dS^T drop(x), dB_t = scale_t dY_j^T S
Tensors   as problem.Inputs; S (M, sum of widths) float32, or float64 with x, its rows in the order of ``order``
Saved     x, S and the seed
Temporary the rows of a slot, where they are no neighbours; lora_linear's otherwise
Refused   nothing. Where only the device knows the rows, each slot takes all of them and selects its own
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from peft_kernels._core.dispatch import Implementation
from peft_kernels._core.row_parts import Part, parts_of
from peft_kernels.lora.linear import torch_steps as steps
from peft_kernels.lora.linear.problem import Inputs as LinearInputs
from peft_kernels.lora.linear.problem import LoraLinearProblem
from peft_kernels.lora.linear.problem import Needs as LinearNeeds
from peft_kernels.lora.linear.torch_impl import row_invariant_form
from peft_kernels.lora.members import Gradients, Needs
from peft_kernels.lora.rows.problem import Inputs, LoraRowsProblem


@dataclass(frozen=True)
class _Update:
    """An update of one slot, as a call of ``lora_linear`` on the slot's rows; where its ranks are."""

    index: int
    linear: LoraLinearProblem
    call: LinearInputs
    ranks: slice
    columns: slice


def forward(problem: LoraRowsProblem, inputs: Inputs) -> tuple[Tensor, ...]:
    """Return y_j (M, N_j) of each member, and S (M, sum of widths)."""
    x = inputs.x
    pinned = problem.row_invariant
    ys = [steps.base(x, weight, bias, pinned) for weight, bias in zip(inputs.weights, inputs.biases, strict=True)]
    return *ys, add_updates(problem, inputs, ys)


def add_updates(problem: LoraRowsProblem, inputs: Inputs, ys: Sequence[Tensor]) -> Tensor:
    """Add each row's updates to y_j (M, N_j) of each member, in place, and return S (M, sum of widths).

    No weight is read, and a y may have another dtype than x beside float32 factors.
    """
    x = inputs.x
    # Zeros, because what is in no slot's columns would be different each time.
    s = torch.zeros(problem.m, sum(problem.widths), dtype=problem.wide_dtype, device=problem.device)
    facts = _Facts(problem, inputs)
    for part in _parts(problem, inputs):
        rows = part.take(x)
        for update in facts.updates(part, rows):
            of_rows = steps.down(update.linear, update.call)
            part.put_ordered(s[:, update.columns], of_rows)
            y = ys[problem.members[update.index]]
            some = part.take_apart(y)
            steps.add_update(_beside(update, y), some, of_rows, update.call.lora_b.t(), update.call.scale)
            part.put(y, some)
    return s


def backward(
    problem: LoraRowsProblem, inputs: Inputs, s: Tensor, dys: Sequence[Tensor | None], needs: Needs
) -> Gradients:
    """Return the gradients that ``needs`` asks for; a member whose dY is None takes part in none of them."""
    dx: Tensor | None = None
    if needs.x:
        dx = steps.sum_of_base_gradients(_any_linear(problem), dys, inputs.weights, None)
    da, db = gradients_of_updates(problem, inputs, s, dys, needs, dx)
    return Gradients(
        x=dx,
        weights=tuple(
            dy.t() @ inputs.x if need and dy is not None else None for dy, need in zip(dys, needs.weights, strict=True)
        ),
        biases=tuple(
            dy.sum(0) if need and dy is not None else None for dy, need in zip(dys, needs.biases, strict=True)
        ),
        lora_a=da,
        lora_b=db,
    )


def gradients_of_updates(
    problem: LoraRowsProblem,
    inputs: Inputs,
    s: Tensor,
    dys: Sequence[Tensor | None],
    needs: Needs,
    dx: Tensor | None,
) -> tuple[tuple[Tensor | None, ...], tuple[Tensor | None, ...]]:
    """Return dA and dB of each update, where asked for, and add all updates' parts of dX, in place, if it is there.

    As ``add_updates``, for a dY of any of its dtypes.
    """
    live = [index for index, member in enumerate(problem.members) if dys[member] is not None]
    da, db = _zeros(problem, needs)
    # All or none have dS, so that a gradient's bits do not depend on which others are asked for.
    needs_ds = needs.x or any(needs.lora_a[index] for index in live)
    if needs_ds or any(needs.lora_b[index] for index in live):
        _add_slots(problem, inputs, s, dys, needs_ds, dx, da, db)
    return tuple(_of_live(da, live)), tuple(_of_live(db, live))


def _add_slots(
    problem: LoraRowsProblem,
    inputs: Inputs,
    s: Tensor,
    dys: Sequence[Tensor | None],
    needs_ds: bool,
    dx: Tensor | None,
    da: list[Tensor | None],
    db: list[Tensor | None],
) -> None:
    """Each slot's part of dX, dA and dB, in place, those that there are."""
    facts = _Facts(problem, inputs)
    for part in _parts(problem, inputs):
        rows = None if inputs.x is None else part.take(inputs.x)
        of_dx = None if dx is None else part.take_apart(dx)
        of_dys = {member: part.take(dy) for member, dy in enumerate(dys) if dy is not None}
        for update in facts.updates(part, rows):
            dy, a, b = of_dys.get(problem.members[update.index]), da[update.index], db[update.index]
            if dy is None:
                continue
            some = None if b is None else part.take_ordered(s[:, update.columns])
            asked = LinearNeeds(needs_ds, False, needs_ds, b is not None, False)
            ds, of_b = steps.grad_up(_beside(update, dy), update.call, some, dy, asked)
            if b is not None and of_b is not None:
                b[:, update.ranks] = of_b
            if ds is not None:
                ds = part.alone(ds)
                asked = LinearNeeds(of_dx is not None, False, a is not None, False, False)
                of_a = steps.grad_down(update.linear, update.call, ds, of_dx, asked)
                if a is not None and of_a is not None:
                    a[update.ranks] = of_a
        if dx is not None and of_dx is not None:
            part.put(dx, of_dx)


def _zeros(problem: LoraRowsProblem, needs: Needs) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Gradients of the factors, where they are asked for."""
    da: list[Tensor | None] = []
    db: list[Tensor | None] = []
    for index, (r, dtype) in enumerate(zip(problem.r, problem.adapter_dtypes, strict=True)):
        n = problem.n[problem.members[index]]
        for gradients, need, shape in ((da, needs.lora_a[index], (r, problem.k)), (db, needs.lora_b[index], (n, r))):
            gradients.append(torch.zeros(shape, dtype=dtype, device=problem.device) if need else None)
    return da, db


def _of_live(gradients: list[Tensor | None], live: list[int]) -> Iterator[Tensor | None]:
    return (gradient if index in live else None for index, gradient in enumerate(gradients))


def _beside(update: _Update, y: Tensor) -> LoraLinearProblem:
    """An update's problem, for what reads y or dY and not x."""
    linear = update.linear
    return linear if y.dtype == linear.dtype else replace(linear, dtype=y.dtype)


def _parts(problem: LoraRowsProblem, inputs: Inputs) -> Iterator[Part]:
    return parts_of(problem.slots, inputs.slot, inputs.order, inputs.runs)


class _Facts:
    """What the host knows of the slots of each update."""

    def __init__(self, problem: LoraRowsProblem, inputs: Inputs) -> None:
        self.problem, self.inputs = problem, inputs
        self.tables = [table.tolist() for table in inputs.host_tables]
        # On a GPU the host reads no scale.
        is_cpu = problem.device.type == "cpu"
        self.scales = [scales.tolist() if is_cpu else list(scales.unbind()) for scales in inputs.scales]

    def updates(self, part: Part, rows: Tensor | None) -> Iterator[_Update]:
        """Those that the slot takes part in."""
        problem, inputs, t = self.problem, self.inputs, part.slot
        for index, (first, rank, threshold) in enumerate(self._of_slot(t)):
            if rank == 0:
                continue
            member, ranks, start = problem.members[index], slice(first, first + rank), problem.columns[index].start
            linear = LoraLinearProblem(
                m=part.count,
                n=problem.n[member],
                k=problem.k,
                r=rank,
                dtype=problem.dtype,
                adapter_dtype=problem.adapter_dtypes[index],
                device=problem.device,
                dropout_threshold=threshold,
                lane=problem.lanes[index],
                runs=part.runs,
                row_invariant=problem.row_invariant,
            )
            call = LinearInputs(
                rows,  # type: ignore[arg-type]
                inputs.weights[member],
                inputs.lora_a[index][ranks] if inputs.lora_a[index] is not None else None,  # type: ignore[arg-type]
                inputs.lora_b[index][:, ranks] if inputs.lora_b[index] is not None else None,  # type: ignore[arg-type]
                self.scales[index][t],
                None,
                0.0,
                inputs.seed if threshold else None,
            )
            yield _Update(index, linear, call, ranks, slice(start, start + rank))

    def _of_slot(self, t: int) -> Iterator[tuple[int, int, int]]:
        return ((table[0][t], table[1][t], table[2][t]) for table in self.tables)


def _any_linear(problem: LoraRowsProblem) -> LoraLinearProblem:
    """What base products of a call depend on."""
    return LoraLinearProblem(
        problem.m,
        0,
        problem.k,
        0,
        problem.dtype,
        problem.dtype,
        problem.device,
        0,
        row_invariant=problem.row_invariant,
    )


IMPLEMENTATION = Implementation("torch", forward, backward, row_invariant=row_invariant_form(forward, backward))
