"""What a call of ``lora_rows`` is made of: members, updates of several slots, a plan of rows, and every check, once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from peft_kernels._core import checks
from peft_kernels.lora.kernels import dropout
from peft_kernels.lora.linear.problem import are_rows_aligned, check_seed

NAME = "lora_rows"

# The rows of a table: where a slot's ranks begin in lora_a and lora_b, how many it has, its dropout's threshold.
FIRST, RANK, THRESHOLD = range(3)

_FROZEN = (
    checks.Row("x", "... K"),
    checks.Row("weight", "N K", dtype_of="x"),
    checks.Row("bias", "N", dtype_of="x", optional=True),
)
FROZEN = checks.Table(NAME, "x", _FROZEN)
ADAPTED = checks.Table(
    NAME,
    "x",
    (
        *_FROZEN,
        checks.Row("lora_a", "R K", dtype_of="x", or_float32=True),
        checks.Row("lora_b", "N R", dtype_of="lora_a"),
        checks.Row("scales", "T"),
        checks.Row("table", "3 T"),
    ),
)


class _Member(NamedTuple):
    """What a member's checks are about."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    lora_a: Tensor | None = None
    lora_b: Tensor | None = None
    scales: Tensor | None = None
    table: Tensor | None = None


class Inputs(NamedTuple):
    """The arguments of one call: P frozen weights, the *members*, and L *updates* of T slots each.

    Attributes:
        x: (..., K), any strides; (M, K) where an implementation takes it.
        weights: (N_j, K) of each member, in x's dtype, as nn.Linear stores it.
        biases: (N_j,) of each member in x's dtype, or None.
        lora_a: (R_l, K) of each update, its slots' factors under each other, in x's dtype or float32.
        lora_b: (N_j, R_l) of each update, its slots' factors side by side, in its lora_a's dtype.
        scales: (T,) of each update, float32, or float64 beside a float64 x.
        tables: (3, T) int32 of each update: ``FIRST``, ``RANK`` and ``THRESHOLD`` of each slot.
        host_tables: the same on the CPU.
        members: of each update the member that it belongs to, in rising order.
        lanes: of each update, the fourth word of its masks' counter.
        widths: of each update, a bound of its slots' ranks: its columns of S.
        slot, order, first, runs: as ``Rows`` has them.
        seed: 0-d int64 tensor on x's device; None exactly when nothing is dropped.
    """

    x: Tensor
    weights: tuple[Tensor, ...]
    biases: tuple[Tensor | None, ...]
    lora_a: tuple[Tensor, ...]
    lora_b: tuple[Tensor, ...]
    scales: tuple[Tensor, ...]
    tables: tuple[Tensor, ...]
    host_tables: tuple[Tensor, ...]
    members: tuple[int, ...]
    lanes: tuple[int, ...]
    widths: tuple[int, ...]
    slot: Tensor
    order: Tensor
    first: Tensor
    runs: Tensor | None
    seed: Tensor | None


@dataclass(frozen=True)
class LoraRowsProblem:
    """The facts that choose a backend and its configs; ranks, scales, thresholds and rows of slots are none of them.

    Attributes:
        m, k: tokens, in-features.
        n: out-features of each member.
        slots: how many, T.
        r: rows of each update's lora_a, over all slots.
        widths: of each update, a bound of a slot's rank.
        members, lanes: of each update.
        dtype: of x, weights, biases and results.
        adapter_dtypes: of each update's factors.
        has_dropout: whether some slot may drop something.
        device: of all tensors but host_tables and runs.
        rows_aligned: of each update, on a CUDA device, whether x, weight and lora_a can be read 16 bytes at a time.
        row_invariant: whether a row's bits may depend on no other row.
    """

    m: int
    k: int
    n: tuple[int, ...]
    slots: int
    r: tuple[int, ...]
    widths: tuple[int, ...]
    members: tuple[int, ...]
    lanes: tuple[int, ...]
    dtype: torch.dtype
    adapter_dtypes: tuple[torch.dtype, ...]
    has_dropout: bool
    device: torch.device
    rows_aligned: tuple[bool, ...] = ()
    row_invariant: bool = False

    @property
    def is_empty(self) -> bool:
        """Whether some product has no element or no term, or no row can have an adapter."""
        return self.m == 0 or self.k == 0 or 0 in self.n or self.slots == 0 or not any(self.widths)

    @property
    def wide_dtype(self) -> torch.dtype:
        """Of S and dS on every backend."""
        return checks.wide_dtype(self.dtype)

    @cached_property
    def columns(self) -> tuple[slice, ...]:
        """Where each update stands in S (M, sum of widths); a slot of a lower rank has the first of its columns.

        Row i of S is that of row order[i] of x, so a slot's are neighbours.
        """
        ends = [sum(self.widths[: index + 1]) for index in range(len(self.widths))]
        return tuple(slice(end - width, end) for end, width in zip(ends, self.widths, strict=True))


