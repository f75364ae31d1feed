"""Capability record of the Triton backend, and the order of its launches. Imports the kernels only to launch them."""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_kernels._core import triton_tools
from peft_kernels._core.device import Hardware, hardware
from peft_kernels._core.dispatch import Implementation
from peft_kernels.lora.kernels import config
from peft_kernels.lora.kernels.dropout import NONE, Draw
from peft_kernels.lora.linear.problem import Gradients, Inputs, LoraLinearProblem, Needs

# Architectures on which the tests and benchmarks of this backend have run; `auto` takes it nowhere else.
VERIFIED_ARCHS: frozenset[int] = frozenset()


def why_not(problem: LoraLinearProblem) -> str | None:
    """Reason why the kernels cannot run this problem, or None."""
    reason = triton_tools.why_not_device(problem.device)
    if reason is not None:
        return reason
    if problem.dtype == torch.float64:
        return "its kernels accumulate in float32, and x is float64"
    largest = max(problem.m, problem.n, problem.k)
    if largest >= triton_tools.INDEX_LIMIT:
        return f"M, N and K must be below 2^31, got {largest}"
    return None


def why_not_auto(problem: LoraLinearProblem) -> str | None:
    """Reason why ``auto`` passes over the kernels although they run, or None."""
    return triton_tools.why_not_verified(problem.device, VERIFIED_ARCHS)


def forward(problem: LoraLinearProblem, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Return y (M, N) and S (M, r) float32."""
    launches = _Launches.of(problem, inputs)
    x, weight, lora_a, lora_b, scale, bias, *_ = inputs
    s = launches.down(x, lora_a, problem.keep_scale, launches.draw)
    return launches.product(x, weight, (s, lora_b, scale), bias, NONE), s


def backward(problem: LoraLinearProblem, inputs: Inputs, s: Tensor, dy: Tensor, needs: Needs) -> Gradients:
    """Return the gradients that ``needs`` asks for."""
    launches = _Launches.of(problem, inputs)
    x, weight, lora_a, lora_b, scale, *_ = inputs
    ds, db, dbias = launches.grad_up(dy, s, lora_b, scale, needs)
    dx = da = None
    if ds is not None and needs.x:
        dx = launches.product(dy, weight.t(), (ds, lora_a.t(), 1.0), None, launches.draw)
    if ds is not None and needs.lora_a:
        da = launches.grad_down(x, ds, problem.keep_scale, launches.draw)
    return Gradients(
        x=dx,
        weight=dy.t() @ x if needs.weight else None,
        lora_a=None if da is None else da.to(problem.adapter_dtype),
        lora_b=None if db is None else db.to(problem.adapter_dtype),
        bias=None if dbias is None else dbias.to(problem.dtype),
    )


class _Launches(NamedTuple):
    """The launches of one call: what they share, and the choice of a config for each."""

    fwd: ModuleType
    bwd: ModuleType
    hardware: Hardware
    draw: Draw
    exact: bool

    @staticmethod
    def of(problem: LoraLinearProblem, inputs: Inputs) -> _Launches:
        from peft_kernels.lora.kernels import triton_bwd, triton_fwd

        return _Launches(
            fwd=triton_fwd,
            bwd=triton_bwd,
            hardware=hardware(problem.device),
            draw=Draw(inputs.seed, problem.dropout_threshold, problem.keep_scale) if inputs.seed is not None else NONE,
            exact=problem.adapter_dtype != problem.dtype,
        )

    def down(self, x: Tensor, a: Tensor, factor: float | Tensor, draw: Draw) -> Tensor:
        """factor * drop(x) a^T, float32."""
        (m, k), r = x.shape, a.shape[0]
        chosen = config.down_config(m, k, r, x.dtype, self.exact, self.hardware)
        return self.fwd.down(x, a, factor, draw, self.exact, chosen)

    def product(
        self, x: Tensor, w: Tensor, term: tuple[Tensor, Tensor, float | Tensor], bias: Tensor | None, draw: Draw
    ) -> Tensor:
        """x w^T + bias + the low-rank term, by the fused kernel or by cuBLAS and one pass in place."""
        (m, k), n, r = x.shape, w.shape[0], term[1].shape[1]
        low_rank, aligned = self.fwd.LowRank(*term), self.fwd.has_aligned_rows(x, w)
        if config.base_product_path(m, n, k, x.dtype, aligned, self.hardware) == "fused":
            chosen = config.gemm_config(r, x.dtype, draw.seed is not None, aligned, self.hardware)
            return self.fwd.gemm(x, w, low_rank, bias, draw, self.hardware.sm_count, chosen)
        y = F.linear(x, w, bias)
        self.fwd.add_up(y, low_rank, draw, config.up_config(r, x.dtype, self.hardware))
        return y

    def grad_up(
        self, dy: Tensor, s: Tensor, b: Tensor, scale: float | Tensor, needs: Needs
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """dS, dB and dbias, float32: in one pass over dy, or in one for each where the rank makes that cheaper."""
        (m, n), r = dy.shape, b.shape[1]
        needs_ds = needs.x or needs.lora_a
        if config.reads_dy_once(r) and (needs_ds or needs.lora_b):
            chosen = config.grad_up_config(m, n, r, dy.dtype, self.exact, self.hardware)
            return self.bwd.grad_up(dy, s, b, scale, (needs_ds, needs.lora_b, needs.bias), self.exact, chosen)
        ds = self.down(dy, b.t(), scale, NONE) if needs_ds else None
        db = self.grad_down(dy, s, scale, NONE).t() if needs.lora_b else None
        return ds, db, dy.sum(0, dtype=torch.float32) if needs.bias else None

    def grad_down(self, x: Tensor, ds: Tensor, factor: float | Tensor, draw: Draw) -> Tensor:
        """factor * ds^T drop(x), float32."""
        (m, k), r = x.shape, ds.shape[1]
        chosen = config.grad_down_config(m, k, r, x.dtype, self.exact, self.hardware)
        return self.bwd.grad_down(x, ds, factor, draw, self.exact, chosen)


IMPLEMENTATION = Implementation(
    name="triton",
    why_not_environment=triton_tools.why_not_environment,
    why_not=why_not,
    why_not_auto=why_not_auto,
    forward=forward,
    backward=backward,
)
