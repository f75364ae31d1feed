"""Problems of the prefix attention family, and what its operator owes."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple
from unittest import mock

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import SDPBackend

from peft_kernels.prefix import op, torch_blocks, torch_impl, torch_ranges
from peft_kernels.prefix.kernels import config
from peft_kernels.prefix.problem import PrefixAttentionProblem
from peft_kernels.prefix.torch_config import TorchConfig, torch_config
from python_ref import prefix as oracle
from tests.contract.draw import DTYPES, Draw, dtypes_name
from tests.contract.operators import Operator
from tests.prefix import stand_in

# Backend, and what is pinned: "small" blocks of 16 (torch: of 7 queries), "rows" blocks of whole batch rows, "ranges"
# of 5 queries, so that small problems have several of everything; "fused" both passes through torch's fused attention
# in one call, as on a GPU; "split" small blocks, and three ranges of keys, of which short sequences leave some without
# a key; "pieces" and "both" the sequence by an operator that stands in for a GPU's (stand_in.py), the latter in the
# backward pass too, where an attention can be in pieces.
VARIANTS = ("torch", "torch-small", "torch-rows", "torch-ranges", "torch-fused", "triton", "triton-small")
WITH_SPLIT = (*VARIANTS, "triton-split")
IN_PIECES = ("triton-pieces", "triton-both")


@dataclass(frozen=True)
class Case:
    """One problem.

    Attributes:
        prefix_dtype: None is dtype.
        shared: one prefix for the batch.
        padding: "none", "random" (the first batch row keeps nothing), "left" or "right".
        layout: how q, k, v lie in memory: "heads" (B, H, S, D), "tokens" (B, S, H, D), "strided" (rows with gaps),
            "columns" (last dimension not contiguous).
    """

    b: int = 2
    h: int = 4
    h_kv: int = 2
    s: int = 24
    l: int = 24  # noqa: E741
    p: int = 5
    d: int = 32
    dtype: torch.dtype = torch.float32
    prefix_dtype: torch.dtype | None = None
    causal: bool = True
    shared: bool = True
    padding: str = "none"
    layout: str = "heads"
    scale: float | None = None

    @property
    def prefix_shape(self) -> tuple[int, ...]:
        return (*(() if self.shared else (self.b,)), self.h_kv, self.p, self.d)

    @property
    def y_shape(self) -> tuple[int, ...]:
        return self.b, self.h, self.s, self.d

    @property
    def y_dtype(self) -> torch.dtype:
        return self.dtype

    def __str__(self) -> str:
        mask = ("causal" if self.causal else "full") + ("" if self.padding == "none" else f"+{self.padding}")
        sizes = f"b{self.b}-h{self.h}:{self.h_kv}-s{self.s}-l{self.l}-p{self.p}-d{self.d}"
        tail = f"{'shared' if self.shared else 'own'}-{self.layout}"
        dtypes = dtypes_name(self.dtype, self.prefix_dtype)
        return f"{sizes}-{dtypes}-{mask}-{tail}" + (f"-x{self.scale}" if self.scale else "")


class Tensors(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    prefix_k: Tensor
    prefix_v: Tensor
    mask: Tensor | None


PADDINGS = ("none", "left", "right", "random")
HALF_AND_FULL = (torch.float32, torch.bfloat16)

# Fewer and more queries than keys; a prefix longer than the sequence; heads that are no power of two; one query; none.
SHAPES = (
    Case(h=2, h_kv=1, s=37, l=50, p=5),
    Case(s=30, l=17, p=20, padding="random"),
)
OTHER_SHAPES = (
    Case(h=1, h_kv=1, s=40, l=40, p=3, d=80, causal=False, shared=False),
    Case(b=1, h=3, h_kv=1, s=20, l=20, p=40, d=96, padding="left"),
    Case(h=3, h_kv=3, s=1, l=45, p=17, shared=False, padding="random"),
    Case(h=2, s=33, l=20, p=0, padding="random"),
)

# Of those above, what torch's fused attention can run.
FUSED_SHAPES = (
    SHAPES[0],
    *OTHER_SHAPES[:3],
    Case(h=2, h_kv=1, s=20, l=31, p=20, padding="random"),
    Case(h=2, h_kv=2, s=20, l=20, p=0),
)

# What is beside a float32 prefix, strided, or of several blocks of the prefix.
IN_HALF = (
    Case(b=2, h=3, h_kv=1, s=20, l=31, p=40, dtype=torch.bfloat16, prefix_dtype=torch.float32, padding="left"),
    Case(h=2, layout="tokens", dtype=torch.float16),
    Case(b=1, h=2, h_kv=1, s=70, l=70, p=130, d=64, dtype=torch.bfloat16, layout="tokens", shared=False),
)

GRID = (
    *(replace(shape, dtype=dtype, prefix_dtype=prefix) for shape in SHAPES for dtype, prefix in DTYPES),
    *(replace(shape, dtype=dtype) for shape in OTHER_SHAPES for dtype in (torch.float32, torch.bfloat16)),
    *(Case(h=2, layout=layout, dtype=torch.bfloat16) for layout in ("tokens", "strided", "columns")),
    Case(b=1, d=64, dtype=torch.bfloat16),
    Case(b=1, h=2, d=128, dtype=torch.bfloat16),
    Case(b=1, h=2, h_kv=1, d=256, dtype=torch.bfloat16, causal=False),
    Case(b=1, h=2, h_kv=1, d=256, s=20, l=20),
    Case(b=1, h=2, h_kv=1, d=256, s=40, l=90, dtype=torch.bfloat16),
    Case(b=1, d=20, p=33),
    Case(b=1, p=130, s=9, l=7),
    Case(b=1, h=2, h_kv=1, p=1024, s=5, l=6, dtype=torch.bfloat16),
    Case(b=3, h=2, h_kv=1, s=20, l=20, dtype=torch.bfloat16, padding="right"),
    Case(b=1, l=0, p=9, s=20),
    Case(b=1, h=2, scale=-0.3),
    Case(b=5, h=1, h_kv=1, s=17, l=17, dtype=torch.bfloat16, prefix_dtype=torch.float32),
)


def make(case: Case, device: torch.device, seed: int = 0) -> Tensors:
    """Draw fresh normal tensors; scores have variance one."""
    draw = Draw(seed)
    drawn = [
        draw.normal(case.b, case.h, case.s, case.d),
        *(draw.normal(case.b, case.h_kv, case.l, case.d) for _ in range(2)),
        *(draw.normal(*case.prefix_shape) for _ in range(2)),
    ]
    return _as_asked(case, drawn, device, draw)


def make_exact(case: Case, device: torch.device, seed: int = 0) -> tuple[Tensors, Tensor]:
    """Draw tensors whose results are exact in any order of any sum, and an output gradient.

    Queries and keys are one-hot with a factor of 32 and D = 32 or more, so that with scale 1 a score is 1024 or 0:
    softmax is 0 or 1 in every dtype where one visible key matches, and where none matches, or several do, the shares
    are powers of two only if the counts are. So row i's query matches exactly one key, a prefix's, which all see.
    """
    if case.p == 0 or case.d < case.p:
        raise ValueError("needs a prefix, and no more keys in it than dimensions")
    draw = Draw(seed)
    index = torch.randint(0, case.p, (case.b, case.h, case.s), generator=draw.generator)
    prefix_k = torch.eye(case.p, case.d, dtype=torch.float64).expand(case.prefix_shape).clone()
    v = draw.integers(2, case.b, case.h_kv, case.l, case.d)
    q = torch.nn.functional.one_hot(index, case.d).double()
    drawn = [32.0 * q, torch.zeros_like(v), v, 32.0 * prefix_k, draw.integers(2, *case.prefix_shape)]
    tensors = _as_asked(case, drawn, device, draw)
    return tensors, draw.integers(2, *case.y_shape).to(device, case.dtype)


def _as_asked(case: Case, drawn: list[Tensor], device: torch.device, draw: Draw) -> Tensors:
    """Put float64 tensors on the device in the case's dtypes, q, k and v in its layout, and draw its mask."""
    prefix_dtype = case.prefix_dtype or case.dtype
    return Tensors(
        *(_laid_out(tensor.to(device, case.dtype), case.layout) for tensor in drawn[:3]),
        *(tensor.to(device, prefix_dtype) for tensor in drawn[3:]),
        mask=_mask(case, device, draw.generator),
    )


