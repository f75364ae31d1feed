"""Problems, their tensors, and the ways to run them, shared by the tests of the prefix attention family."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

import peft_kernels as pk
from peft_kernels.prefix import torch_blocks, torch_fused, torch_impl
from peft_kernels.prefix.kernels import config
from peft_kernels.prefix.problem import PrefixAttentionProblem
from peft_kernels.prefix.torch_config import TorchConfig, torch_config
from python_ref import compare
from python_ref import prefix as oracle

# Backend, and what is pinned: "small" blocks of 16 (torch: of 7 queries), "rows" blocks of whole batch rows, "ranges"
# of 5 queries, so that small problems have several of everything; "fused" both passes through torch's fused attention
# in one call, as on a GPU; "split" small blocks, and three ranges of keys, of which short sequences leave some without
# a key.
VARIANTS = ("torch", "torch-small", "torch-rows", "torch-ranges", "torch-fused", "triton", "triton-small")
WITH_SPLIT = (*VARIANTS, "triton-split")


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

    def __str__(self) -> str:
        short = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}
        prefix = f"+{short[self.prefix_dtype]}" if self.prefix_dtype else ""
        mask = ("causal" if self.causal else "full") + ("" if self.padding == "none" else f"+{self.padding}")
        sizes = f"b{self.b}-h{self.h}:{self.h_kv}-s{self.s}-l{self.l}-p{self.p}-d{self.d}"
        tail = f"{'shared' if self.shared else 'own'}-{self.layout}"
        return f"{sizes}-{short[self.dtype]}{prefix}-{mask}-{tail}" + (f"-x{self.scale}" if self.scale else "")


class Tensors(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    prefix_k: Tensor
    prefix_v: Tensor
    mask: Tensor | None


class Result(NamedTuple):
    """Output and gradients of one run."""

    y: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    prefix_k: Tensor
    prefix_v: Tensor


DTYPES = (
    (torch.float32, None),
    (torch.bfloat16, None),
    (torch.float16, None),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
)

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

GRID = (
    *(replace(shape, dtype=dtype, prefix_dtype=prefix) for shape in SHAPES for dtype, prefix in DTYPES),
    *(replace(shape, dtype=dtype) for shape in OTHER_SHAPES for dtype in (torch.float32, torch.bfloat16)),
    *(Case(h=2, layout=layout, dtype=torch.bfloat16) for layout in ("tokens", "strided", "columns")),
    Case(b=1, d=64, dtype=torch.bfloat16),
    Case(b=1, h=2, d=128, dtype=torch.bfloat16),
    Case(b=1, h=2, h_kv=1, d=256, dtype=torch.bfloat16, causal=False),
    Case(b=1, h=2, h_kv=1, d=256, s=20, l=20),
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
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    batch = () if case.shared else (case.b,)
    prefix_dtype = case.prefix_dtype or case.dtype
    q = _laid_out(normal(case.b, case.h, case.s, case.d).to(device, case.dtype), case.layout)
    k, v = (_laid_out(normal(case.b, case.h_kv, case.l, case.d).to(device, case.dtype), case.layout) for _ in range(2))
    prefix_k, prefix_v = (normal(*batch, case.h_kv, case.p, case.d).to(device, prefix_dtype) for _ in range(2))
    return Tensors(q, k, v, prefix_k, prefix_v, _mask(case, device, generator))


def make_exact(case: Case, device: torch.device, seed: int = 0) -> tuple[Tensors, Tensor]:
    """Draw tensors whose results are exact in any order of any sum, and an output gradient.

    Queries and keys are one-hot with a factor of 32 and D = 32 or more, so that with scale 1 a score is 1024 or 0:
    softmax is 0 or 1 in every dtype where one visible key matches, and where none matches, or several do, the shares
    are powers of two only if the counts are. So row i's query matches exactly one key, a prefix's, which all see.
    """
    if case.p == 0 or case.d < case.p:
        raise ValueError("needs a prefix, and no more keys in it than dimensions")
    generator = torch.Generator().manual_seed(seed)

    def integers(*shape: int) -> Tensor:
        return torch.randint(-2, 3, shape, generator=generator, dtype=torch.float64)

    batch = () if case.shared else (case.b,)
    index = torch.randint(0, case.p, (case.b, case.h, case.s), generator=generator)
    q = 32.0 * torch.nn.functional.one_hot(index, case.d).double()
    prefix_k = 32.0 * torch.eye(case.p, case.d, dtype=torch.float64).expand(*batch, case.h_kv, -1, -1).clone()
    k = torch.zeros(case.b, case.h_kv, case.l, case.d, dtype=torch.float64)
    v, prefix_v = integers(case.b, case.h_kv, case.l, case.d), integers(*batch, case.h_kv, case.p, case.d)
    prefix_dtype = case.prefix_dtype or case.dtype
    tensors = Tensors(
        *(_laid_out(tensor.to(device, case.dtype), case.layout) for tensor in (q, k, v)),
        prefix_k.to(device, prefix_dtype),
        prefix_v.to(device, prefix_dtype),
        _mask(case, device, generator),
    )
    return tensors, integers(case.b, case.h, case.s, case.d).to(device, case.dtype)


def output_gradient(case: Case, device: torch.device, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(99 + seed)
    shape = (case.b, case.h, case.s, case.d)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, case.dtype)


@contextlib.contextmanager
def variant(name: str) -> Iterator[str]:
    """Yield the backend's name, with what the variant pins."""
    backend, _, pinned = name.partition("-")
    patches: list[tuple[object, str, object]] = []
    if name in ("triton-small", "triton-split"):
        functions = ("forward_config", "grad_q_config", "grad_kv_config", "grad_prefix_config")
        splits = 3 if name == "triton-split" else 1
        patches += [(config, function, _small(getattr(config, function), splits)) for function in functions]
        # Fewer parts at once than there are.
        merge = config.MergeConfig(BLOCK_S=2, BLOCK_D=0, num_warps=4)
        patches.append((config, "merge_config", lambda d, _: replace(merge, BLOCK_D=config._block_d(d))))
    elif pinned:
        patches += [
            (torch_impl, "torch_config", functools.partial(_pinned, pinned, torch_config)),
            (torch_blocks, "torch_block", _all_but_one_row if pinned == "rows" else _all_but_one_head),
            (torch_fused, "torch_mask_rows", lambda keys: 5),
        ]
    with contextlib.ExitStack() as stack:
        for module, function, replacement in patches:
            stack.enter_context(mock.patch.object(module, function, replacement))
        yield backend


