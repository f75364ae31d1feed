"""Calls of ``lora_rows`` with slots of any ranks, by the package, by eager torch and by the oracle."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import peft_kernels as pk
from peft_kernels.lora.rows.op import SlotUpdate, rows_call, table_of
from python_ref import compare
from python_ref import lora as oracle
from tests.contract.draw import Draw, dtypes_name, laid_out

SEED = 20240229
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = ((FP32, FP32), (BF16, BF16), (FP16, FP16), (BF16, FP32), (FP16, FP32))


@dataclass(frozen=True)
class Case:
    """One problem.

    Attributes:
        slot: of each row.
        n: out-features of each member.
        owners: the member of each update.
        ranks, ps: of each update and slot.
        adapters: the dtype of each update; None is ``dtype``.
    """

    slot: tuple[int, ...]
    k: int = 40
    n: tuple[int, ...] = (24,)
    owners: tuple[int, ...] = (0,)
    ranks: tuple[tuple[int, ...], ...] = ((3, 17, 8),)
    ps: tuple[tuple[float, ...], ...] = ((0.0, 0.0, 0.0),)
    dtype: torch.dtype = FP32
    adapters: tuple[torch.dtype | None, ...] = (None,)
    layout: str = "rows"

    @property
    def slots(self) -> int:
        return len(self.ranks[0])

    @property
    def scales(self) -> list[list[float]]:
        """Of each update and slot another one; powers of two."""
        return [[2.0 ** ((t + index) % 3 - 1) for t in range(self.slots)] for index in range(len(self.owners))]

    def __str__(self) -> str:
        ranks = "_".join("+".join(map(str, each)) for each in self.ranks)
        return f"{len(self.slot)}x{self.n}x{self.k}-r{ranks}-{dtypes_name(self.dtype, *self.adapters)}-p{self.ps[0][0]}"


@dataclass(frozen=True)
class Call:
    """A case's tensors, all of which want gradients, and the gradients of its outputs."""

    case: Case
    x: Tensor
    weights: tuple[Tensor, ...]
    biases: tuple[Tensor | None, ...]
    lora_a: tuple[Tensor, ...]
    lora_b: tuple[Tensor, ...]
    dys: tuple[Tensor, ...]

    @property
    def rows(self) -> pk.Rows:
        slot = torch.tensor(self.case.slot, dtype=torch.int64)
        return pk.Rows.of(slot, known=self.case.slots, device=self.x.device)

    @property
    def updates(self) -> list[SlotUpdate]:
        case = self.case
        return [
            SlotUpdate(
                owner, self.lora_a[index], self.lora_b[index], case.scales[index],
                table_of(case.ranks[index], case.ps[index], self.x.device, self.lora_a[index].shape[0]), _lane(index),
            )
            for index, owner in enumerate(case.owners)
        ]  # fmt: skip

    @property
    def leaves(self) -> dict[str, Tensor]:
        named = {"x": self.x}
        named |= {f"a{index}": a for index, a in enumerate(self.lora_a)}
        named |= {f"b{index}": b for index, b in enumerate(self.lora_b)}
        return named | {f"bias{j}": bias for j, bias in enumerate(self.biases) if bias is not None}

    def run(self, backend: str = "triton") -> dict[str, Tensor]:
        ys = rows_call(self.x, self.weights, self.biases, self.updates, self.rows, SEED, backend)
        return self._with_gradients(ys)

    def eager(self) -> dict[str, Tensor]:
        """PEFT's formulas; several updates of a member one after another."""
        ys = []
        for j, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            y = None
            for index in (index for index, owner in enumerate(self.case.owners) if owner == j):
                base = F.linear(self.x, weight, bias) if y is None else y
                one = oracle.eager_rows(self.x, torch.zeros_like(weight), self._slots(index), self.case.slot)
                y = (base + one).to(base.dtype)
            ys.append(F.linear(self.x, weight, bias) if y is None else y)
        return self._with_gradients(ys)

    def exact(self) -> dict[str, Tensor]:
        """By the oracle, in float64."""
        case, wide = self.case, self._wide()
        found: dict[str, Tensor] = {}
        for j, (weight, bias) in enumerate(zip(wide.weights, wide.biases, strict=True)):
            y = wide.x @ weight.t() + (0 if bias is None else bias)
            dx = wide.dys[j] @ weight
            for index in (index for index, owner in enumerate(case.owners) if owner == j):
                slots, nothing = wide._slots(index), torch.zeros_like(weight)
                y = y + oracle.rows_forward(wide.x, nothing, slots, case.slot)
                gradients = oracle.rows_backward(wide.dys[j], wide.x, nothing, slots, case.slot)
                dx = dx + gradients.x
                found[f"a{index}"], found[f"b{index}"] = torch.cat(gradients.lora_a), torch.cat(gradients.lora_b, 1)
            found[f"y{j}"], found["x"] = y, found.get("x", 0) + dx
            if bias is not None:
                found[f"bias{j}"] = wide.dys[j].sum(0)
        return found

    def _with_gradients(self, ys: Any) -> dict[str, Tensor]:
        gradients = torch.autograd.grad(ys, list(self.leaves.values()), self.dys)
        return {f"y{j}": y.detach() for j, y in enumerate(ys)} | dict(zip(self.leaves, gradients, strict=True))

    def _slots(self, index: int) -> list[oracle.Slot]:
        case, found, first = self.case, [], 0
        for t, (rank, p) in enumerate(zip(case.ranks[index], case.ps[index], strict=True)):
            ranks, first = slice(first, first + rank), first + rank
            keep = None
            if p:
                keep = pk.lora_linear_dropout_mask(SEED, *self.x.shape, p, self.x.device, lane=_lane(index))
            a, b = self.lora_a[index][ranks], self.lora_b[index][:, ranks]
            found.append(oracle.Slot(a, b, case.scales[index][t], keep, p))
        return found

    def _wide(self) -> Call:
        def wide(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(map(wide, value))
            return value.detach().double() if isinstance(value, Tensor) else value

        fields = {field.name: wide(getattr(self, field.name)) for field in dataclasses.fields(self)}
        return Call(**{**fields, "case": self.case})


def _lane(index: int) -> int:
    """The greatest word is one of them."""
    return 2**32 - 1 if index == 1 else 3 * index


def make(case: Case, device: torch.device, seed: int = 0, is_exact: bool = False) -> Call:
    """Random tensors, or small integers whose every product and sum is exact in bfloat16: a row of x and of the
    gradient holds a single 1 or -1.
    """
    draw, m, k = Draw(seed), len(case.slot), case.k

    def leaf(dtype: torch.dtype, *shape: int, std: float = 1.0) -> Tensor:
        values = draw.integers(1, *shape) if is_exact else draw.normal(*shape, std=std)
        return values.to(device, dtype).requires_grad_()

    def activation(width: int) -> Tensor:
        values = draw.single_signs(m, width) if is_exact else draw.normal(m, width)
        return laid_out(values.to(device, case.dtype), case.layout)

    factors = [(case.n[owner], sum(ranks)) for owner, ranks in zip(case.owners, case.ranks, strict=True)]
    dtypes = [adapter or case.dtype for adapter in case.adapters]
    return Call(
        case,
        activation(k).requires_grad_(),
        tuple(leaf(case.dtype, n, k, std=k**-0.5).detach() for n in case.n),
        tuple(None if j == 1 else leaf(case.dtype, n) for j, n in enumerate(case.n)),
        tuple(leaf(dtype, r, k, std=k**-0.5) for dtype, (_, r) in zip(dtypes, factors, strict=True)),
        tuple(leaf(dtype, n, r, std=0.3) for dtype, (n, r) in zip(dtypes, factors, strict=True)),
        tuple(activation(n) for n in case.n),
    )


def shuffled(*counts: int, base: int = 0) -> tuple[int, ...]:
    """Rows of each slot, and without one, in random order."""
    slots = [-1] * base + [t for t, count in enumerate(counts) for _ in range(count)]
    return tuple(slots[i] for i in torch.randperm(len(slots), generator=torch.Generator().manual_seed(0)).tolist())


def assert_exact(case: Case, device: torch.device, seed: int = 0) -> None:
    call = make(case, device, seed, is_exact=True)
    wanted, results = call.exact(), call.run()
    assert results.keys() == wanted.keys()
    for name, result in results.items():
        compare.assert_bitwise_equal(name, result + 0.0, wanted[name].to(result.dtype) + 0.0)
