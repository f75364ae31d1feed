"""What ``rows=`` of the public functions runs, and the declaration that makes it an operator."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from peft_kernels._core import checks
from peft_kernels._core.dispatch import Implementation
from peft_kernels._core.operator import Operator
from peft_kernels._core.rows import Rows
from peft_kernels._core.slots import Scales, check_ranks, firsts_of, scales_of, tensor_of
from peft_kernels.lora import members
from peft_kernels.lora.kernels import dropout
from peft_kernels.lora.members import Needs
from peft_kernels.lora.rows import cuda_impl, torch_impl, triton_impl
from peft_kernels.lora.rows.composite import composite
from peft_kernels.lora.rows.native import native
from peft_kernels.lora.rows.problem import NAME, Inputs, LoraRowsProblem, make_problem

Probabilities = float | Sequence[float]


class Table(NamedTuple):
    """Where the ranks of an update's slots are, and what is dropped.

    Attributes:
        device: (3, T) int32: the first row of lora_a, the rank and the dropout's threshold of each slot.
        host: the same on the CPU.
        width: a bound of the ranks.
        drops: whether a slot's dropout is at work.
    """

    device: Tensor
    host: Tensor
    width: int
    drops: bool


class SlotUpdate(NamedTuple):
    """A low-rank update of a member, by an adapter for each slot.

    Attributes:
        member: index of the weight.
        lora_a: (R, K), the slots' factors under each other, in x's dtype or float32.
        lora_b: (N, R), the slots' factors side by side, in lora_a's dtype.
        scales: a float, a float for each slot, or (T,) floating tensor, which the host does not read on a GPU.
        table: of the slots; ``table_of`` makes it.
        lane: fourth word of the masks' counter; another one for each update of a call.
    """

    member: int
    lora_a: Tensor
    lora_b: Tensor
    scales: Scales
    table: Table
    lane: int = 0


def rows_call(
    x: Tensor,
    weights: tuple[Tensor, ...],
    biases: tuple[Tensor | None, ...],
    updates: Sequence[SlotUpdate],
    rows: Rows,
    seed: int | Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    """Frozen layers that share x, and on each row the updates of the adapter that the row uses.

    ``y_j[m] = x[m] W_j^T + bias_j + sum over updates of j of s_t (drop_t(x[m]) A_t^T) B_t^T,  t = rows.slot[m]``

    Args:
        x (..., K): its leading dimensions hold as many rows as ``rows`` has. weights, biases: as ``lora_group``'s.
        updates: in the order of their members; a member may have none, or several.
        rows: on x's device.
        seed, backend: as ``lora_linear``'s. A row's mask is that which it would have without ``rows``.

    Returns:
        y_j (..., N_j) of each member. A row without an adapter has the bits of the backend's frozen product.

    Raises:
        ValueError: a shape, dtype, device, probability, seed or backend name is wrong.
        UnsupportedError: the forced backend cannot run this problem.
    """
    if not isinstance(rows, Rows):
        raise ValueError(f"{NAME}: rows must be a Rows, as Rows.of makes it, got {type(rows).__name__}")
    if isinstance(x, Tensor):
        x, weights, biases, updates = members.cast_for_autocast(x, weights, biases, updates)
    seed_tensor: Tensor | None = None
    if any(update.table.drops for update in updates):
        seed_tensor = dropout.draw_seed(x.device) if seed is None else dropout.as_seed(seed, x.device, NAME)
    dtype = checks.wide_dtype(x.dtype) if isinstance(x, Tensor) else torch.float32
    call = Inputs(
        x,
        weights,
        biases,
        tuple([update.lora_a for update in updates]),
        tuple([update.lora_b for update in updates]),
        tuple([scales_of(NAME, update.scales, rows.slots, dtype, rows.slot.device) for update in updates]),
        tuple([update.table.device for update in updates]),
        tuple([update.table.host for update in updates]),
        tuple([update.member for update in updates]),
        tuple([update.lane for update in updates]),
        tuple([update.table.width for update in updates]),
        rows.slot,
        rows.order,
        rows.first,
        rows.runs,
        seed_tensor,
    )
    ys: tuple[Tensor, ...] = OPERATOR(call, backend)
    return ys


def linear_by_rows(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: Scales,
    bias: Tensor | None,
    rows: Rows,
    ranks: Sequence[int] | None,
    dropout_p: Probabilities,
    seed: int | Tensor | None,
    backend: str | None,
) -> Tensor:
    """``lora_linear`` with ``rows``."""
    update = slots_of_member(0, lora_a, lora_b, scale, ranks, dropout_p, rows)
    (y,) = rows_call(x, (weight,), (bias,), [update], rows, seed, backend)
    return y


def slots_of_member(
    member: int,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: Scales,
    ranks: Sequence[int] | None,
    dropout_p: Probabilities,
    rows: Rows,
    operator: str = NAME,
) -> SlotUpdate:
    """A member's update from the arguments of a public function; its lane is the member's number.

    Args:
        operator: name for messages.

    Raises:
        ValueError: ranks are missing, or are not those of lora_a.
    """
    if not isinstance(ranks, Sequence):
        raise ValueError(f"{operator}: with rows, ranks must be a sequence of each slot's, got {ranks!r}")
    if isinstance(rows, Rows) and len(ranks) != rows.slots:
        raise ValueError(f"{operator}: ranks must be one for each of the rows' {rows.slots} slots, got {len(ranks)}")
    if not isinstance(lora_a, Tensor) or lora_a.dim() != 2:
        got = tuple(lora_a.shape) if isinstance(lora_a, Tensor) else type(lora_a).__name__
        raise ValueError(f"{operator}: lora_a must be (sum of ranks, K), got {got}")
    table = table_of(ranks, dropout_p, lora_a.device, lora_a.shape[0], operator)
    return SlotUpdate(member, lora_a, lora_b, scale, table, member)


def table_of(
    ranks: Sequence[int],
    dropout_p: Probabilities,
    device: torch.device,
    rows_of_a: int | None = None,
    operator: str = NAME,
) -> Table:
    """The table of slots whose factors follow each other.

    Args:
        ranks: of each slot; 0 is an adapter that this layer does not have.
        dropout_p: in [0, 1), one for all slots, or one for each.
        device: of the factors.
        rows_of_a: of lora_a, which ranks must add up to.
        operator: name for messages.

    Raises:
        ValueError: ranks are negative or do not add up, or a probability is wrong.
    """
    found = check_ranks(operator, ranks, "lora_a", sum(ranks) if rows_of_a is None else rows_of_a)
    if isinstance(dropout_p, Sequence):
        if len(dropout_p) != len(ranks):
            raise ValueError(f"{operator}: dropout_p must be one number, or {len(ranks)}, got {len(dropout_p)}")
        limits = tuple([dropout.threshold(p, operator) for p in dropout_p])
    else:
        limits = (dropout.threshold(dropout_p, operator),) * len(ranks)
    values = firsts_of(found), found, limits
    there, host = (tensor_of(values, torch.int32, place) for place in (device, torch.device("cpu")))
    return Table(there, host, max(found, default=0), any(limits))


def _results(problem: LoraRowsProblem, call: Inputs, implementation: Implementation) -> tuple[Tensor, ...]:
    return members.results(problem, call, sum(problem.widths))


def _reads(needs: Needs) -> Iterable[str]:
    if needs.x or any(needs.lora_a) or any(needs.lora_b):
        yield from ("tables", "host_tables", "scales", "slot", "order", "first", "runs")
    yield from members.reads(needs)


OPERATOR = Operator(
    name=NAME,
    call=Inputs,
    needs=Needs,
    implementations=(cuda_impl.IMPLEMENTATION, triton_impl.IMPLEMENTATION, torch_impl.IMPLEMENTATION),
    make_problem=make_problem,
    forward=members.forward,
    backward=members.backward,
    results=_results,
    composite=composite,
    reads=_reads,
    native=native,
    reached=members.reached,
    varying=("m",),
    kept=("s",),
    activations=("x",),
    adds=("biases",),
    several=True,
    addressed=("x", "weights", "lora_a"),
)
