"""The prefix attention launches that are compiled ahead of time: forward, backward; dtypes, heads, masks, decoding."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator

import torch

from peft_kernels._core.device import hardware
from peft_kernels.prefix import triton_impl
from peft_kernels.prefix.kernels import config
from peft_kernels.prefix.kernels.fused_operators import deterministic
from peft_kernels.prefix.problem import Inputs, Needs, default_scale, make_problem

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
H, H_KV = 32, 8


def launches() -> Iterator[tuple[str, Callable[[], None]]]:
    """Name and action of each case; a name is `dtype/prefix dtype/D/mask/S/L/P/path`."""
    for d, causal in itertools.product((64, 128, 256), (True, False)):
        yield _case(BF16, BF16, d, causal)
    for causal in (True, False):
        yield _case(FP32, FP32, 128, causal)
    yield _case(FP32, FP32, 64, True)
    yield _case(FP32, FP32, 256, True)
    yield _case(FP16, FP32, 128, True)
    yield _case(BF16, FP32, 64, True)
    yield _case(BF16, FP32, 128, True)
    yield _case(BF16, FP32, 256, True)
    # Heads that are no power of two, padding, a prefix of one small block, and one query.
    yield _case(BF16, BF16, 80, True)
    yield _case(BF16, BF16, 96, False, padded=True)
    yield _case(BF16, BF16, 128, True, padded=True)
    yield _case(BF16, FP32, 128, True, p=16)
    # Few queries: keys are split between programs, and their parts merged.
    yield _case(BF16, BF16, 128, True, s=1, l=4096)
    yield _case(FP16, FP32, 64, False, padded=True, s=1, l=4096)
    yield _case(BF16, BF16, 256, True, padded=True, s=8, l=4096)
    yield _case(FP32, FP32, 80, True, s=1, l=4096)
    yield _case(BF16, BF16, 32, True)
    for causal, padded in ((True, False), (True, True), (False, True)):
        yield _case(BF16, BF16, 128, causal, padded=padded, path="wide")
    yield _case(FP16, FP32, 80, True, path="wide")
    yield _case(BF16, BF16, 128, True, s=32, l=4096, path="wide")
    # Beside torch's operator of the sequence.
    for d in (32, 64, 80, 128, 256):
        yield _case(BF16, BF16, d, True, path="flash both")
    yield _case(FP16, FP32, 128, False, p=16, path="flash both")


def _case(
    dtype: torch.dtype,
    prefix: torch.dtype,
    d: int,
    causal: bool,
    *,
    padded: bool = False,
    s: int = 2048,
    l: int = 2048,  # noqa: E741
    p: int = 64,
    path: str = "own",
) -> tuple[str, Callable[[], None]]:
    short = {BF16: "bf16", FP16: "fp16", FP32: "fp32"}
    mask = ("causal" if causal else "full") + ("+padding" if padded else "")
    name = f"{short[dtype]}/{short[prefix]}/D{d}/{mask}/S{s}/L{l}/P{p}/{path}"
    return name, functools.partial(_launch, dtype, prefix, d, causal, padded, s, l, p, path)


def _launch(
    dtype: torch.dtype,
    prefix: torch.dtype,
    d: int,
    causal: bool,
    padded: bool,
    s: int,
    l: int,  # noqa: E741
    p: int,
    path: str,
) -> None:
    make = functools.partial(torch.empty, device="meta")
    given = make(H_KV, p, d, dtype=prefix)
    inputs = Inputs(
        q=make(1, H, s, d, dtype=dtype),
        k=make(1, H_KV, l, d, dtype=dtype),
        v=make(1, H_KV, l, d, dtype=dtype),
        prefix_k=given,
        prefix_v=given,
        causal=causal,
        scale=default_scale(d),
        key_padding_mask=make(1, l, dtype=torch.bool) if padded else None,
    )
    problem = make_problem(inputs)
    inputs = inputs._replace(prefix_k=given.to(dtype), prefix_v=given.to(dtype))
    if path == "wide" and not config.takes_wide_blocks(problem, hardware(problem.device)):
        path = "own"
    y, stats = triton_impl.forward(problem, inputs, path)
    if s > 8:
        dy, needs = make(1, H, s, d, dtype=dtype), Needs(*[True] * 5)
        # Torch's operator makes the sequence's gradients where torch is asked for the same bits twice.
        deterministic(triton_impl.backward)(problem, inputs, y, stats, dy, needs, path)


def required_opcodes(kernel: str, launch: str, arch: int) -> tuple[str, ...]:
    """Instructions without which a kernel is not what it was written to be; ``A|B`` is either."""
    if kernel == "delta_kernel":
        return ()
    if kernel == "merge_kernel":
        # Sums of parts in order, and no product.
        return ("LDG", "FFMA")
    dtype, prefix, _, _, s, *_, path = launch.split("/")
    if dtype == "fp32":
        # Without TF32, float32 products have no tensor core.
        return ("FFMA",)
    if arch >= 100:
        return ("HMMA|UTCHMMA",)
    # A block of fewer than 64 rows does not fill Hopper's instruction; and the pieces of float32 operands are as many
    # products, in blocks of 32.
    is_small = s in ("S1", "S8") or (kernel == "grad_prefix_kernel" and prefix == "fp32")
    if arch != 90 or is_small:
        return ("HMMA",)
    return ("HGMMA", "UTMALDG") if kernel == "attention_kernel" and path == "wide" else ("HGMMA",)
