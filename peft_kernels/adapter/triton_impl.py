"""Capability record of the Triton backend, and the order of its launches. Imports the kernels only to launch them."""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from peft_kernels._core import tma, triton_tools
from peft_kernels._core.device import Hardware, hardware
from peft_kernels._core.dispatch import Implementation
from peft_kernels._core.explain import note
from peft_kernels.adapter import qualification
from peft_kernels.adapter.kernels import config
from peft_kernels.adapter.problem import BottleneckAdapterProblem, Gradients, Inputs, Needs


def why_not(problem: BottleneckAdapterProblem) -> str | None:
    """Reason why the kernels cannot run this problem, or None."""
    return triton_tools.why_not_tensors(problem.device, problem.dtype, "M, N and K", problem.m, problem.n, problem.k)


def paths(problem: BottleneckAdapterProblem) -> tuple[config.Path, ...]:
    """Ways to the two products, the one that would be chosen first; wide bottlenecks have but one."""
    if problem.r > config.FUSED_LIMIT:
        return ("split",)
    chosen = config.product_path(problem.m, problem.r, hardware(problem.device))
    return ("fused", "split") if chosen == "fused" else ("split", "fused")


def forward(
    problem: BottleneckAdapterProblem, inputs: Inputs, path: config.Path | None = None
) -> tuple[Tensor, Tensor]:
    """Return y (M, N) and z (M, r) float32, by a path of ``paths``."""
    launches = _Launches.of(problem, path)
    x, wd, wu, bd, bu, *_, scale = inputs
    residual = x if problem.serial else inputs.residual
    precisions = launches.precisions(problem.out_dtype)
    if launches.is_fused():
        return launches.fwd.bottleneck(
            x, (wd, wu), (bd, bu), residual, scale, problem.activation, problem.out_dtype, precisions,
            launches.bottleneck_config(x, problem.out_dtype),
        )  # fmt: skip
    z = launches.narrow_product(x, wd, bd, 1.0, None)
    return launches.wide_product(z, wu.t(), bu, residual, scale, problem.activation, problem.out_dtype), z


def backward(
    problem: BottleneckAdapterProblem,
    inputs: Inputs,
    z: Tensor,
    dy: Tensor,
    needs: Needs,
    path: config.Path | None = None,
) -> Gradients:
    """Return the gradients that ``needs`` asks for; without one of down_weight ``inputs.x`` is not read."""
    launches = _Launches.of(problem, path)
    dtype = problem.adapter_dtype
    dx = dwd = dbd = dwu = dbu = None
    if needs.dz:
        dx, dz = launches.bottleneck_grad(inputs, z, dy, needs.x)
        dbd = dz.sum(0).to(dtype) if needs.down_bias else None
        if needs.down_weight:
            dwd, _ = launches.reduce_rows(inputs.x, dz, 1.0, "identity", t_first=False, needs=(True, False))
    if needs.up_weight or needs.up_bias:
        asked = needs.up_weight, needs.up_bias
        dwu, dbu = launches.reduce_rows(dy, z, inputs.scale, problem.activation, t_first=True, needs=asked)
    return Gradients(
        x=dx,
        down_weight=None if dwd is None else dwd.to(dtype),
        up_weight=None if dwu is None else dwu.to(dtype),
        down_bias=dbd,
        up_bias=None if dbu is None else dbu.to(dtype),
    )


@cache
def _kernels() -> tuple[ModuleType, ModuleType]:
    from peft_kernels.adapter.kernels import triton_bwd, triton_fwd

    return triton_fwd, triton_bwd


