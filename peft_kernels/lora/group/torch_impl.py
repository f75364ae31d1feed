"""LoRA group with torch alone: members share S's product where they have no masks, and one dX.

Forward   S = [drop_1(x) A_1^T | ...]; y_j as ``lora_linear``'s
Backward  dS_l = scale_l dY_j B_l;  dB_l = scale_l dY_j^T S_l;  dA_l = dS_l^T drop_l(x)
          dX = sum of drop'_l(dS_l A_l) + sum of dY_j W_j, the narrowest first
Tensors   as problem.Inputs; S (M, sum of r) float32, or float64 with x
Saved     x, S and the seed
Temporary as lora_linear's; the sum of masked updates is made in S's dtype for a block of rows at a time
Refused   nothing
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from peft_kernels._core.dispatch import Implementation
from peft_kernels.lora.group.problem import Inputs, LoraGroupProblem
from peft_kernels.lora.linear import torch_steps as steps
from peft_kernels.lora.linear.problem import Inputs as LinearInputs
from peft_kernels.lora.linear.problem import LoraLinearProblem
from peft_kernels.lora.linear.problem import Needs as LinearNeeds
from peft_kernels.lora.linear.torch_impl import row_invariant_form
from peft_kernels.lora.members import Gradients, Needs


def forward(problem: LoraGroupProblem, inputs: Inputs) -> tuple[Tensor, ...]:
    """Return y_j (M, N_j) of each member, and S (M, sum of r)."""
    products = [steps.down(*_joined(problem, inputs, run)) for run in _products(problem, problem.runs_of_all)]
    is_apart = len(products) == len(problem.r)
    parts = products if is_apart else list(_together(products, 1).split(problem.r, dim=1))
    ys = []
    for member, bias in enumerate(inputs.biases):
        first, *others = problem.of_members[member] or (None,)
        if first is None:
            ys.append(steps.base(inputs.x, inputs.weights[member], bias, problem.row_invariant))
            continue
        y = steps.up(problem.linears[first], inputs.update(first), parts[first])
        for index in others:
            b, scale = inputs.lora_b[index].t(), inputs.scales[index]
            steps.add_update(problem.linears[index], y, parts[index], b, scale)
        ys.append(y)
    return *ys, _together([product.to(problem.wide_dtype) for product in products], 1)


def backward(
    problem: LoraGroupProblem, inputs: Inputs, s: Tensor, dys: Sequence[Tensor | None], needs: Needs
) -> Gradients:
    """Return the gradients that ``needs`` asks for; a member whose dY is None takes part in none of them."""
    live = tuple(index for index, member in enumerate(problem.members) if dys[member] is not None)
    needs_ds = needs.x or any(needs.lora_a[index] for index in live)
    ds: dict[int, Tensor] = {}
    da: list[Tensor | None] = [None] * len(problem.r)
    db: list[Tensor | None] = [None] * len(problem.r)
    for index in live:
        # All or none have dS, so that a gradient's bits do not depend on which others are asked for.
        asked = LinearNeeds(needs_ds, False, needs_ds, needs.lora_b[index], False)
        if any(asked):
            dy = dys[problem.members[index]]
            assert dy is not None
            part = s[:, problem.columns[index]] if needs.lora_b[index] else None
            made, db[index] = steps.grad_up(problem.linears[index], inputs.without_weight(index), part, dy, asked)
            if made is not None:
                ds[index] = made
    dx: Tensor | None = None
    for updates in _products(problem, problem.runs(tuple(ds))):
        if problem.thresholds[updates[0]] == 0:
            dx = _unmasked(problem, inputs, updates, ds, needs, dx, da)
    masked = tuple(index for index in ds if problem.thresholds[index])
    if masked:
        dx = _masked(problem, inputs, masked, ds, needs, dx, da)
    return Gradients(
        x=steps.sum_of_base_gradients(problem.linears[0], dys, inputs.weights, dx) if needs.x else None,
        weights=tuple(
            dy.t() @ inputs.x if need and dy is not None else None for dy, need in zip(dys, needs.weights, strict=True)
        ),
        biases=tuple(
            dy.sum(0) if need and dy is not None else None for dy, need in zip(dys, needs.biases, strict=True)
        ),
        lora_a=tuple(da),
        lora_b=tuple(db),
    )


def _products(problem: LoraGroupProblem, runs: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], ...]:
    """What of runs is one product with x: a mask is an update's own."""
    if not any(problem.thresholds):
        return runs
    return tuple(
        part for run in runs for part in ((run,) if problem.thresholds[run[0]] == 0 else tuple((i,) for i in run))
    )