def _laid_out(x: Tensor, layout: str) -> Tensor:
    if layout == "tokens":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "strided":
        return torch.cat((x, x), dim=-1)[..., : x.shape[-1]]
    if layout == "columns":
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    return x


def _mask(case: Case, device: torch.device, generator: torch.Generator) -> Tensor | None:
    if case.padding == "none":
        return None
    if case.padding in ("left", "right"):
        padded = torch.arange(1, case.b + 1)[:, None] * case.l // (2 * max(1, case.b))
        index = torch.arange(case.l)[None, :]
        return ((index >= padded) if case.padding == "left" else (index < case.l - padded)).to(device)
    mask = torch.rand(case.b, case.l, generator=generator) < 0.7
    mask[:1] = False
    return mask.to(device)


@contextlib.contextmanager
def _pin(variant: str) -> Iterator[str]:
    """What the variant pins."""
    backend, _, pinned = variant.partition("-")
    patches: list[tuple[object, str, object]] = []
    if variant in ("triton-small", "triton-split"):
        functions = ("forward_config", "grad_q_config", "grad_kv_config", "grad_prefix_config")
        splits = 3 if variant == "triton-split" else 1
        patches += [(config, function, _small(getattr(config, function), splits)) for function in functions]
        # Fewer parts at once than there are.
        merge = config.MergeConfig(BLOCK_S=2, BLOCK_D=0, num_warps=4)
        patches.append((config, "merge_config", lambda d, _: replace(merge, BLOCK_D=config._block_d(d))))
    elif variant in IN_PIECES:
        patches += stand_in.patches(both=variant == "triton-both")
    elif pinned:
        patches += [
            (torch_impl, "torch_config", functools.partial(_pinned, pinned, torch_config)),
            (torch_blocks, "torch_block", functools.partial(_blocks, pinned)),
            (torch_ranges, "torch_range_rows", lambda problem: 5 if problem.causal else problem.s),
            (torch_ranges, "torch_part", _part),
        ]
    with contextlib.ExitStack() as stack:
        for module, function, replacement in patches:
            stack.enter_context(mock.patch.object(module, function, replacement))
        yield backend


