"""What a LoRA linear call is made of: the tensors, the facts that backends decide on, and every check, once."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, wraps
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch._subclasses.fake_tensor import FakeTensor

from peft_kernels._core import checks, cuda_tools
from peft_kernels.lora.kernels import dropout

NAME = "lora_linear"

_Problem = TypeVar("_Problem", bound=Any)

FACTORS = (
    checks.Row(
        "lora_a",
        "r K",
        dtype_of="x",
        or_float32=True,
        then=lambda sizes: None if sizes["r"] else "lora_a must be (r, K) with rank r >= 1, got rank 0",
    ),
    checks.Row("lora_b", "N r", dtype_of="lora_a"),
)

TENSORS = checks.Table(
    NAME,
    "x",
    (
        checks.Row("weight", "N K", dtype_of="x"),
        checks.Row("x", "... K", meanings={"K": "weight's in-features"}),
        *FACTORS,
        checks.Row("bias", "N", dtype_of="x", optional=True),
    ),
)


class Inputs(NamedTuple):
    """The arguments of one call.

    Attributes:
        x: (..., K), any strides; (M, K) where an implementation takes it.
        weight: (N, K), in x's dtype, as nn.Linear stores it.
        lora_a: (r, K), in x's dtype or float32.
        lora_b: (N, r), in lora_a's dtype.
        scale: float, or a 0-d tensor on x's device.
        bias: (N,) in x's dtype, or None.
        dropout_p: probability of dropping an element of x on the low-rank branch.
        seed: 0-d int64 tensor on x's device; None exactly when nothing is dropped.
    """

    x: Tensor
    weight: Tensor
    lora_a: Tensor
    lora_b: Tensor
    scale: float | Tensor
    bias: Tensor | None
    dropout_p: float
    seed: Tensor | None


class Needs(NamedTuple):
    """Which gradients a backward pass is asked for."""

    x: bool
    weight: bool
    lora_a: bool
    lora_b: bool
    bias: bool


class Gradients(NamedTuple):
    """Gradients of one call, None where not asked for; shapes and dtypes are those of ``Inputs``."""

    x: Tensor | None
    weight: Tensor | None
    lora_a: Tensor | None
    lora_b: Tensor | None
    bias: Tensor | None


@dataclass(frozen=True)
class LoraLinearProblem:
    """The facts that choose a backend and its configs.

    Attributes:
        m, n, k, r: tokens, out-features, in-features, rank.
        dtype: of x, weight, bias and the result.
        adapter_dtype: of lora_a and lora_b.
        device: of all tensors.
        dropout_threshold: a 16-bit draw below it drops its element; 0 is no dropout.
        rows_aligned: on a CUDA device, whether rows of x, weight and lora_a can be read 16 bytes at a time.
        lane: fourth word of the mask's counter; other than 0 as a part of other operators alone.
        runs: (first row, count) of neighbours among the mask's rows; () where they are rows 0 ... m - 1.
        row_invariant: whether a row's bits may depend on no other row.
    """

    m: int
    n: int
    k: int
    r: int
    dtype: torch.dtype
    adapter_dtype: torch.dtype
    device: torch.device
    dropout_threshold: int
    rows_aligned: bool = False
    lane: int = 0
    runs: tuple[tuple[int, int], ...] = ()
    row_invariant: bool = False

    @property
    def has_dropout(self) -> bool:
        return self.dropout_threshold > 0

    @property
    def is_empty(self) -> bool:
        """Whether no product has an element or a term."""
        return self.m == 0 or self.n == 0 or self.k == 0

    @property
    def wide_dtype(self) -> torch.dtype:
        """Of S and dS on every backend."""
        return checks.wide_dtype(self.dtype)

    @property
    def keep_scale(self) -> float:
        """What kept elements are multiplied with: one over the exact keep probability."""
        return dropout.keep_scale(self.dropout_threshold)


@lru_cache(maxsize=4096)
def row_invariant(problem: _Problem) -> _Problem:
    """The same problem where a row's bits may depend on no other row."""
    return replace(problem, row_invariant=True)


def of_row_invariant(run: Callable[..., Any]) -> Callable[..., Any]:
    """A pass, whose first argument is the problem, on the same problem with ``row_invariant``."""

    @wraps(run)
    def pinned(problem: Any, *arguments: Any) -> Any:
        return run(row_invariant(problem), *arguments)

    return pinned


def make_problem(call: Inputs) -> LoraLinearProblem:
    """Check the arguments of a call and describe it.

    Raises:
        ValueError: naming the argument, what it must be and what it was.
    """
    x = call.x
    sizes = TENSORS.check(call)
    checks.scalar(NAME, "scale", call.scale)
    threshold = dropout.threshold(call.dropout_p)
    if call.seed is not None:
        check_seed(NAME, call.seed, x.device)
    return LoraLinearProblem(
        m=math.prod(sizes["..."]),
        n=sizes["N"],
        k=sizes["K"],
        r=sizes["r"],
        dtype=x.dtype,
        adapter_dtype=call.lora_a.dtype,
        device=x.device,
        dropout_threshold=threshold,
        rows_aligned=are_rows_aligned(x, call.weight, call.lora_a),
    )


def are_rows_aligned(x: Tensor, weight: Tensor, lora_a: Tensor) -> bool:
    """Whether these are matrices of a CUDA device, all of whose rows can be read 16 bytes at a time."""
    return _can_be_launched_on(x) and cuda_tools.rows_aligned(x, weight, lora_a)


def _can_be_launched_on(x: Tensor) -> bool:
    # Tensors that only stand for shapes, as when a graph is traced, or for a batch of others, have no addresses.
    return x.device.type == "cuda" and not isinstance(x, FakeTensor) and not is_functorch_wrapped_tensor(x)


def check_seed(operator: str, seed: Tensor, device: torch.device) -> None:
    """Raise ValueError where a seed is no number of 64 bits on the device of x."""
    if seed.dim() != 0 or seed.dtype != torch.int64:
        raise ValueError(f"{operator}: seed must be a 0-d int64 tensor, got {seed.dtype} {tuple(seed.shape)}")
    if seed.device != device:
        raise ValueError(f"{operator}: seed must be on the device of x ({device}), got {seed.device}")
