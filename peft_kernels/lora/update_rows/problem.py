"""What an update of a given y by rows is made of: an update of several slots, a plan of rows, and every check, once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from peft_kernels._core import checks
from peft_kernels.lora.linear.problem import check_seed
from peft_kernels.lora.rows.problem import Inputs as RowsInputs
from peft_kernels.lora.rows.problem import LoraRowsProblem, check_plan
from peft_kernels.lora.update.problem import check_dtypes

NAME = "lora_update_rows"

TENSORS = checks.Table(
    NAME,
    "x",
    (
        checks.Row("x", "... K"),
        checks.Row("lora_a", "R K", dtype_of="x", or_float32=True),
        checks.Row("lora_b", "N R", dtype_of="lora_a"),
        checks.Row("y", "... N"),
        checks.Row("scales", "T"),
        checks.Row("table", "3 T"),
    ),
)


class Inputs(NamedTuple):
    """The arguments of one call, in which an update has T slots.

    Attributes:
        x: (..., K), any strides; (M, K) where an implementation takes it.
        y: (..., N), any strides, in x's dtype, or another below float64 beside float32 factors; contiguous (M, N),
            and added to in place, where an implementation takes it.
        lora_a: (R, K), the slots' factors under each other, in x's dtype or float32.
        lora_b: (N, R), the slots' factors side by side, in lora_a's dtype.
        scales: (T,) float32, or float64 beside a float64 x.
        table: (3, T) int32: first rank, rank and dropout's threshold of each slot.
        host_table: the same on the CPU.
        width: a bound of the slots' ranks: the columns of S.
        slot, order, first, runs: as ``Rows`` has them.
        seed: 0-d int64 tensor on x's device; None exactly when nothing is dropped.
    """

    x: Tensor
    y: Tensor
    lora_a: Tensor
    lora_b: Tensor
    scales: Tensor
    table: Tensor
    host_table: Tensor
    width: int
    slot: Tensor
    order: Tensor
    first: Tensor
    runs: Tensor | None
    seed: Tensor | None

    @property
    def by_rows(self) -> RowsInputs:
        """As the steps of ``lora_rows`` take it that read no weight."""
        return RowsInputs(
            x=self.x,
            weights=(None,),  # type: ignore[arg-type]
            biases=(None,),
            lora_a=(self.lora_a,),
            lora_b=(self.lora_b,),
            scales=(self.scales,),
            tables=(self.table,),
            host_tables=(self.host_table,),
            members=(0,),
            lanes=(0,),
            widths=(self.width,),
            slot=self.slot,
            order=self.order,
            first=self.first,
            runs=self.runs,
            seed=self.seed,
        )


@dataclass(frozen=True)
class LoraUpdateRowsProblem:
    """The facts that choose a backend and its configs; ranks, scales, thresholds and rows of slots are none of them.

    Attributes:
        m, n, k: tokens, out-features, in-features.
        slots: how many, T.
        r: rows of lora_a, over all slots.
        width: a bound of a slot's rank.
        dtype: of x and its gradient.
        y_dtype: of y, the result and dY.
        adapter_dtype: of lora_a and lora_b.
        has_dropout: whether some slot may drop something.
        device: of all tensors but host_table and runs.
    """

    m: int
    n: int
    k: int
    slots: int
    r: int
    width: int
    dtype: torch.dtype
    y_dtype: torch.dtype
    adapter_dtype: torch.dtype
    has_dropout: bool
    device: torch.device

    @property
    def is_empty(self) -> bool:
        """Whether no product has an element or a term, or no row can have an adapter."""
        return 0 in (self.m, self.n, self.k, self.slots, self.width)

    @property
    def wide_dtype(self) -> torch.dtype:
        """Of S and dS on every backend."""
        return checks.wide_dtype(self.dtype)

    @property
    def by_rows(self) -> LoraRowsProblem:
        """The same as the steps of ``lora_rows`` take it; what they do to y and dY they do in those tensors' dtype."""
        return LoraRowsProblem(
            m=self.m,
            k=self.k,
            n=(self.n,),
            slots=self.slots,
            r=(self.r,),
            widths=(self.width,),
            members=(0,),
            lanes=(0,),
            dtype=self.dtype,
            adapter_dtypes=(self.adapter_dtype,),
            has_dropout=self.has_dropout,
            device=self.device,
        )


def make_problem(call: Inputs) -> LoraUpdateRowsProblem:
    """Check the arguments of a call and describe it.

    Raises:
        ValueError: naming the argument, what it must be and what it was.
    """
    x, y = call.x, call.y
    sizes = TENSORS.check(call)
    check_dtypes(NAME, y.dtype, x.dtype, call.lora_a.dtype)
    m, slots = math.prod(sizes["..."]), call.first.shape[0] - 1
    if sizes["T"] != slots:
        raise ValueError(f"{NAME}: ranks must be of the rows' {slots} slots, got {sizes['T']}")
    for name in ("slot", "order", "first"):
        check_plan(NAME, name, getattr(call, name), slots + 1 if name == "first" else m, x)
    if call.seed is not None:
        check_seed(NAME, call.seed, x.device)
    return LoraUpdateRowsProblem(
        m=m,
        n=sizes["N"],
        k=sizes["K"],
        slots=slots,
        r=sizes["R"],
        width=call.width,
        dtype=x.dtype,
        y_dtype=y.dtype,
        adapter_dtype=call.lora_a.dtype,
        has_dropout=call.seed is not None,
        device=x.device,
    )