def _blocks(pinned: str, problem: PrefixAttentionProblem) -> tuple[int, int, int]:
    """All batch rows but one, or all heads but one."""
    by_rows = max(1, problem.b - 1), problem.h_kv, max(1, problem.s)
    return by_rows if pinned == "rows" else (1, max(1, problem.h_kv - 1), 7)


def _pinned(pinned: str, choose: Callable[..., TorchConfig], problem: PrefixAttentionProblem) -> object:
    chosen = choose(problem)
    if pinned in ("small", "rows") or chosen.forward == "blocks":
        return replace(chosen, forward="blocks", backward="blocks")
    if pinned == "fused":
        return replace(chosen, forward="fused", backward="fused")
    return replace(chosen, forward="ranges", backward="ranges", products=problem.wide_dtype)


def _part(problem: PrefixAttentionProblem, dtype: torch.dtype, threads: int) -> tuple[int, int]:
    """Whole where nothing is cast, as it must be, and else less than there is."""
    if dtype == problem.dtype:
        return problem.b, problem.h_kv
    return 1, max(1, problem.h_kv - 1)


def _small(choose: Callable[..., object], splits: int) -> Callable[..., object]:
    def chosen(*arguments: object) -> object:
        full = choose(*arguments)
        pinned = {name: 16 for name in ("BLOCK_M", "BLOCK_N", "BLOCK_P") if hasattr(full, name)}
        return replace(full, **pinned | ({"splits": splits} if isinstance(full, config.ForwardConfig) else {}))

    return chosen


def arguments(case: Case, tensors: Tensors) -> dict[str, Any]:
    named = tensors._asdict()
    return {"key_padding_mask": named.pop("mask"), **named, "causal": case.causal, "scale": case.scale}


