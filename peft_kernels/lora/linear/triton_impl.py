"""Capability record of the Triton backend, and the order of its launches. Imports the kernels only to launch them."""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_kernels._core import triton_tools
from peft_kernels._core.device import Hardware, hardware
from peft_kernels._core.dispatch import Implementation
from peft_kernels._core.explain import note
from peft_kernels.lora import qualification
from peft_kernels.lora.kernels import config
from peft_kernels.lora.kernels.dropout import NO_DROPOUT, Dropout
from peft_kernels.lora.linear.problem import Gradients, Inputs, LoraLinearProblem, Needs


def why_not(problem: LoraLinearProblem) -> str | None:
    """Reason why the kernels cannot run this problem, or None."""
    return triton_tools.why_not_tensors(problem.device, problem.dtype, "M, N and K", problem.m, problem.n, problem.k)


def paths(problem: LoraLinearProblem) -> tuple[config.Path, ...]:
    """Ways to the base product, the one that would be chosen first; float32 and ragged rows have but one."""
    if not problem.rows_aligned or problem.dtype == torch.float32:
        return ("cublas",)
    chosen = config.base_product_path(problem.m, problem.n, problem.k, problem.dtype, True, hardware(problem.device))
    return ("fused", "cublas") if chosen == "fused" else ("cublas", "fused")


def forward(problem: LoraLinearProblem, inputs: Inputs, path: config.Path | None = None) -> tuple[Tensor, Tensor]:
    """Return y (M, N) and S (M, r) float32, by a path of ``paths``."""
    launches = _Launches.of(problem, inputs, path)
    x, weight, lora_a, lora_b, scale, bias, *_ = inputs
    s = launches.narrow_product(x, lora_a, problem.keep_scale, launches.dropout)
    return launches.product(x, weight, (s, lora_b, scale), bias, NO_DROPOUT), s


def backward(
    problem: LoraLinearProblem,
    inputs: Inputs,
    s: Tensor,
    dy: Tensor,
    needs: Needs,
    path: config.Path | None = None,
) -> Gradients:
    """Return the gradients that ``needs`` asks for."""
    launches = _Launches.of(problem, inputs, path)
    x, weight, lora_a, lora_b, scale, *_ = inputs
    ds, db, dbias = launches.narrow_and_reduce(dy, s, lora_b, scale, needs)
    dx = da = None
    if ds is not None and needs.x:
        dx = launches.product(dy, weight.t(), (ds, lora_a.t(), 1.0), None, launches.dropout)
    if ds is not None and needs.lora_a:
        da = launches.reduce_rows(x, ds, problem.keep_scale, launches.dropout)
    return Gradients(
        x=dx,
        weight=dy.t() @ x if needs.weight else None,
        lora_a=None if da is None else da.to(problem.adapter_dtype),
        lora_b=None if db is None else db.to(problem.adapter_dtype),
        bias=None if dbias is None else dbias.to(problem.dtype),
    )


@cache
def _kernels() -> tuple[ModuleType, ModuleType]:
    from peft_kernels.lora.kernels import triton_bwd, triton_fwd

    return triton_fwd, triton_bwd


class _Launches(NamedTuple):
    """The launches of one call: what they share, and the choice of a config for each."""

    fwd: ModuleType
    bwd: ModuleType
    hardware: Hardware
    dropout: Dropout
    exact: bool
    r: int
    path: config.Path | None

    @staticmethod
    def of(problem: LoraLinearProblem, inputs: Inputs, path: config.Path | None) -> _Launches:
        fwd, bwd = _kernels()
        return _Launches(
            fwd=fwd,
            bwd=bwd,
            hardware=hardware(problem.device),
            dropout=Dropout(inputs.seed, problem.dropout_threshold, problem.keep_scale)
            if inputs.seed is not None
            else NO_DROPOUT,
            exact=problem.adapter_dtype != problem.dtype,
            r=problem.r,
            path=path,
        )

    def narrow_product(self, x: Tensor, a: Tensor, factor: float | Tensor, dropout: Dropout) -> Tensor:
        """factor * drop(x) a^T, float32."""
        (m, k), r = x.shape, a.shape[0]
        chosen = triton_tools.chosen(config.narrow_product_config, m, k, r, x.dtype, self.exact, self.hardware)
        return self.fwd.narrow_product(x, a, factor, dropout, self.exact, chosen)

    def product(
        self, x: Tensor, w: Tensor, term: tuple[Tensor, Tensor, float | Tensor], bias: Tensor | None, dropout: Dropout
    ) -> Tensor:
        """x w^T + bias + the rank product, by the fused kernel or by cuBLAS and one pass in place."""
        (m, k), n, r = x.shape, w.shape[0], term[1].shape[1]
        rank_product, aligned = self.fwd.RankProduct(*term), self.fwd.has_aligned_rows(x, w)
        # dY may be ragged where x is not; the fused kernel is not checked on such rows.
        asked = self.path if aligned else None
        path = asked or triton_tools.chosen(config.base_product_path, m, n, k, x.dtype, aligned, self.hardware)
        note(lambda: f"  lora_linear's base product: {path}")
        if path == "fused":
            facts = r, x.dtype, dropout.seed is not None, aligned, self.hardware
            chosen = triton_tools.chosen(config.product_config, *facts)
            return self.fwd.product(x, w, rank_product, bias, dropout, self.hardware.sm_count, chosen)
        y = F.linear(x, w, bias)
        chosen_for_y = triton_tools.chosen(config.add_rank_product_config, r, x.dtype, self.hardware)
        self.fwd.add_rank_product(y, rank_product, dropout, chosen_for_y)
        return y

    def narrow_and_reduce(
        self, dy: Tensor, s: Tensor, b: Tensor, scale: float | Tensor, needs: Needs
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """dS, dB and dbias, float32: in one pass over dy, or in one for each where the rank makes that cheaper."""
        (m, n), needs_ds = dy.shape, needs.x or needs.lora_a
        asked = needs_ds, needs.lora_b, needs.bias
        if config.reads_dy_once(self.r) and any(asked):
            facts = m, n, self.r, dy.dtype, self.exact, self.hardware
            chosen = triton_tools.chosen(config.narrow_and_reduce_config, *facts)
            return self.bwd.narrow_and_reduce(dy, s, b, scale, asked, self.r, self.exact, chosen)
        ds = self.narrow_product(dy, b.t(), scale, NO_DROPOUT) if needs_ds else None
        db = self.reduce_rows(dy, s, scale, NO_DROPOUT).t() if needs.lora_b else None
        return ds, db, dy.sum(0, dtype=torch.float32) if needs.bias else None

    def reduce_rows(self, x: Tensor, s: Tensor, factor: float | Tensor, dropout: Dropout) -> Tensor:
        """factor * s^T drop(x), float32."""
        (m, k), r = x.shape, s.shape[1]
        chosen = triton_tools.chosen(config.reduce_rows_config, m, k, r, x.dtype, self.exact, self.hardware)
        return self.bwd.reduce_rows(x, s, factor, dropout, self.exact, chosen)


IMPLEMENTATION = Implementation(
    name="triton",
    why_not_environment=triton_tools.why_not_environment,
    why_not=why_not,
    qualification=qualification.TRITON,
    forward=triton_tools.on_device(forward),
    backward=triton_tools.on_device(backward),
    paths=paths,
)
