"""Capability record of the Triton backend, and the order of its launches. Imports the kernels only to launch them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from peft_kernels._core import triton_tools
from peft_kernels._core.dispatch import ROW_INVARIANT, Implementation
from peft_kernels.lora import qualification
from peft_kernels.lora.group.problem import Inputs, LoraGroupProblem
from peft_kernels.lora.kernels import config
from peft_kernels.lora.kernels.dropout import NO_DROPOUT, Lanes
from peft_kernels.lora.linear.problem import Needs as LinearNeeds
from peft_kernels.lora.linear.problem import of_row_invariant
from peft_kernels.lora.linear.triton_impl import Launches, add_base, base, base_gradient
from peft_kernels.lora.members import Gradients, Needs, by_width

Run = tuple[int, ...]
Term = tuple[Tensor, Tensor, float | Tensor]


def why_not(problem: LoraGroupProblem) -> str | None:
    """Reason why the kernels cannot run this problem, or None."""
    sizes = problem.m, max(problem.n), problem.k
    return triton_tools.why_not_tensors(problem.device, problem.dtype, "M, N and K", *sizes)


def forward(problem: LoraGroupProblem, inputs: Inputs) -> tuple[Tensor, ...]:
    """Return y_j (M, N_j) of each member, and S (M, sum of r) float32."""
    x = inputs.x
    s = torch.empty(problem.m, sum(problem.r), dtype=torch.float32, device=problem.device)
    for run in problem.runs_of_all:
        launches, lanes = _launches(problem, inputs, run)
        factor, out = problem.linears[run[0]].keep_scale, s[:, _between(problem.columns, run)]
        launches.narrow_product(x, _joined(inputs.lora_a, run), factor, launches.dropout, out, lanes)
    ys = []
    for member, bias in enumerate(inputs.biases):
        updates = problem.of_members[member]
        if not updates:
            ys.append(base(x, inputs.weights[member], bias, problem.row_invariant))
            continue
        launches, _ = _launches(problem, inputs, updates[:1])
        term, adapter = _term(problem, inputs, s, updates), problem.adapter_dtypes[updates[0]]
        if config.writes_update_first(problem.dtype, adapter, bias is not None):
            y = launches.rank_product(problem.dtype, term, bias, NO_DROPOUT)
            add_base(y, x, inputs.weights[member].t(), problem.row_invariant)
        else:
            y = base(x, inputs.weights[member], bias, problem.row_invariant)
            launches.add_rank_product(y, term)
        ys.append(y)
    return *ys, s


def backward(
    problem: LoraGroupProblem, inputs: Inputs, s: Tensor, dys: Sequence[Tensor | None], needs: Needs
) -> Gradients:
    """Return the gradients that ``needs`` asks for; a member whose dY is None takes part in none of them."""
    live = tuple(index for index, member in enumerate(problem.members) if dys[member] is not None)
    da: list[Tensor | None] = [None] * len(problem.r)
    db: list[Tensor | None] = [None] * len(problem.r)
    dbias: list[Tensor | None] = [None] * len(problem.n)
    columns = _packed(problem, live)
    # All or none have dS, so that a gradient's bits do not depend on which others are asked for.
    needs_ds = needs.x or any(needs.lora_a[index] for index in live)
    rank = sum(problem.r[index] for index in live)
    ds = torch.empty(problem.m, rank if needs_ds else 0, dtype=torch.float32, device=problem.device)
    for index in live:
        member = problem.members[index]
        dy = dys[member]
        assert dy is not None
        asked = LinearNeeds(
            x=needs_ds,
            weight=False,
            lora_a=needs_ds,
            lora_b=needs.lora_b[index],
            bias=needs.biases[member] and index == problem.of_members[member][0],
        )
        launches, _ = _launches(problem, inputs, (index,))
        if not any(asked):
            continue
        out = ds[:, columns[index]] if needs_ds else None
        part = s[:, problem.columns[index]] if asked.lora_b else None
        _, made, bias = launches.narrow_and_reduce(dy, part, inputs.lora_b[index], inputs.scales[index], asked, out)
        db[index] = None if made is None else made.to(problem.adapter_dtypes[index])
        dbias[member] = bias if bias is not None else dbias[member]
    dx = None
    for run in problem.runs(live):
        if needs.x:
            dx = _add_updates(problem, inputs, run, ds[:, _between(columns, run)], dx)
        if any(needs.lora_a[index] for index in run):
            launches, lanes = _launches(problem, inputs, run)
            factor, of_run = problem.linears[run[0]].keep_scale, ds[:, _between(columns, run)]
            found = launches.reduce_rows(inputs.x, of_run, factor, launches.dropout, lanes)
            for index, part in zip(run, found.split([problem.r[index] for index in run]), strict=True):
                if needs.lora_a[index]:
                    # A view would keep the others' gradients alive.
                    da[index] = part.to(problem.adapter_dtypes[index], copy=len(run) > 1)
    return Gradients(
        x=_with_bases(problem, inputs, dys, dx) if needs.x else None,
        weights=tuple(
            dy.t() @ inputs.x if need and dy is not None else None for dy, need in zip(dys, needs.weights, strict=True)
        ),
        biases=tuple(
            _bias_gradient(problem, dy, made) if need and dy is not None else None
            for dy, made, need in zip(dys, dbias, needs.biases, strict=True)
        ),
        lora_a=tuple(da),
        lora_b=tuple(db),
    )


def _launches(problem: LoraGroupProblem, inputs: Inputs, run: Run) -> tuple[Launches, Lanes | None]:
    """The launches of a run of updates, and their lanes where they are several with masks."""
    linear = problem.joined(run)
    launches = Launches.of(linear, inputs.without_weight(run[0]))
    if len(run) == 1 or not linear.has_dropout:
        return launches, None
    return launches, Lanes(tuple(problem.r[index] for index in run), tuple(problem.lanes[index] for index in run))


def _joined(factors: Sequence[Tensor], run: Run, dim: int = 0) -> Tensor:
    return factors[run[0]] if len(run) == 1 else torch.cat([factors[index] for index in run], dim=dim)


def _packed(problem: LoraGroupProblem, live: Run) -> dict[int, slice]:
    """Where each update stands in dS, which has no column for the others."""
    columns, start = {}, 0
    for index in live:
        columns[index] = slice(start, start + problem.r[index])
        start += problem.r[index]
    return columns


def _between(columns: dict[int, slice] | tuple[slice, ...], run: Run) -> slice:
    """The columns of neighbours."""
    return slice(columns[run[0]].start, columns[run[-1]].stop)


def _term(problem: LoraGroupProblem, inputs: Inputs, s: Tensor, updates: Run) -> Term:
    """What the updates of a member add to its y, as one rank product; scales of several are put into S, in float32."""
    of_member = s[:, _between(problem.columns, updates)]
    if len(updates) == 1:
        return of_member, inputs.lora_b[updates[0]], inputs.scales[updates[0]]
    scaled = torch.cat([s[:, problem.columns[index]] * inputs.scales[index] for index in updates], dim=1)
    kinds = {problem.adapter_dtypes[index] for index in updates}
    factors = inputs.lora_b if len(kinds) == 1 else tuple(b.float() for b in inputs.lora_b)
    return scaled, _joined(factors, updates, dim=1), 1.0


def _add_updates(problem: LoraGroupProblem, inputs: Inputs, run: Run, ds: Tensor, dx: Tensor | None) -> Tensor:
    """dX += drop'(dS A) of a run, or its first part."""
    launches, lanes = _launches(problem, inputs, run)
    term = ds, _joined(inputs.lora_a, run).t(), 1.0
    if dx is None:
        return launches.rank_product(problem.dtype, term, None, launches.dropout, lanes)
    launches.add_rank_product(dx, term, launches.dropout, lanes)
    return dx