def eager(case: Case, tensors: Tensors, backend: SDPBackend = SDPBackend.MATH) -> Tensor:
    return oracle.eager(**arguments(case, tensors), backend=backend)


def _oracle(case: Case, tensors: Tensors, dy: Tensor) -> tuple[Tensor, oracle.Gradients]:
    """A float32 prefix is cast to q's dtype first."""
    *read, mask = tensors
    given = arguments(case, Tensors(*(tensor.to(case.dtype).double() for tensor in read), mask))
    return oracle.forward(**given), oracle.backward(dy.double(), **given)


OPERATOR = Operator(
    function=op.prefix_attention,
    op=op,
    differentiable=Tensors._fields[:5],
    variants=VARIANTS,
    pin=_pin,
    make=make,
    make_exact=make_exact,
    arguments=arguments,
    eager=eager,
    # Whose fused kernel keeps the joined keys and values whatever wants a gradient.
    usual=functools.partial(eager, backend=SDPBackend.FLASH_ATTENTION),
    oracle=_oracle,
    # A row's scores are one value for its D results.
    draws=lambda case: min(4, 64 // (case.b * case.h * case.s)),
    budget=(
        *itertools.product(GRID, ("torch", "triton")),
        # What auto makes of small calls on a CPU: torch's own operators.
        *((case, "auto") for case in GRID if case.prefix_dtype is None),
        *itertools.product(
            (replace(shape, dtype=dtype) for shape in (*SHAPES, *OTHER_SHAPES) for dtype in HALF_AND_FULL),
            ("torch-small", "triton-small", "triton-split"),
        ),
        *itertools.product((*(replace(shape, dtype=torch.bfloat16) for shape in FUSED_SHAPES), *IN_HALF), IN_PIECES),
    ),
    exact=st.builds(
        lambda dtypes, group, h_kv, **rest: Case(
            h=group * h_kv, h_kv=h_kv, dtype=dtypes[0], prefix_dtype=dtypes[1], scale=1.0, **rest
        ),
        b=st.integers(1, 2),
        h_kv=st.integers(1, 2),
        group=st.integers(1, 3),
        s=st.integers(1, 24),
        l=st.integers(0, 24),
        p=st.integers(1, 20),
        d=st.sampled_from([32, 40, 64]),
        dtypes=st.sampled_from(DTYPES),
        causal=st.booleans(),
        shared=st.booleans(),
        padding=st.sampled_from(PADDINGS),
        layout=st.sampled_from(["heads", "tokens", "strided", "columns"]),
    ),
    exact_draws=12,
    exact_examples=(Case(b=1, s=17, l=20, scale=1.0),),
    repeated=(
        *itertools.product(IN_HALF[:2], IN_PIECES),
        *(
            (Case(b=3, h=2, h_kv=1, s=18, l=20, p=20, dtype=dtype, shared=shared, padding="random"), variant)
            for dtype in HALF_AND_FULL
            for shared in (False, True)
            for variant in (*WITH_SPLIT, "auto")
        ),
    ),
    deterministic=True,
    typical=Case(h=2, h_kv=1, s=17, l=19, padding="random"),
    kinds=(
        *(
            Case(s=3, l=4, p=2, d=4, shared=shared, padding=padding)
            for shared in (False, True)
            for padding in ("none", "random")
        ),
        Case(s=6, l=7, p=3, d=8, dtype=torch.bfloat16, prefix_dtype=torch.float32, padding="left"),
    ),
    gradcheck=tuple(
        # With more queries than keys, so that without a prefix some queries attend to nothing.
        Case(s=4, l=3, p=p, d=2, dtype=torch.float64, causal=causal, shared=shared, padding="random", scale=0.6)
        for causal, p in ((False, 2), (True, 2), (True, 0))
        for shared in (False, True)
    ),
    far=(Case(b=3, h=2, h_kv=1, s=6, l=6, d=16, dtype=torch.bfloat16), ("q", "k", "v")),
    empty=tuple(
        replace(Case(s=6, l=6, d=16, padding="left", shared=shared), **sizes)
        for sizes in (
            {"b": 0},
            {"s": 0},
            {"l": 0, "p": 0},
            {"l": 0},
            {"b": 0, "p": 0},
            {"s": 0, "l": 0},
            {"h": 0, "h_kv": 1},
        )
        for shared in (False, True)
    ),
    wrong_case=Case(s=3, l=5, p=6, d=8),
    wrong=(
        ({"q": [1.0]}, "q must be a torch.Tensor, got list"),
        ({"q": torch.randn(4, 3, 8)}, r"q must be \(B, H, S, D\), got a tensor of shape \(4, 3, 8\)"),
        ({"q": torch.ones(2, 4, 3, 8, dtype=torch.int64)}, "q must have one of the dtypes .*got torch.int64"),
        ({"k": torch.randn(2, 2, 5)}, r"k must be \(B, H_kv, L, D\)"),
        ({"k": torch.randn(2, 2, 5, 7)}, r"k must be \(B, H_kv, L, D\) = \(2, 2, 5, 8\), got \(2, 2, 5, 7\)"),
        ({"k": torch.randn(1, 2, 5, 8)}, r"k must be \(B, H_kv, L, D\) = \(2, 2, 5, 8\), got \(1, 2, 5, 8\)"),
        ({"k": torch.randn(2, 3, 5, 8)}, "v must be"),
        ({"k": torch.randn(2, 3, 5, 8), "v": torch.randn(2, 3, 5, 8)}, "H_kv, k's heads, must divide H = 4.*got 3"),
        ({"k": torch.randn(2, 0, 5, 8), "v": torch.randn(2, 0, 5, 8)}, "H_kv, k's heads, must divide H = 4.*got 0"),
        ({"v": torch.randn(2, 2, 4, 8)}, r"v must be \(B, H_kv, L, D\) = \(2, 2, 5, 8\), got \(2, 2, 4, 8\)"),
        ({"v": torch.randn(2, 2, 5, 8).bfloat16()}, r"v must have the dtype of q \(torch.float32\)"),
        ({"k": torch.randn(2, 2, 5, 8, device="meta")}, r"k must be on the device of q \(cpu\), got meta"),
        ({"prefix_k": torch.randn(6, 8)}, r"prefix_k must be \(H_kv, P, D\) or \(B, H_kv, P, D\)"),
        ({"prefix_k": torch.randn(4, 6, 8)}, r"prefix_k must be \(H_kv, P, D\) = \(2, 6, 8\), got \(4, 6, 8\)"),
        ({"prefix_k": torch.randn(1, 2, 6, 8)}, r"prefix_k must be \(B, H_kv, P, D\) = \(2, 2, 6, 8\)"),
        ({"prefix_v": torch.randn(2, 5, 8)}, r"prefix_v must be \(H_kv, P, D\) = \(2, 6, 8\), got \(2, 5, 8\)"),
        ({"prefix_k": torch.randn(2, 6, 8).bfloat16()}, "prefix_k must have the dtype of q, or float32"),
        ({"prefix_v": torch.randn(2, 6, 8).double()}, "prefix_v must have the dtype of prefix_k"),
        (
            {"key_padding_mask": torch.ones(2, 5)},
            "key_padding_mask must be torch.bool, True = attend, got torch.float32",
        ),
        (
            {"key_padding_mask": torch.ones(2, 11, dtype=torch.bool)},
            r"key_padding_mask must be \(B, L\) = \(2, 5\), got \(2, 11\)",
        ),
        ({"key_padding_mask": [True]}, "key_padding_mask must be a torch.Tensor, got list"),
        ({"causal": 1}, "causal must be a bool, got 1"),
        ({"scale": "1"}, "scale must be a float or None, got str"),
        ({"scale": torch.tensor(1.0)}, "scale must be a float or None, got Tensor"),
    ),
    unsupported=(
        ("cuda", Case(s=2, l=2, d=8), "there is no 'cuda' implementation"),
        ("triton", Case(s=2, l=2, d=8, dtype=torch.float64), "backend 'triton' cannot run this problem: .*float64"),
        ("triton", Case(s=2, l=2, d=257), "at most 256 dimensions, got 257"),
    ),
)
