"""Capability record of the Triton backend, and the order of its launches. Imports the kernels only to launch them.

The updates are added last, in place: a row without an adapter keeps the bits of the frozen product.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peft_kernels._core import triton_tools
from peft_kernels._core.device import Hardware, hardware
from peft_kernels._core.dispatch import ROW_INVARIANT, Implementation
from peft_kernels.lora import qualification
from peft_kernels.lora.kernels import config
from peft_kernels.lora.kernels.dropout import Lanes
from peft_kernels.lora.linear.problem import of_row_invariant
from peft_kernels.lora.linear.triton_impl import add_base, base, base_gradient
from peft_kernels.lora.members import Gradients, Needs
from peft_kernels.lora.rows.problem import FIRST, RANK, Inputs, LoraRowsProblem

Run = tuple[int, ...]

# Elements of half precision in 16 bytes: what all first ranks and ranks are a multiple of, if loads along them are to
# be vectors.
_VECTOR = 8


def why_not(problem: LoraRowsProblem) -> str | None:
    """Reason why the kernels cannot run this problem, or None."""
    if problem.slots > config.MOST_SLOTS:
        return f"its kernels find a row's adapter among {config.MOST_SLOTS} at most, got {problem.slots}"
    sizes = problem.m, max(problem.n), problem.k, *problem.r
    return triton_tools.why_not_tensors(problem.device, problem.dtype, "M, N, K and the sum of ranks", *sizes)


def forward(problem: LoraRowsProblem, inputs: Inputs) -> tuple[Tensor, ...]:
    """Return y_j (M, N_j) of each member, and S (M, sum of widths) float32."""
    launches, x = Launches.of(problem, inputs), inputs.x
    s = launches.down()
    pinned = problem.row_invariant
    ys = [base(x, weight, bias, pinned) for weight, bias in zip(inputs.weights, inputs.biases, strict=True)]
    launches.add_updates(ys, s)
    return *ys, s


def backward(
    problem: LoraRowsProblem, inputs: Inputs, s: Tensor, dys: Sequence[Tensor | None], needs: Needs
) -> Gradients:
    """Return the gradients that ``needs`` asks for; a member whose dY is None takes part in none of them."""
    dx = _sum_of_bases(inputs, dys, problem.row_invariant) if needs.x else None
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

    No weight is read, and a dY may have another dtype than x beside float32 factors.
    """
    launches = Launches.of(problem, inputs)
    live = tuple(index for index, member in enumerate(problem.members) if dys[member] is not None)
    # All or none have dS, so that a gradient's bits do not depend on which others are asked for.
    needs_ds = needs.x or any(needs.lora_a[index] for index in live)
    if not needs_ds and not any(needs.lora_b[index] for index in live):
        live = ()
    columns = _packed(problem, live)
    width = sum(problem.widths[index] for index in live)
    ds = torch.empty(problem.m, width if needs_ds else 0, dtype=torch.float32, device=problem.device)
    da: dict[int, Tensor] = {}
    db: dict[int, Tensor] = {}
    for index in live:
        if needs.lora_b[index]:
            db[index] = launches.zeros(index, problem.n[problem.members[index]], problem.r[index])
        dy, out = dys[problem.members[index]], ds[:, columns[index]] if needs_ds else None
        launches.narrow_and_reduce(dy, index, s, out, db.get(index))
    if dx is not None:
        for run in launches.runs(live, launches.kind_of_a):
            launches.add_input_gradient(dx, run, ds[:, _between(columns, run)])
    if any(needs.lora_a):
        da = {index: launches.zeros(index, problem.r[index], problem.k) for index in live}
    for run in launches.runs(live, launches.kind):
        if any(needs.lora_a[index] for index in run):
            launches.reduce_rows(inputs.x, run, ds[:, _between(columns, run)], da)
    of_a = tuple(da.get(index) if need else None for index, need in enumerate(needs.lora_a))
    return of_a, tuple(map(db.get, range(len(needs.lora_b))))


@cache
def _kernels() -> tuple[ModuleType, ModuleType]:
    from peft_kernels.lora.kernels import triton_rows, triton_rows_bwd

    return triton_rows, triton_rows_bwd


