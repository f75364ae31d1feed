"""The public function, and the declaration that makes it an operator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from peft_kernels._core.dispatch import Implementation
from peft_kernels._core.operator import Operator
from peft_kernels._core.rows import Rows
from peft_kernels.four_bit_weight.quant_state import QuantizedWeight
from peft_kernels.lora import members
from peft_kernels.lora.four_bit.op import four_bit_call, without_rows
from peft_kernels.lora.group import cuda_impl, torch_impl, triton_impl
from peft_kernels.lora.group.composite import composite
from peft_kernels.lora.group.native import native
from peft_kernels.lora.group.problem import NAME, Inputs, LoraGroupProblem, make_problem
from peft_kernels.lora.members import Update
from peft_kernels.lora.rows.op import rows_call, slots_of_member


class Member(NamedTuple):
    """A frozen linear layer and its low-rank update, as arguments of ``lora_linear``.

    Attributes:
        weight: (N, K), in x's dtype, as nn.Linear stores it; or 4-bit, as ``lora_linear`` takes it. Members of one call
            are all 4-bit, of one format, or none is.
        lora_a: (r, K), in x's dtype or float32; rank r >= 1.
        lora_b: (N, r), in lora_a's dtype.
        scale: float, or 0-d floating tensor, which is never read by the host; not differentiated.
        bias: (N,) in x's dtype, or None.
    """

    weight: Tensor | QuantizedWeight
    lora_a: Tensor
    lora_b: Tensor
    scale: float | Sequence[float] | Tensor = 1.0
    bias: Tensor | None = None


def lora_group(
    x: Tensor,
    members: Sequence[Member],
    *,
    dropout_p: float | list[float] | tuple[float, ...] = 0.0,
    seed: int | Tensor | None = None,
    rows: Rows | None = None,
    ranks: Sequence[int] | Sequence[Sequence[int]] | None = None,
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    """Apply several linear layers that share x, and their low-rank updates, as one operation: q, k, v; gate, up.

    LoRA, Hu et al. 2021, arXiv:2106.09685, section 4.1, for each member j:
    ``y_j = x @ weight_j.T + bias_j + scale_j * (drop_j(x) @ lora_a_j.T) @ lora_b_j.T``

    Every member keeps a mask of its own, as in PEFT. One seed serves all: member j's mask is
    ``lora_linear_dropout_mask(seed, rows, cols, p, device, lane=j)``, so that of member 0 is ``lora_linear``'s.

    Args:
        x (..., K): float32, bfloat16, float16 or float64; any strides, but leading dimensions that do not flatten to
            one without a copy are copied.
        members: at least one; they may differ in N, rank, scale, bias and the adapter's dtype.
        dropout_p: in [0, 1), quantised to 1/65536; one for all members, or one for each; with ``rows`` one for all, or
            one for each slot.
        seed: None draws one from torch's generator of x's device; an int or a 0-d int64 tensor on x's device fixes it.
        rows: as ``lora_linear``'s, for all members, whose lora_a, lora_b and scale are then as there.
        ranks: with ``rows``, of each slot, the same for all members, or a sequence for each.
        backend: "torch", "triton" or "cuda" forces a backend; None takes ``use_backend``'s, then the variable
            PEFT_KERNELS_BACKEND, then chooses.

    Returns:
        y_j (..., N_j) of each member, in x's dtype; under autocast in the dtype that F.linear would give.

    Raises:
        ValueError: a member, shape, dtype, device, probability, seed or backend name is wrong.
        UnsupportedError: the forced backend cannot run this problem.

    Numerics: as ``lora_linear``. The gradient of x is summed within the operation, the narrowest member first, and not
    by autograd from one gradient for each member. An output that nothing is computed from leaves None as the gradients
    of its weight, bias and factors. Two runs give the same bits.

    Example:
        >>> import torch, peft_kernels as pk
        >>> up, down = torch.ones(1, 3), torch.ones(2, 1)
        >>> q, k = pk.lora_group(torch.ones(1, 3), [pk.Member(torch.zeros(2, 3), up, down, scale) for scale in (1, 2)])
        >>> q, k
        (tensor([[3., 3.]]), tensor([[6., 6.]]))
    """
    given = _members(members)
    weights, biases = tuple(member.weight for member in given), tuple(member.bias for member in given)
    if rows is not None:
        plain = without_rows(weights, NAME)
        by_rows = [
            slots_of_member(index, *member[1:4], of_member, dropout_p, rows)
            for index, (member, of_member) in enumerate(zip(given, _ranks(ranks, len(given)), strict=True))
        ]
        return rows_call(x, plain, biases, by_rows, rows, seed, backend)
    if ranks is not None:
        raise ValueError(f"{NAME}: ranks are those of the slots of rows, which is None")
    ps = _probabilities(dropout_p, len(given))
    updates = [
        Update(index, member.lora_a, member.lora_b, member.scale, p, index)  # type: ignore[arg-type]
        for index, (member, p) in enumerate(zip(given, ps, strict=True))
    ]
    return group_call(x, weights, biases, updates, seed, backend)


def group_call(
    x: Tensor,
    weights: tuple[Tensor | QuantizedWeight, ...],
    biases: tuple[Tensor | None, ...],
    updates: Sequence[Update],
    seed: int | Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    """The same with any number of updates for each member, in the order of their members, and lanes that are given."""
    if weights and isinstance(weights[0], QuantizedWeight):
        return four_bit_call(x, weights, biases, updates, seed, backend)
    plain: tuple[Tensor, ...] = weights  # type: ignore[assignment]
    if isinstance(x, Tensor):
        x, plain, biases, updates = members.cast_for_autocast(x, plain, biases, updates)
    call = Inputs(x, plain, biases, *members.arguments(x, updates, seed, NAME))
    ys: tuple[Tensor, ...] = OPERATOR(call, backend)
    return ys


def _members(members: Sequence[Member]) -> list[Member]:
    if not isinstance(members, Sequence) or not members:
        raise ValueError(f"{NAME}: members must be a non-empty sequence of Member, got {members!r}")
    for index, member in enumerate(members):
        if not isinstance(member, Member):
            raise ValueError(f"{NAME}: members[{index}] must be a Member, got {type(member).__name__}")
    return list(members)


def _ranks(ranks: Sequence[int] | Sequence[Sequence[int]] | None, count: int) -> Sequence[Any]:
    if isinstance(ranks, Sequence) and any(isinstance(each, Sequence) for each in ranks):
        if len(ranks) != count:
            raise ValueError(f"{NAME}: ranks must be those of each slot, or {count} such, as there are members")
        return ranks
    return [ranks] * count


def _probabilities(p: float | list[float] | tuple[float, ...], count: int) -> Sequence[float]:
    if isinstance(p, (list, tuple)):
        if len(p) != count:
            raise ValueError(f"{NAME}: dropout_p must be one number, or {count}, as there are members, got {len(p)}")
        return p
    return [p] * count


def _results(problem: LoraGroupProblem, call: Inputs, implementation: Implementation) -> tuple[Tensor, ...]:
    return members.results(problem, call, sum(problem.r))


OPERATOR = Operator(
    name=NAME,
    call=Inputs,
    needs=members.Needs,
    implementations=(cuda_impl.IMPLEMENTATION, triton_impl.IMPLEMENTATION, torch_impl.IMPLEMENTATION),
    make_problem=make_problem,
    forward=members.forward,
    backward=members.backward,
    results=_results,
    composite=composite,
    reads=members.reads,
    reached=members.reached,
    varying=("m",),
    kept=("s",),
    activations=("x",),
    adds=("biases",),
    several=True,
    native=native,
    addressed=("x", "weights", "lora_a"),
)