class _Launches(NamedTuple):
    """The launches of one call: what they share, and the choice of a config for each."""

    fwd: ModuleType
    bwd: ModuleType
    problem: BottleneckAdapterProblem
    hardware: Hardware
    path: config.Path | None

    @staticmethod
    def of(problem: BottleneckAdapterProblem, path: config.Path | None) -> _Launches:
        return _Launches(*_kernels(), problem, hardware(problem.device), path)

    def is_fused(self) -> bool:
        """Whether both products of a direction run in one launch."""
        facts = self.problem.m, self.problem.r, self.hardware
        path = self.path or triton_tools.chosen(config.product_path, *facts)
        note(lambda: f"  bottleneck_adapter's products: {path}")
        return path == "fused"

    def bottleneck_config(self, t: Tensor, out_dtype: torch.dtype) -> config.BottleneckConfig:
        """The config of a fused launch whose first product reads t, and whose second writes ``out_dtype``."""
        m, r, adapter_dtype = self.problem.m, self.problem.r, self.problem.adapter_dtype
        # Rows of the other matrices are as long, or as ragged; a wrong guess costs time, no correctness.
        aligned = tma.tma_can_read(t)
        facts = m, r, t.dtype, adapter_dtype, out_dtype, aligned, self.hardware
        return triton_tools.chosen(config.bottleneck_config, *facts)

    def precisions(self, out_dtype: torch.dtype) -> tuple[bool, str, str]:
        """Whether float32 weights keep their bits, and what float32 products into and out of the bottleneck may do.

        A half-precision result has no more bits than TF32, and is rounded from a sum of many products of them.
        """
        strict = triton_tools.dot_precision(self.problem.adapter_dtype)
        return self.problem.is_mixed, strict, strict if out_dtype == torch.float32 else "tf32"

    def narrow_product(
        self, t: Tensor, w: Tensor, bias: Tensor | None, factor: float | Tensor, grad_at: tuple[str, Tensor] | None
    ) -> Tensor:
        """factor * (t w^T + bias) [* act'(z)], float32."""
        (m, c), r = t.shape, w.shape[0]
        facts = m, c, r, t.dtype, self.problem.is_mixed, self.hardware
        chosen = triton_tools.chosen(config.narrow_product_config, *facts)
        return self.fwd.narrow_product(t, w, bias, factor, grad_at, self.precisions(torch.float32), chosen)

    def wide_product(
        self,
        u: Tensor,
        w: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        factor: float | Tensor,
        activation: str,
        out_dtype: torch.dtype,
    ) -> Tensor:
        """residual + factor * (act(u) w + bias)."""
        m, r = u.shape
        facts = m, r, self.problem.dtype, self.problem.is_mixed, self.hardware
        chosen = triton_tools.chosen(config.wide_product_config, *facts)
        return self.fwd.wide_product(
            u, w, bias, residual, factor, activation, out_dtype, self.precisions(out_dtype), chosen
        )

    def bottleneck_grad(self, inputs: Inputs, z: Tensor, dy: Tensor, needs_dx: bool) -> tuple[Tensor | None, Tensor]:
        """dx, and dz float32."""
        problem, wd, wu = self.problem, inputs.down_weight, inputs.up_weight
        if self.is_fused():
            return self.bwd.bottleneck_grad(
                dy, (wd if needs_dx else None, wu), z, inputs.scale, problem.activation, problem.serial, problem.dtype,
                self.precisions(problem.dtype), self.bottleneck_config(dy, problem.dtype),
            )  # fmt: skip
        dz = self.narrow_product(dy, wu.t(), None, inputs.scale, (problem.activation, z))
        if not needs_dx:
            return None, dz
        return self.wide_product(dz, wd, None, dy if problem.serial else None, 1.0, "identity", problem.dtype), dz

    def reduce_rows(
        self,
        t: Tensor,
        u: Tensor,
        factor: float | Tensor,
        activation: str,
        t_first: bool,
        needs: tuple[bool, bool],
    ) -> tuple[Tensor | None, Tensor | None]:
        """factor * act(u)^T t, or its transpose, and factor * sum t; float32, those that ``needs`` asks for."""
        problem, (m, c), r = self.problem, t.shape, self.problem.r
        facts = m, c, r, t.dtype, problem.is_mixed, self.hardware
        chosen = triton_tools.chosen(config.reduce_rows_config, *facts)
        return self.bwd.reduce_rows(
            t, u, factor, activation, t_first, needs, r, problem.adapter_dtype, self.precisions(torch.float32), chosen
        )


IMPLEMENTATION = Implementation(
    name="triton",
    why_not_environment=triton_tools.why_not_environment,
    why_not=why_not,
    qualification=qualification.TRITON,
    forward=triton_tools.on_device(forward),
    backward=triton_tools.on_device(backward),
    paths=paths,
)
