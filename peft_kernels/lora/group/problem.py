"""What a LoRA group call is made of: members and updates, the facts that backends decide on, and every check, once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peft_kernels._core import checks
from peft_kernels.lora.kernels import dropout
from peft_kernels.lora.linear.problem import FACTORS, LoraLinearProblem, are_rows_aligned, check_seed
from peft_kernels.lora.linear.problem import Inputs as LinearInputs

NAME = "lora_group"

_FROZEN = (
    checks.Row("x", "... K"),
    checks.Row("weight", "N K", dtype_of="x"),
    checks.Row("bias", "N", dtype_of="x", optional=True),
)
FROZEN = checks.Table(NAME, "x", _FROZEN)
ADAPTED = checks.Table(NAME, "x", (*_FROZEN, *FACTORS))


class _Member(NamedTuple):
    """What a member's checks are about."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    lora_a: Tensor | None = None
    lora_b: Tensor | None = None


class Inputs(NamedTuple):
    """The arguments of one call: P frozen weights, the *members*, and L low-rank *updates*.

    Attributes:
        x: (..., K), any strides; (M, K) where an implementation takes it.
        weights: (N_j, K) of each member, in x's dtype, as nn.Linear stores it.
        biases: (N_j,) of each member in x's dtype, or None.
        lora_a: (r_l, K) of each update, in x's dtype or float32.
        lora_b: (N_j, r_l) of each update, in its lora_a's dtype.
        scales: of each update, a float, or a 0-d tensor on x's device.
        members: of each update the member that it belongs to, in rising order.
        dropout_p: of each update, the probability of dropping an element of its input.
        lanes: of each update, the fourth word of its mask's counter; masks of one seed differ by it alone.
        seed: 0-d int64 tensor on x's device; None exactly when nothing is dropped.
    """

    x: Tensor
    weights: tuple[Tensor, ...]
    biases: tuple[Tensor | None, ...]
    lora_a: tuple[Tensor, ...]
    lora_b: tuple[Tensor, ...]
    scales: tuple[float | Tensor, ...]
    members: tuple[int, ...]
    dropout_p: tuple[float, ...]
    lanes: tuple[int, ...]
    seed: Tensor | None

    def update(self, index: int) -> LinearInputs:
        """An update with its member, as a call of ``lora_linear``."""
        return self._linear(index, self.weights[self.members[index]])

    def without_weight(self, index: int) -> LinearInputs:
        """The same for what does not multiply with the weight, which may first have to be made."""
        return self._linear(index, None)

    def _linear(self, index: int, weight: Any) -> LinearInputs:
        p = self.dropout_p[index]
        return LinearInputs(
            self.x,
            weight,
            self.lora_a[index],
            self.lora_b[index],
            self.scales[index],
            self.biases[self.members[index]],
            p,
            self.seed if p and dropout.threshold(p) else None,
        )


