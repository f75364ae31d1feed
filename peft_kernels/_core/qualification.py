"""What a family gives for a machine to find out whether an implementation is right on it.

Problems come in *parts*, by the code that they run: dtypes, dropout, the block that a rank falls into, a path. A call
waits for the parts that it touches, which are some ten compiles, and not for all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peft_kernels._core.device import Hardware
from peft_kernels._core.triton_tools import dot_precision

LARGEST_BYTES = 256 << 20
"""Of all tensors of a problem together, oracle included: a check should fit beside a training run."""


class Family(NamedTuple):
    """How the problems of one operator are run and judged, whatever implementation runs them.

    Attributes:
        operator: its name.
        make: (case, device, seed) -> the operator's call, in the case's dtypes, and a gradient of y, or of each of
            several.
        eager: call -> y, or all of several, by eager torch in the call's dtypes, differentiable: what the error budget
            is measured in.
        exact: call -> the call whose float64 result is the exact one: rounded where the operator rounds by contract.
    """

    operator: str
    make: Callable[[Any, torch.device, int], tuple[Any, Any]]
    eager: Callable[[Any], Any]
    exact: Callable[[Any], Any]


@dataclass(frozen=True)
class Qualification:
    """How an implementation is checked.

    Attributes:
        family: how problems are run.
        parts: names of all its parts.
        touched: problem -> names of the parts that must be right before ``auto`` takes the implementation.
        cases: (part, hardware) -> the problems of a part; ``str(case)`` is a problem's name.
        quick: parts that stand for the others where there is no time.
        alone: whether its blocks wait for each other, so that a fault may be a hang: it gets a child of its own.
        module: what a child process imports to have the operator declared.
    """

    family: Family
    parts: tuple[str, ...]
    touched: Callable[[Any], tuple[str, ...]]
    cases: Callable[[str, Hardware], Sequence[Any]]
    quick: tuple[str, ...] = field(kw_only=True)
    alone: bool = False
    module: str = "peft_kernels"


def dtype_name(dtype: torch.dtype, *others: torch.dtype) -> str:
    """The name of a call's dtypes, each once, as "bfloat16+float32"; "tf32" where torch lets float32 products be so."""
    names = dict.fromkeys(str(each).removeprefix("torch.") for each in (dtype, *others))
    if "float32" in names and dot_precision(torch.float32) == "tf32":
        return "+".join(names).replace("float32", "tf32")
    return "+".join(names)


def dtypes_of(name: str) -> tuple[torch.dtype, torch.dtype]:
    """The first and the last dtype of such a name."""
    dtypes = [torch.float32 if each == "tf32" else getattr(torch, each) for each in name.split("+")]
    return dtypes[0], dtypes[-1]


PAIRS = ("float32", "tf32", "bfloat16", "bfloat16+float32", "float16", "float16+float32")
"""Names of the dtypes of activations and adapters that Triton kernels take."""


def block_of(size: int, blocks: Iterable[int]) -> str:
    """The part of a rank or width: the smallest block that holds it, or "more"."""
    return next((str(block) for block in blocks if size <= block), "more")


def double(call: Any) -> Any:
    """The call with its floating tensors in float64."""
    return call._make(map(_double, call))


def _double(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_double, value))
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


class Draw:
    """Random tensors of a problem: the same on every device, because a CPU draws them."""

    def __init__(self, device: torch.device, seed: int) -> None:
        self.device = device
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, dtype: torch.dtype, *shape: int, std: float = 1.0) -> Tensor:
        """Normal values of a standard deviation, rounded to a dtype."""
        return (torch.randn(*shape, generator=self.generator) * std).to(self.device, dtype)
