"""The problems by which a machine checks `prefix_attention`'s kernels, and eager torch beside them.

A part is the dtypes and the block that the head dimension falls into. Its problems have every kind of mask, one prefix
for the batch or one for each row, several query heads to a key head, and few rows before many keys, which are split.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from peft_kernels._core.device import Hardware
from peft_kernels._core.qualification import PAIRS, Draw, Family, Qualification, block_of, double, dtype_name, dtypes_of
from peft_kernels.prefix.composite import composite
from peft_kernels.prefix.kernels.fused_operators import PATHS
from peft_kernels.prefix.problem import NAME, Inputs, PrefixAttentionProblem, default_scale, make_problem

_BLOCKS = (16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Case:
    """One problem; ``shared`` has one prefix for the batch."""

    b: int
    h: int
    h_kv: int
    s: int
    l: int  # noqa: E741
    p: int
    d: int
    dtype: torch.dtype
    prefix_dtype: torch.dtype
    causal: bool
    padded: bool
    shared: bool

    def __str__(self) -> str:
        mask = f"{' causal' * self.causal}{' padded' * self.padded}{' shared' * self.shared}"
        sizes = f"b{self.b} h{self.h}:{self.h_kv} s{self.s} l{self.l} p{self.p} d{self.d}"
        return f"{sizes} {dtype_name(self.dtype, self.prefix_dtype)}{mask}"


def _make(case: Case, device: torch.device, seed: int) -> tuple[Inputs, Tensor]:
    draw, rows = Draw(device, seed), (case.b, case.h_kv, case.l, case.d)
    prefix = (*(() if case.shared else (case.b,)), case.h_kv, case.p, case.d)
    call = Inputs(
        q=draw.normal(case.dtype, case.b, case.h, case.s, case.d),
        k=draw.normal(case.dtype, *rows),
        v=draw.normal(case.dtype, *rows),
        prefix_k=draw.normal(case.prefix_dtype, *prefix),
        prefix_v=draw.normal(case.prefix_dtype, *prefix),
        causal=case.causal,
        scale=default_scale(case.d),
        key_padding_mask=_padding(case, device) if case.padded else None,
    )
    return call, draw.normal(case.dtype, case.b, case.h, case.s, case.d)


def _padding(case: Case, device: torch.device) -> Tensor:
    """Each row of the batch has its own number of keys left out, at its beginning."""
    left_out = torch.arange(case.b, device=device)[:, None] * case.l // (2 * case.b) + 1
    return torch.arange(case.l, device=device)[None, :] >= left_out


def _eager(call: Inputs) -> Tensor:
    """Joined keys, a dense mask and torch's attention, on the path that rounds y and each gradient once."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.MATH):
        return composite(make_problem(call), call)


def _exact(call: Inputs) -> Inputs:
    """A float32 prefix is cast to q's dtype first."""
    rounded = call._replace(prefix_k=call.prefix_k.to(call.q.dtype), prefix_v=call.prefix_v.to(call.q.dtype))
    exact: Inputs = double(rounded)
    return exact


FAMILY = Family(NAME, _make, _eager, _exact)

_TRITON = {f"{pair} d{block}": (pair, block) for pair in PAIRS for block in _BLOCKS}


def _touched(problem: PrefixAttentionProblem) -> tuple[str, ...]:
    return (f"{dtype_name(problem.dtype, problem.prefix_dtype)} d{block_of(problem.d, _BLOCKS)}",)


def _cases(part: str, hardware: Hardware) -> Sequence[Case]:
    pair, d = _TRITON[part]
    # With few multiprocessors each has a program, and no sequence of keys is split.
    dtypes, many = dtypes_of(pair), 520 if hardware.sm_count >= 8 else 130
    return (
        Case(2, 4, 2, 70, 70, 20, d, *dtypes, causal=True, padded=False, shared=True),
        Case(3, 2, 1, 40, 50, 5, d - 4, *dtypes, causal=True, padded=True, shared=False),
        Case(2, 2, 2, 5, many, 33, d, *dtypes, causal=False, padded=True, shared=True),
        Case(1, 3, 1, 40, 40, 17, d - 3, *dtypes, causal=False, padded=False, shared=False),
    )


TRITON = Qualification(
    FAMILY, tuple(_TRITON), _touched, _cases, quick=("float32 d32", "float16 d32", "bfloat16 d64", "bfloat16 d128")
)


_BLOCKS_OF = {"flash": _BLOCKS, "cudnn": _BLOCKS[:-1], "efficient": _BLOCKS}
_HALVES = tuple(pair for pair in PAIRS if "16" in pair)


def _cases_of_pieces(operator: str, part: str, hardware: Hardware) -> Sequence[Case]:
    """Whole and ragged blocks, one key head for each query head and for several, with the masks that it takes.

    An operator's rows are multiples of 16 bytes; what is no multiple of anything is lengths.
    """
    pair, d = _TRITON[part]
    dtypes, some = dtypes_of(pair), d - 8 if d > 16 else 8
    if operator == "cudnn":
        return (
            Case(2, 4, 2, 70, 70, 20, d, *dtypes, causal=True, padded=False, shared=True),
            Case(1, 3, 1, 40, 261, 33, some, *dtypes, causal=False, padded=False, shared=False),
        )
    padded = operator == "efficient"
    return (
        Case(2, 4, 2, 70, 90, 20, d, *dtypes, causal=True, padded=padded, shared=True),
        Case(3, 2, 2, 300, 300, 5, some, *dtypes, causal=True, padded=padded, shared=False),
        Case(1, 3, 1, 40, 261, 33, d, *dtypes, causal=False, padded=padded, shared=True),
    )


def _of_pieces(operator: str) -> Qualification:
    parts = tuple(f"{pair} d{block}" for pair in _HALVES for block in _BLOCKS_OF[operator])
    return Qualification(
        FAMILY, parts, _touched, partial(_cases_of_pieces, operator), quick=("bfloat16 d64", "bfloat16 d128")
    )


def _wide_cases(part: str, hardware: Hardware) -> Sequence[Case]:
    """Several blocks of rows and of keys, whole and ragged, and sequences that are split on a GPU."""
    pair, d = _TRITON[part]
    dtypes = dtypes_of(pair)
    return (
        Case(2, 4, 2, 150, 300, 20, d, *dtypes, causal=True, padded=False, shared=True),
        Case(2, 1, 1, 256, 256, 70, d, *dtypes, causal=True, padded=True, shared=False),
        Case(1, 3, 1, 50, 1030, 33, d - 8, *dtypes, causal=False, padded=True, shared=True),
    )


_WIDE = Qualification(
    FAMILY, tuple(f"{pair} d128" for pair in _HALVES), _touched, _wide_cases, quick=("bfloat16 d128",)
)

OF_PATH = {"wide": _WIDE, **{path: _of_pieces(taken.operator.name) for path, taken in PATHS.items()}}
"""For each path of the Triton backend but the first, which is checked as ``TRITON``."""