@dataclass(frozen=True)
class LoraGroupProblem:
    """The facts that choose a backend and its configs.

    Attributes:
        m, k: tokens, in-features.
        n: out-features of each member.
        r: rank of each update.
        members: of each update.
        dtype: of x, weights, biases and results.
        adapter_dtypes: of each update's factors.
        thresholds: of each update; a 16-bit draw below it drops its element, 0 is no dropout.
        lanes: of each update.
        device: of all tensors.
        rows_aligned: of each update, on a CUDA device, whether x, weight and lora_a can be read 16 bytes at a time.
        row_invariant: whether a row's bits may depend on no other row.
    """

    m: int
    k: int
    n: tuple[int, ...]
    r: tuple[int, ...]
    members: tuple[int, ...]
    dtype: torch.dtype
    adapter_dtypes: tuple[torch.dtype, ...]
    thresholds: tuple[int, ...]
    lanes: tuple[int, ...]
    device: torch.device
    rows_aligned: tuple[bool, ...]
    row_invariant: bool = False

    @property
    def is_empty(self) -> bool:
        """Whether some product has no element or no term."""
        return self.m == 0 or self.k == 0 or 0 in self.n

    @property
    def wide_dtype(self) -> torch.dtype:
        """Of S and dS on every backend."""
        return checks.wide_dtype(self.dtype)

    @cached_property
    def columns(self) -> tuple[slice, ...]:
        """Where each update stands in S (M, sum of r)."""
        ends = [sum(self.r[: index + 1]) for index in range(len(self.r))]
        return tuple(slice(end - rank, end) for end, rank in zip(ends, self.r, strict=True))

    @cached_property
    def linears(self) -> tuple[LoraLinearProblem, ...]:
        """Each update with its member, as ``lora_linear``'s problem."""
        return tuple(
            LoraLinearProblem(
                m=self.m,
                n=self.n[self.members[index]],
                k=self.k,
                r=rank,
                dtype=self.dtype,
                adapter_dtype=self.adapter_dtypes[index],
                device=self.device,
                dropout_threshold=self.thresholds[index],
                rows_aligned=self.rows_aligned[index],
                lane=self.lanes[index],
                row_invariant=self.row_invariant,
            )
            for index, rank in enumerate(self.r)
        )

    @cached_property
    def of_members(self) -> tuple[tuple[int, ...], ...]:
        """Each member's updates."""
        every = tuple(enumerate(self.members))
        return tuple(tuple(index for index, owner in every if owner == member) for member in range(len(self.n)))

    @cached_property
    def runs_of_all(self) -> tuple[tuple[int, ...], ...]:
        """``runs`` of all updates."""
        return self.runs(tuple(range(len(self.r))))

    def runs(self, updates: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        """Divide updates into runs of neighbours whose factors have one dtype, and whose masks one probability."""
        runs: list[tuple[int, ...]] = []
        for index in updates:
            if runs and self._kind(index) == self._kind(runs[-1][-1]):
                runs[-1] = (*runs[-1], index)
            else:
                runs.append((index,))
        return tuple(runs)

    def joined(self, run: tuple[int, ...]) -> LoraLinearProblem:
        """A run as one update, as far as its ranks go."""
        found = self._joined.get(run)
        if found is None:
            rank = sum(self.r[index] for index in run)
            found = self._joined[run] = replace(self.linears[run[0]], r=rank)
        return found

    @cached_property
    def _joined(self) -> dict[tuple[int, ...], LoraLinearProblem]:
        return {}

    def _kind(self, index: int) -> tuple[torch.dtype, int]:
        return self.adapter_dtypes[index], self.thresholds[index]


def make_problem(call: Inputs) -> LoraGroupProblem:
    """Check the arguments of a call and describe it.

    Raises:
        ValueError: naming the argument, what it must be and what it was.
    """
    x = call.x
    check_structure(call, call.weights)
    n: list[int] = []
    for member, (weight, bias) in enumerate(zip(call.weights, call.biases, strict=True)):
        part = f"members[{member}]."
        sizes = FROZEN.check(_Member(x, weight, bias), part)
        for owner, lora_a, lora_b, scale in zip(call.members, call.lora_a, call.lora_b, call.scales, strict=True):
            if owner == member:
                ADAPTED.check(_Member(x, weight, bias, lora_a, lora_b), part)
                checks.scalar(NAME, f"{part}scale", scale)
        n.append(sizes["N"])
    if call.seed is not None:
        check_seed(NAME, call.seed, x.device)
    return LoraGroupProblem(
        m=math.prod(sizes["..."]),
        k=sizes["K"],
        n=tuple(n),
        r=tuple(a.shape[0] for a in call.lora_a),
        members=call.members,
        dtype=x.dtype,
        adapter_dtypes=tuple(a.dtype for a in call.lora_a),
        thresholds=tuple(map(dropout.threshold, call.dropout_p)),
        lanes=call.lanes,
        device=x.device,
        rows_aligned=tuple(
            are_rows_aligned(x, call.weights[member], lora_a)
            for member, lora_a in zip(call.members, call.lora_a, strict=True)
        ),
    )


def check_structure(call: Any, weights: Sequence[Any], name: str = NAME) -> None:
    """As many of everything as there must be: what no caller of ``lora_group`` can get wrong but for the first.

    Raises:
        ValueError: there is no member, or updates and members do not fit together.
    """
    if not weights:
        raise ValueError(f"{name}: members must be a non-empty sequence of Member, got {weights!r}")
    lengths = {len(each) for each in (call.lora_a, call.lora_b, call.scales, call.members, call.dropout_p, call.lanes)}
    if len(call.biases) != len(weights) or len(lengths) != 1 or 0 in lengths:
        raise ValueError(f"{name}: a bias or None for each weight and at least one update of six parts, got {lengths}")
    if list(call.members) != sorted(call.members) or not 0 <= call.members[0] <= call.members[-1] < len(weights):
        raise ValueError(f"{name}: members of updates must rise from 0 to {len(weights) - 1}, got {call.members}")
    if len(set(call.lanes)) != len(call.lanes):
        raise ValueError(f"{name}: each update must have a lane of its own, got {call.lanes}")
    for lane in call.lanes:
        dropout.as_lane(lane, name)
