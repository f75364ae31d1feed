"""Capability record of the Triton backend, and the order of its launches. Imports the kernels only to launch them."""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_kernels._core import triton_tools
from peft_kernels._core.device import Hardware, hardware
from peft_kernels._core.dispatch import ROW_INVARIANT, Implementation
from peft_kernels._core.torch_products import add_product
from peft_kernels.lora import qualification
from peft_kernels.lora.kernels import config
from peft_kernels.lora.kernels.dropout import NO_DROPOUT, Dropout, Lanes
from peft_kernels.lora.linear.problem import Gradients, Inputs, LoraLinearProblem, Needs, of_row_invariant


def why_not(problem: LoraLinearProblem) -> str | None:
    """Reason why the kernels cannot run this problem, or None."""
    return triton_tools.why_not_tensors(problem.device, problem.dtype, "M, N and K", problem.m, problem.n, problem.k)


def forward(problem: LoraLinearProblem, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Return y (M, N) and S (M, r) float32."""
    launches = Launches.of(problem, inputs)
    x, weight, lora_a, lora_b, scale, bias, *_ = inputs
    s = launches.narrow_product(x, lora_a, problem.keep_scale, launches.dropout)
    if config.writes_update_first(problem.dtype, problem.adapter_dtype, bias is not None):
        y = launches.rank_product(problem.dtype, (s, lora_b, scale), bias, NO_DROPOUT)
        add_base(y, x, weight.t(), problem.row_invariant)
    else:
        y = base(x, weight, bias, problem.row_invariant)
        launches.add_rank_product(y, (s, lora_b, scale))
    return y, s


def backward(problem: LoraLinearProblem, inputs: Inputs, s: Tensor, dy: Tensor, needs: Needs) -> Gradients:
    """Return the gradients that ``needs`` asks for; eager torch too rounds each of dX's two parts in any dtype."""
    launches = Launches.of(problem, inputs)
    x, weight, lora_a, lora_b, scale, *_ = inputs
    ds, db, dbias = launches.narrow_and_reduce(dy, s, lora_b, scale, needs)
    dx = da = None
    if ds is not None and needs.x:
        dx = launches.rank_product(problem.dtype, (ds, lora_a.t(), 1.0), None, launches.dropout)
        add_base(dx, dy, weight, problem.row_invariant)
    if ds is not None and needs.lora_a:
        da = launches.reduce_rows(x, ds, problem.keep_scale, launches.dropout)
    return Gradients(
        x=dx,
        weight=dy.t() @ x if needs.weight else None,
        lora_a=None if da is None else da.to(problem.adapter_dtype),
        lora_b=None if db is None else db.to(problem.adapter_dtype),
        bias=None if dbias is None else dbias.to(problem.dtype),
    )


def base(x: Tensor, weight: Tensor, bias: Tensor | None, row_invariant: bool) -> Tensor:
    """x W^T + bias: cuBLAS's, but where a row's bits may depend on no other row."""
    if not row_invariant:
        return F.linear(x, weight, bias)
    return _product_kernel().product(x, weight.t(), bias, _product_config(x, weight.shape[0]))


def base_gradient(dy: Tensor, weight: Tensor, row_invariant: bool) -> Tensor:
    """dY W, likewise."""
    if not row_invariant:
        return dy @ weight
    return _product_kernel().product(dy, weight, None, _product_config(dy, weight.shape[1]))


def add_base(out: Tensor, left: Tensor, right: Tensor, row_invariant: bool) -> None:
    """out += left right, in place, likewise."""
    if not row_invariant:
        add_product(out, left, right)
        return
    _product_kernel().add_product(out, left, right, _product_config(left, out.shape[1]))


def _product_config(left: Tensor, n: int) -> config.ProductConfig:
    return triton_tools.chosen(config.product_config, n, left.shape[1], left.dtype, hardware(left.device))


@cache
def _product_kernel() -> Any:
    from peft_kernels.lora.kernels import triton_product

    return triton_product


@cache
def _kernels() -> tuple[ModuleType, ModuleType]:
    from peft_kernels.lora.kernels import triton_bwd, triton_fwd

    return triton_fwd, triton_bwd


class Launches(NamedTuple):
    """The launches of one call: what they share, and the choice of a config for each."""

    fwd: ModuleType
    bwd: ModuleType
    hardware: Hardware
    dropout: Dropout
    exact: bool
    r: int
    row_invariant: bool

    @staticmethod
    def of(problem: LoraLinearProblem, inputs: Inputs) -> Launches:
        fwd, bwd = _kernels()
        return Launches(
            fwd=fwd,
            bwd=bwd,
            hardware=hardware(problem.device),
            dropout=NO_DROPOUT
            if inputs.seed is None
            else Dropout(inputs.seed, problem.dropout_threshold, problem.keep_scale, problem.lane),
            exact=problem.adapter_dtype != problem.dtype,
            r=problem.r,
            row_invariant=problem.row_invariant,
        )

    def narrow_product(
        self,
        x: Tensor,
        a: Tensor,
        factor: float | Tensor,
        dropout: Dropout,
        out: Tensor | None = None,
        lanes: Lanes | None = None,
    ) -> Tensor:
        """factor * drop(x) a^T, float32."""
        (m, k), r = x.shape, a.shape[0]
        rows = 0 if self.row_invariant else m
        facts = rows, k, r, x.dtype, self.exact, self.hardware, lanes, self.row_invariant
        chosen = triton_tools.chosen(config.narrow_product_config, *facts)
        return self.fwd.narrow_product(x, a, factor, dropout, self.exact, chosen, out, lanes)

    def rank_product(
        self,
        dtype: torch.dtype,
        term: tuple[Tensor, Tensor, float | Tensor],
        bias: Tensor | None,
        dropout: Dropout,
        lanes: Lanes | None = None,
    ) -> Tensor:
        """bias + the rank product, in ``dtype``."""
        chosen = triton_tools.chosen(config.rank_product_config, dtype, self.hardware, lanes)
        return self.fwd.rank_product(self.fwd.RankProduct(*term), bias, dropout, dtype, chosen, lanes)

    def add_rank_product(
        self,
        y: Tensor,
        term: tuple[Tensor, Tensor, float | Tensor],
        dropout: Dropout = NO_DROPOUT,
        lanes: Lanes | None = None,
    ) -> None:
        """y += the rank product, in place."""
        chosen = triton_tools.chosen(config.rank_product_config, y.dtype, self.hardware, lanes)
        self.fwd.add_rank_product(y, self.fwd.RankProduct(*term), dropout, chosen, lanes)

    def narrow_and_reduce(
        self,
        dy: Tensor,
        s: Tensor | None,
        b: Tensor,
        scale: float | Tensor,
        needs: Needs,
        out: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """dS, in ``out`` if there is one, dB and dbias, float32: in one pass over dy, or in one for each where the rank
        makes that cheaper, or torch's sum of the parts of dS would have an order by the number of rows.
        """
        (m, n), needs_ds = dy.shape, needs.x or needs.lora_a
        asked = needs_ds, needs.lora_b, needs.bias
        if config.reads_dy_once(self.r) and any(asked) and not (self.row_invariant and needs_ds):
            facts = m, n, self.r, dy.dtype, self.exact, self.hardware
            chosen = triton_tools.chosen(config.narrow_and_reduce_config, *facts)
            return self.bwd.narrow_and_reduce(dy, s, b, scale, asked, self.r, self.exact, chosen, out)
        ds = self.narrow_product(dy, b.t(), scale, NO_DROPOUT, out) if needs_ds else None
        db = self.reduce_rows(dy, s, scale, NO_DROPOUT).t() if s is not None and needs.lora_b else None
        return ds, db, dy.sum(0, dtype=torch.float32) if needs.bias else None

    def reduce_rows(
        self, x: Tensor, s: Tensor, factor: float | Tensor, dropout: Dropout, lanes: Lanes | None = None
    ) -> Tensor:
        """factor * s^T drop(x), float32."""
        (m, k), r = x.shape, s.shape[1]
        chosen = triton_tools.chosen(config.reduce_rows_config, m, k, r, x.dtype, self.exact, self.hardware, lanes)
        return self.bwd.reduce_rows(x, s, factor, dropout, self.exact, chosen, lanes)


ROW_INVARIANT_FORM = Implementation(
    name="triton" + ROW_INVARIANT,
    why_not_environment=triton_tools.why_not_environment,
    why_not=why_not,
    qualification=qualification.TRITON,
    forward=of_row_invariant(triton_tools.on_device(forward)),
    backward=of_row_invariant(triton_tools.on_device(backward)),
)

IMPLEMENTATION = Implementation(
    name="triton",
    why_not_environment=triton_tools.why_not_environment,
    why_not=why_not,
    qualification=qualification.TRITON,
    forward=triton_tools.on_device(forward),
    backward=triton_tools.on_device(backward),
    row_invariant=ROW_INVARIANT_FORM,
)
