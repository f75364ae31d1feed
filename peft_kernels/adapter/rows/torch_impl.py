"""Adapters by row with torch alone: each slot's rows as ``bottleneck_adapter`` computes them.

Forward   for each slot t on its rows: z = x Wd_t^T + bd_t;  y = residual + scale_t (act(z) Wu_t^T + bu_t)
Backward  for each slot on its rows: dz, dx, dWd_t, dWu_t and both biases' as in ../torch_impl.py; other rows' dx is dy
          where x is the residual, else 0
Tensors   as problem.Inputs; z (M, width) float32, or float64 with x, its rows in the order of ``order``
Saved     x and z
Temporary the rows of a slot, where they are no neighbours; bottleneck_adapter's otherwise
Refused   nothing. Where only the device knows the rows, each slot takes all of them and selects its own
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from peft_kernels._core.dispatch import Implementation
from peft_kernels._core.row_parts import Part, others_of, parts_of
from peft_kernels._core.slots import firsts_of
from peft_kernels.adapter import torch_impl as single
from peft_kernels.adapter.problem import BottleneckAdapterProblem
from peft_kernels.adapter.problem import Inputs as SingleInputs
from peft_kernels.adapter.problem import Needs as SingleNeeds
from peft_kernels.adapter.rows.problem import AdapterRowsProblem, Gradients, Inputs, Needs


class _Slot(NamedTuple):
    """A slot on its rows, as a call of ``bottleneck_adapter``; where its ranks are."""

    part: Part
    problem: BottleneckAdapterProblem
    call: SingleInputs
    ranks: slice

    @property
    def of_z(self) -> slice:
        """Its columns of z."""
        return slice(0, self.problem.r)


def forward(problem: AdapterRowsProblem, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Return y (M, N) and z (M, width)."""
    y = torch.empty(problem.m, problem.n, dtype=problem.out_dtype, device=problem.device)
    # No slot writes what is beyond its rank, or of rows without one; an operator's results are no chance values.
    z = torch.zeros(problem.m, problem.width, dtype=problem.wide_dtype, device=problem.device)
    residual = inputs.x if problem.serial else inputs.residual
    for part in _without(problem, inputs):
        _write_rest(part, residual, y)
    for each in _slots(problem, inputs):
        room = each.part.room_in(y)
        each.part.put_ordered(z[:, each.of_z], single.write_forward(each.problem, each.call, room))
        each.part.put(y, room)
    return y, z


def backward(problem: AdapterRowsProblem, inputs: Inputs, z: Tensor, dy: Tensor, needs: Needs) -> Gradients:
    """Return the gradients that ``needs`` asks for; without one of down_weight ``inputs.x`` is not read."""

    def zeros(need: bool, *shape: int) -> Tensor | None:
        return torch.zeros(shape, dtype=problem.adapter_dtype, device=problem.device) if need else None

    dx = torch.empty(problem.m, problem.k, dtype=problem.dtype, device=problem.device) if needs.x else None
    dwd, dwu = zeros(needs.down_weight, problem.r, problem.k), zeros(needs.up_weight, problem.n, problem.r)
    dbd, dbu = zeros(needs.down_bias, problem.r), zeros(needs.up_bias, problem.slots, problem.n)
    if dx is not None:
        for part in _without(problem, inputs):
            _write_rest(part, dy if problem.serial else None, dx)
    for each in _slots(problem, inputs) if any(needs) else ():
        part, ranks = each.part, each.ranks
        room = None if dx is None else part.room_in(dx)
        of_z = None if z is None else part.take_ordered(z[:, each.of_z])
        found = single.write_backward(
            each.problem,
            each.call,
            of_z,
            part.take(dy),
            SingleNeeds(*needs),
            room,
        )
        if dx is not None and room is not None:
            part.put(dx, room)
        for stacked, at, gradient in (
            (dwd, ranks, found.down_weight),
            (dwu, (slice(None), ranks), found.up_weight),
            (dbd, ranks, found.down_bias),
            (dbu, part.slot, found.up_bias),
        ):
            if stacked is not None and gradient is not None:
                stacked[at] = gradient
    return Gradients(dx, dwd, dwu, dbd, dbu)


def _without(problem: AdapterRowsProblem, inputs: Inputs) -> Iterator[Part]:
    """The rows without an adapter; where only the device knows them, all rows, to be written first."""
    others = others_of(inputs.slot, inputs.order, inputs.runs)
    if others is not None:
        yield others
    if inputs.runs is None:
        return
    if 0 in problem.ranks:
        yield from (each for each in _parts(problem, inputs) if problem.ranks[each.slot] == 0)


def _write_rest(part: Part, source: Tensor | None, out: Tensor) -> None:
    """The source's rows, or zeros."""
    if part.rows is None:
        room = part.room_in(out)
        room.zero_() if source is None else room.copy_(part.take(source))
    elif source is None:
        out.index_fill_(0, part.rows, 0.0)
    else:
        out.index_copy_(0, part.rows, part.take(source).to(out.dtype))


def _parts(problem: AdapterRowsProblem, inputs: Inputs) -> Iterator[Part]:
    return parts_of(problem.slots, inputs.slot, inputs.order, inputs.runs)


def _slots(problem: AdapterRowsProblem, inputs: Inputs) -> Iterator[_Slot]:
    """Those that have rows and ranks."""
    firsts, ranks = firsts_of(problem.ranks), problem.ranks
    # On a GPU the host reads no scale.
    scales = inputs.scales.tolist() if problem.device.type == "cpu" else list(inputs.scales.unbind())
    for part in _parts(problem, inputs):
        t = part.slot
        if ranks[t] == 0:
            continue
        mine = slice(firsts[t], firsts[t] + ranks[t])
        up = None if inputs.up_weight is None else inputs.up_weight[:, mine]
        if up is not None and part.mine is not None:
            # The zeros of others' rows would meet it: a slot without rows may hold nan.
            up = torch.where(part.mine.any(), up, 0.0)
        call = SingleInputs(
            x=None if inputs.x is None else part.take(inputs.x),
            down_weight=None if inputs.down_weight is None else inputs.down_weight[mine],
            up_weight=up,
            down_bias=None if inputs.down_bias is None else inputs.down_bias[mine],
            up_bias=None if inputs.up_bias is None else inputs.up_bias[t],
            residual=None if inputs.residual is None else part.take(inputs.residual),
            serial=problem.serial,
            activation=problem.activation,
            scale=scales[t],
        )
        yield _Slot(part, _single(problem, part.count, ranks[t]), call, mine)


def _single(problem: AdapterRowsProblem, m: int, r: int) -> BottleneckAdapterProblem:
    return BottleneckAdapterProblem(
        m=m,
        n=problem.n,
        k=problem.k,
        r=r,
        dtype=problem.dtype,
        adapter_dtype=problem.adapter_dtype,
        out_dtype=problem.out_dtype,
        serial=problem.serial,
        activation=problem.activation,
        device=problem.device,
    )


IMPLEMENTATION = Implementation("torch", forward, backward)