def _with_bases(problem: LoraGroupProblem, inputs: Inputs, dys: Sequence[Tensor | None], dx: Tensor | None) -> Tensor:
    """The updates' part of dX, and dY_j W_j of all members: each sum is rounded, so the small ones come first."""
    for member, dy in by_width(dys):
        if dx is None:
            dx = base_gradient(dy, inputs.weights[member], problem.row_invariant)
        else:
            add_base(dx, dy, inputs.weights[member], problem.row_invariant)
    assert dx is not None
    return dx


def _bias_gradient(problem: LoraGroupProblem, dy: Tensor, made: Tensor | None) -> Tensor:
    return dy.sum(0) if made is None else made.to(problem.dtype)


ROW_INVARIANT_FORM = Implementation(
    name="triton" + ROW_INVARIANT,
    why_not_environment=triton_tools.why_not_environment,
    why_not=why_not,
    qualification=qualification.GROUP,
    forward=of_row_invariant(triton_tools.on_device(forward)),
    backward=of_row_invariant(triton_tools.on_device(backward)),
)

IMPLEMENTATION = Implementation(
    name="triton",
    why_not_environment=triton_tools.why_not_environment,
    why_not=why_not,
    qualification=qualification.GROUP,
    forward=triton_tools.on_device(forward),
    backward=triton_tools.on_device(backward),
    row_invariant=ROW_INVARIANT_FORM,
)
