"""The problems by which a machine checks `lora_gain`'s kernels: those of `lora_linear`, each with a gain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_kernels._core.device import Hardware
from peft_kernels._core.qualification import PAIRS, Draw, Family, Qualification, block_of, double, dtype_name, dtypes_of
from peft_kernels.lora.gain.problem import NAME, Inputs, LoraGainProblem
from peft_kernels.lora.kernels import dropout

_SEED = 20240229
_P = 0.1
_BLOCKS = (16, 32)
# A rank for the tall and the ragged problem of each block: the whole block, and a part of it.
_RANKS = {"16": (16, 11), "32": (32, 27), "more": (96, 130)}


@dataclass(frozen=True)
class Case:
    """One problem; ``is_plain`` leaves out the bias, has a float for a scale and a gain in x's dtype."""

    m: int
    n: int
    k: int
    r: int
    dtype: torch.dtype
    adapter_dtype: torch.dtype
    p: float
    is_plain: bool = False

    def __str__(self) -> str:
        dtypes = dtype_name(self.dtype, self.adapter_dtype)
        return f"{self.m}x{self.n}x{self.k} r{self.r} {dtypes} p{self.p}"


def _make(case: Case, device: torch.device, seed: int) -> tuple[Inputs, Tensor]:
    """The low-rank term is about as large as the base product."""
    draw = Draw(device, seed)
    call = Inputs(
        x=draw.normal(case.dtype, case.m, case.k),
        weight=draw.normal(case.dtype, case.n, case.k, std=case.k**-0.5),
        lora_a=draw.normal(case.adapter_dtype, case.r, case.k, std=case.k**-0.5),
        lora_b=draw.normal(case.adapter_dtype, case.n, case.r, std=case.r**-0.5),
        gain=draw.normal(case.dtype if case.is_plain else torch.float32, case.n),
        scale=0.75 if case.is_plain else torch.tensor(0.75, device=device),
        bias=None if case.is_plain else draw.normal(case.dtype, case.n),
        dropout_p=case.p,
        seed=dropout.as_seed(_SEED + seed, device) if case.p else None,
    )
    return call, draw.normal(case.dtype, case.m, case.n)


def _eager(call: Inputs) -> Tensor:
    """PEFT's formulas of DoRA, but for a base product of x itself: what is added to its base layer's result."""
    x = call.x.to(call.lora_a.dtype)
    if call.seed is not None:
        limit = dropout.threshold(call.dropout_p)
        keep = dropout.keep_mask(call.seed, x.shape[0], x.shape[1], limit)
        x = x * keep.to(x.dtype).mul_(dropout.keep_scale(limit))
    result = F.linear(call.x, call.weight, call.bias)
    base = result if call.bias is None else result - call.bias
    update = F.linear(F.linear(x, call.lora_a), call.lora_b)
    return (result + ((call.gain - 1) * base + call.gain * update * call.scale)).to(result.dtype)


_PARTS = {f"{pair} r{block}": (pair, block) for pair in PAIRS for block in _RANKS}


def _touched(problem: LoraGainProblem) -> tuple[str, ...]:
    return (f"{dtype_name(problem.dtype, problem.adapter_dtype)} r{block_of(problem.r, _BLOCKS)}",)


def _cases(part: str, hardware: Hardware) -> Sequence[Any]:
    pair, block = _PARTS[part]
    (dtype, adapter), (whole, some) = dtypes_of(pair), _RANKS[block]
    return (
        Case(64 * hardware.sm_count + 12, 136, 136, whole, dtype, adapter, 0.0),
        Case(45, 151, 603, some, dtype, adapter, _P, is_plain=True),
    )


TRITON = Qualification(
    Family(NAME, _make, _eager, double), tuple(_PARTS), _touched, _cases, quick=("bfloat16 r16", "float16+float32 r32")
)