def make_problem(call: Inputs) -> LoraRowsProblem:
    """Check the arguments of a call and describe it.

    Raises:
        ValueError: naming the argument, what it must be and what it was.
    """
    x = call.x
    _check_structure(call)
    n: list[int] = []
    slots = call.first.shape[0] - 1
    for member, (weight, bias) in enumerate(zip(call.weights, call.biases, strict=True)):
        part = f"members[{member}]." if len(call.weights) > 1 else ""
        sizes = FROZEN.check(_Member(x, weight, bias), part)
        for index, owner in enumerate(call.members):
            if owner == member:
                factors = call.lora_a[index], call.lora_b[index], call.scales[index], call.tables[index]
                of_slots = ADAPTED.check(_Member(x, weight, bias, *factors), part)["T"]
                if of_slots != slots:
                    raise ValueError(f"{NAME}: {part}ranks must be of the rows' {slots} slots, got {of_slots}")
        n.append(sizes["N"])
    m = math.prod(sizes["..."])
    for name in ("slot", "order", "first"):
        check_plan(NAME, name, getattr(call, name), slots + 1 if name == "first" else m, x)
    if call.seed is not None:
        check_seed(NAME, call.seed, x.device)
    return LoraRowsProblem(
        m=m,
        k=sizes["K"],
        n=tuple(n),
        slots=slots,
        r=tuple(a.shape[0] for a in call.lora_a),
        widths=call.widths,
        members=call.members,
        lanes=call.lanes,
        dtype=x.dtype,
        adapter_dtypes=tuple(a.dtype for a in call.lora_a),
        has_dropout=call.seed is not None,
        device=x.device,
        rows_aligned=tuple(
            are_rows_aligned(x, call.weights[member], lora_a)
            for member, lora_a in zip(call.members, call.lora_a, strict=True)
        ),
    )


def check_plan(operator: str, name: str, tensor: Tensor, size: int, x: Tensor) -> None:
    """Check a tensor of a plan of rows, which must be of a size and on x's device.

    Raises:
        ValueError: naming it, what it must be and what it was.
    """
    if name == "slot" and tensor.shape != (size,):
        raise ValueError(f"{operator}: rows must be as many as x has, {size}, got {tensor.shape[0]}")
    if tensor.shape != (size,) or tensor.dtype != torch.int32:
        raise ValueError(f"{operator}: rows.{name} must be int32 ({size},), got {tensor.dtype} {tuple(tensor.shape)}")
    if tensor.device != x.device:
        raise ValueError(f"{operator}: rows must be on the device of x ({x.device}), got {tensor.device}")


def _check_structure(call: Inputs) -> None:
    """As many of everything as there must be.

    Raises:
        ValueError: there is no member, or updates and members do not fit together.
    """
    if not call.weights:
        raise ValueError(f"{NAME}: members must be a non-empty sequence of Member, got {call.weights!r}")
    lengths = {
        len(each)
        for each in (
            call.lora_a, call.lora_b, call.scales, call.tables, call.host_tables, call.members, call.lanes, call.widths
        )
    }  # fmt: skip
    if len(call.biases) != len(call.weights) or len(lengths) != 1:
        raise ValueError(f"{NAME}: a bias or None for each weight and updates of eight parts, got {lengths}")
    members = call.members
    if list(members) != sorted(members) or not all(0 <= member < len(call.weights) for member in members):
        raise ValueError(f"{NAME}: members of updates must rise from 0 to {len(call.weights) - 1}, got {members}")
    if len(set(call.lanes)) != len(call.lanes):
        raise ValueError(f"{NAME}: each update must have a lane of its own, got {call.lanes}")
    for lane in call.lanes:
        dropout.as_lane(lane, NAME)