def _all_but_one_head(problem: PrefixAttentionProblem) -> tuple[int, int, int]:
    return 1, max(1, problem.h_kv - 1), 7


def _all_but_one_row(problem: PrefixAttentionProblem) -> tuple[int, int, int]:
    return max(1, problem.b - 1), problem.h_kv, max(1, problem.s)


def _pinned(pinned: str, choose: Callable[..., TorchConfig], problem: PrefixAttentionProblem) -> object:
    chosen = choose(problem)
    if pinned in ("small", "rows") or chosen.forward == "blocks":
        return TorchConfig(forward="blocks", backward="blocks")
    return TorchConfig("fused", "fused") if pinned == "fused" else TorchConfig("ranges", "blocks")


def _small(choose: Callable[..., object], splits: int) -> Callable[..., object]:
    def chosen(*arguments: object) -> object:
        full = choose(*arguments)
        pinned = {name: 16 for name in ("BLOCK_M", "BLOCK_N", "BLOCK_P") if hasattr(full, name)}
        return replace(full, **pinned | ({"SPLIT": splits} if isinstance(full, config.ForwardConfig) else {}))

    return chosen


def run_ours(case: Case, tensors: Tensors, dy: Tensor, name: str) -> Result:
    """Forward and all gradients by the package."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors[:5]]
    with variant(name) as backend:
        y = pk.prefix_attention(
            *leaves, causal=case.causal, scale=case.scale, key_padding_mask=tensors.mask, backend=backend
        )
        return Result(y.detach(), *torch.autograd.grad(y, leaves, dy))


def run_eager(case: Case, tensors: Tensors, dy: Tensor, backend: SDPBackend = SDPBackend.MATH) -> Result:
    """Forward and all gradients by eager torch in the same dtypes: what the error budget is measured in."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors[:5]]
    y = oracle.eager(*leaves, causal=case.causal, scale=case.scale, key_padding_mask=tensors.mask, backend=backend)
    return Result(y.detach(), *torch.autograd.grad(y, leaves, dy))


def run_oracle(case: Case, tensors: Tensors, dy: Tensor) -> Result:
    """Forward and all gradients in float64, on the same rounded inputs: a float32 prefix is cast to q's dtype first."""
    wide = [tensor.to(case.dtype).double() for tensor in tensors[:5]]
    options = {"causal": case.causal, "scale": case.scale, "key_padding_mask": tensors.mask}
    return Result(oracle.forward(*wide, **options), *oracle.backward(dy.double(), *wide, **options))


def check_budget(
    case: Case,
    device: torch.device,
    run: Callable[[Case, Tensors, Tensor], Result],
    yardstick: Callable[[Case, Tensors, Tensor], Result] | None = None,
) -> None:
    """Hold a way to run a case against the error budget, and see that it leaves its inputs alone.

    The yardstick is torch's math path unless another is given.

    The budget compares norms of rounding errors, which scatter by 1 / sqrt(n) for n independent values. A row's scores
    are one such value for its D results: where there are few rows, further draws join them.
    """
    draws: list[tuple[Result, Result, Result]] = []
    for seed in range(max(1, min(4, 64 // (case.b * case.h * case.s)))):
        tensors, dy = make(case, device, seed), output_gradient(case, device, seed)
        arguments = [tensor for tensor in (*tensors, dy) if tensor is not None]
        before = [tensor.clone() for tensor in arguments]
        ours = run(case, tensors, dy)
        for old, new in zip(before, arguments, strict=True):
            compare.assert_bitwise_equal("an input after the call", new, old)
        draws.append((ours, (yardstick or run_eager)(case, tensors, dy), run_oracle(case, tensors, dy)))
    for label in Result._fields:
        ours, eager, exact = (torch.stack([getattr(draw[index], label) for draw in draws]) for index in range(3))
        compare.assert_close(f"{case} {label}", ours, eager, exact)


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