class Launches(NamedTuple):
    """The launches of one call: what they share, and the choice of a config for each.

    y and dY may have another dtype than x beside float32 factors.

    Attributes:
        plan: as the kernels take it.
        multiples: of each update, a multiple of its slots' first ranks and ranks.
    """

    problem: LoraRowsProblem
    inputs: Inputs
    fwd: ModuleType
    bwd: ModuleType
    hardware: Hardware
    plan: Any
    multiples: tuple[int, ...]

    @staticmethod
    def of(problem: LoraRowsProblem, inputs: Inputs) -> Launches:
        fwd, bwd = _kernels()
        return Launches(
            problem=problem,
            inputs=inputs,
            fwd=fwd,
            bwd=bwd,
            hardware=hardware(problem.device),
            plan=fwd.Plan(inputs.order, inputs.first),
            # Where no gradient asks for them, tables are not there.
            multiples=tuple(1 if table is None else _multiple(table) for table in inputs.host_tables),
        )

    def down(self) -> Tensor:
        """S (M, sum of widths) float32."""
        problem = self.problem
        s = torch.empty(problem.m, sum(problem.widths), dtype=torch.float32, device=problem.device)
        for run in self.runs(range(len(problem.members)), self.kind_of_a):
            self.narrow_product(self.inputs.x, run, s[:, _between(problem.columns, run)])
        return s

    def add_updates(self, ys: Sequence[Tensor], s: Tensor) -> None:
        """y_j (M, N_j) += scale S B^T of each update, in place."""
        for index, member in enumerate(self.problem.members):
            self.add_update(ys[member], index, s[:, self.problem.columns[index]])

    def kind(self, index: int) -> Hashable:
        """What lanes of one launch have in common."""
        return self.problem.adapter_dtypes[index]

    def kind_of_a(self, index: int) -> Hashable:
        """The same where A is read."""
        return self.kind(index), self.inputs.lora_a[index].stride()

    def runs(self, updates: Iterable[int], kind: Callable[[int], Hashable]) -> list[Run]:
        """Neighbours of one kind that have ranks, as many at a time as a launch takes."""
        runs: list[Run] = []
        for index in updates:
            if self.problem.widths[index] == 0:
                continue
            if runs and len(runs[-1]) < config.MOST_LANES and kind(index) == kind(runs[-1][-1]):
                runs[-1] = (*runs[-1], index)
            else:
                runs.append((index,))
        return runs

    def narrow_product(self, x: Tensor, run: Run, s: Tensor) -> None:
        """S of a run: drop(x) A^T."""
        self._narrow_product(x, [self._lane(index, self.inputs.lora_a[index]) for index in run], run, None, s)

    def add_update(self, y: Tensor, index: int, s: Tensor) -> None:
        """y += scale S B^T, in place."""
        if self.problem.widths[index] == 0:
            return
        lane = self._lane(index, self.inputs.lora_b[index])
        chosen = self._chosen(config.rows_rank_product_config, y.dtype)
        self.fwd.add_rank_product(y, s, [lane], self.plan, self.inputs.scales[index], None, chosen)

    def add_input_gradient(self, dx: Tensor, run: Run, ds: Tensor) -> None:
        """dX += drop'(dS A) of a run, in place."""
        lanes = [self._lane(index, self.inputs.lora_a[index].t()) for index in run]
        chosen = self._chosen(config.rows_rank_product_config, dx.dtype, lanes=self._lanes(run))
        self.fwd.add_rank_product(dx, ds, lanes, self.plan, None, self.inputs.seed, chosen)

    def narrow_and_reduce(
        self, dy: Tensor | None, index: int, s: Tensor | None, ds: Tensor | None, db: Tensor | None
    ) -> None:
        """dS and dB, those that there are: in one pass over dy, or in one for each where the rank makes it cheaper."""
        problem, b, scales = self.problem, self.inputs.lora_b[index], self.inputs.scales[index]
        width = problem.widths[index]
        if dy is None or width == 0 or (ds is None and db is None):
            return
        part = None if db is None or s is None else s[:, problem.columns[index]]
        exact = self._exact(index, dy)
        # Partial sums of dS would be added by torch, in an order that may depend on how many rows there are.
        if config.reads_dy_once(width) and not (problem.row_invariant and ds is not None):
            chosen = self._chosen(config.rows_narrow_and_reduce_config, dy.dtype, exact, sizes=(dy.shape[1], width))
            # dB alone reads no B, which may not be there.
            lane = self._lane(index, db if b is None else b)
            self.bwd.narrow_and_reduce(dy, part, lane, self.plan, scales, exact, chosen, ds, db)
            return
        if ds is not None:
            self._narrow_product(dy, [self._lane(index, b.t())], (index,), scales, ds)
        if db is not None:
            self._reduce_rows(dy, part, [self._lane(index, db.t())], (index,), scales)

    def reduce_rows(self, x: Tensor, run: Run, ds: Tensor, da: dict[int, Tensor]) -> None:
        """dA of a run: dS^T drop(x)."""
        self._reduce_rows(x, ds, [self._lane(index, da[index]) for index in run], run, None)

    def zeros(self, index: int, *shape: int) -> Tensor:
        """A gradient of a factor, of which kernels write what belongs to slots with rows."""
        return torch.zeros(shape, dtype=self.problem.adapter_dtypes[index], device=self.problem.device)

    def _narrow_product(self, x: Tensor, lanes: list[Any], run: Run, scales: Tensor | None, out: Tensor) -> None:
        exact = self._exact(run[0], x)
        sizes = x.shape[1], max(self.problem.widths[index] for index in run)
        several = self._lanes(run)
        chosen = self._chosen(config.rows_narrow_product_config, x.dtype, exact, sizes=sizes, lanes=several)
        seed = self.inputs.seed if scales is None else None
        self.fwd.narrow_product(x, lanes, self.plan, scales, seed, exact, chosen, out)

    def _reduce_rows(self, x: Tensor, s: Tensor | None, lanes: list[Any], run: Run, scales: Tensor | None) -> None:
        exact = self._exact(run[0], x)
        sizes = x.shape[1], max(self.problem.widths[index] for index in run)
        chosen = self._chosen(config.rows_reduce_config, x.dtype, exact, sizes=sizes, lanes=self._lanes(run))
        seed = self.inputs.seed if scales is None else None
        self.bwd.reduce_rows(x, s, lanes, self.plan, scales, seed, exact, chosen)

    def _lane(self, index: int, factor: Tensor) -> Any:
        problem = self.problem
        numbers = problem.widths[index], problem.lanes[index], self.multiples[index]
        return self.fwd.Lane(factor, self.inputs.tables[index], *numbers)

    def _lanes(self, run: Run) -> Lanes | None:
        """For a config: those of a run that has several."""
        if len(run) == 1:
            return None
        return Lanes(tuple(self.problem.widths[index] for index in run), tuple(self.problem.lanes[i] for i in run))

    def _exact(self, index: int, beside: Tensor) -> bool:
        return self.problem.adapter_dtypes[index] != beside.dtype

    def _chosen(self, choose: Callable[..., Any], *kind: Any, sizes: Run = (), lanes: Lanes | None = None) -> Any:
        """A config; one on which the bits of a row depend knows nothing of the other rows where these may not count."""
        makes_rows = choose in (config.rows_narrow_product_config, config.rows_rank_product_config)
        pinned = makes_rows and self.problem.row_invariant
        rows = (0, *sizes, 1) if pinned else (self.problem.m, *sizes, self.problem.slots)
        rest = () if choose is config.rows_narrow_and_reduce_config else (lanes,)
        return triton_tools.chosen(choose, *rows, *kind, self.hardware, *rest, *((True,) if pinned else ()))