def _together(parts: Sequence[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)


def _joined(
    problem: LoraGroupProblem, inputs: Inputs, updates: tuple[int, ...]
) -> tuple[LoraLinearProblem, LinearInputs]:
    """A run as one update, as far as A goes: their ranks under each other."""
    call = inputs.without_weight(updates[0])
    if len(updates) == 1:
        return problem.linears[updates[0]], call
    if call.lora_a is not None:  # else no one reads it
        call = call._replace(lora_a=torch.cat([inputs.lora_a[index] for index in updates]))
    return problem.joined(updates), call


def _unmasked(
    problem: LoraGroupProblem,
    inputs: Inputs,
    updates: tuple[int, ...],
    ds: dict[int, Tensor],
    needs: Needs,
    dx: Tensor | None,
    da: list[Tensor | None],
) -> Tensor | None:
    """dX += dS A of a run without masks, where it is asked for, and its dA, each as one product."""
    joined, call = _joined(problem, inputs, updates)
    together = _together([ds[index] for index in updates], 1)
    if needs.x and dx is None:
        dx = steps.update_of(joined, together, call.lora_a, 1.0, None)
    elif dx is not None:
        steps.add_update(joined, dx, together, call.lora_a, 1.0)
    asked = [index for index in updates if needs.lora_a[index]]
    if asked:
        only_a = LinearNeeds(False, False, True, False, False)
        found = steps.grad_down(joined, call, together, None, only_a)
        assert found is not None
        for index, part in zip(updates, found.split([problem.r[index] for index in updates]), strict=True):
            if index in asked:
                # A view of it would keep the others' gradients alive.
                da[index] = part.clone() if len(updates) > 1 else part
    return dx


def _masked(
    problem: LoraGroupProblem,
    inputs: Inputs,
    updates: tuple[int, ...],
    ds: dict[int, Tensor],
    needs: Needs,
    dx: Tensor | None,
    da: list[Tensor | None],
) -> Tensor | None:
    """dX += drop'(dS A) of updates with masks, summed before it is rounded, and their dA: a draw of each mask."""
    made = torch.empty(problem.m, problem.k, dtype=problem.dtype, device=problem.device) if needs.x else None
    dtype = problem.wide_dtype
    wide = {index: (ds[index].to(dtype), inputs.lora_a[index].to(dtype)) for index in updates if needs.x}
    narrow = {index: ds[index].to(problem.adapter_dtypes[index]) for index in updates if needs.lora_a[index]}
    sums: dict[int, Tensor] = {}
    # Blocks of a quarter of the rows that one update has, since up to three of them are there at once, in S's dtype.
    for rows in steps.blocks(problem.linears[updates[0]], 4 * problem.k):
        total: Tensor | None = None
        for index in updates:
            linear, call = problem.linears[index], inputs.without_weight(index)
            mask = steps.mask_of_rows(linear, call, rows)
            assert mask is not None
            if needs.x:
                if total is None:
                    total = mask.drop(
                        steps.product(linear, wide[index][0][rows], wide[index][1]), dtype, linear.keep_scale
                    )
                else:
                    steps.add_dropped(linear, mask, total, wide[index][0][rows], wide[index][1])
            if needs.lora_a[index]:
                found = (narrow[index][rows].t() @ steps.dropped(linear, call, rows, mask)).to(dtype)
                sums[index] = found if index not in sums else sums[index].add_(found)
        if made is not None and total is not None:
            made[rows] = total if dx is None else total.add_(dx[rows])
    for index, total in sums.items():
        linear = problem.linears[index]
        da[index] = total.mul_(steps.late_factor(linear)).to(problem.adapter_dtypes[index])
    return made


IMPLEMENTATION = Implementation("torch", forward, backward, row_invariant=row_invariant_form(forward, backward))