def _multiple(host_table: Tensor) -> int:
    """A number that divides all first ranks and ranks of a table."""
    ranks = host_table[FIRST : RANK + 1]
    return _VECTOR if not (ranks % _VECTOR).any() else 1


def _packed(problem: LoraRowsProblem, live: Run) -> dict[int, slice]:
    """Where each update stands in dS, which has no column for the others."""
    columns, start = {}, 0
    for index in live:
        columns[index] = slice(start, start + problem.widths[index])
        start += problem.widths[index]
    return columns


def _between(columns: dict[int, slice] | tuple[slice, ...], run: Run) -> slice:
    """The columns of neighbours."""
    return slice(columns[run[0]].start, columns[run[-1]].stop)


def _sum_of_bases(inputs: Inputs, dys: Sequence[Tensor | None], row_invariant: bool) -> Tensor:
    """dY_j W_j of all members: each sum is rounded, so the small ones come first."""
    there = [(dy, weight) for dy, weight in zip(dys, inputs.weights, strict=True) if dy is not None]
    there.sort(key=lambda pair: pair[0].shape[1])
    dx = base_gradient(*there[0], row_invariant)
    for dy, weight in there[1:]:
        add_base(dx, dy, weight, row_invariant)
    return dx


ROW_INVARIANT_FORM = Implementation(
    name="triton" + ROW_INVARIANT,
    why_not_environment=triton_tools.why_not_environment,
    why_not=why_not,
    qualification=qualification.ROWS,
    forward=of_row_invariant(triton_tools.on_device(forward)),
    backward=of_row_invariant(triton_tools.on_device(backward)),
)

IMPLEMENTATION = Implementation(
    name="triton",
    why_not_environment=triton_tools.why_not_environment,
    why_not=why_not,
    qualification=qualification.ROWS,
    forward=triton_tools.on_device(forward),
    backward=triton_tools.on_device(backward),
    row_invariant=ROW_INVARIANT_FORM,
)
