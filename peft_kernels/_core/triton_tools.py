"""Host-side questions about Triton; imports it only inside functions."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache, lru_cache, wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

from peft_kernels._core.device import Hardware, not_nvidia

T = TypeVar("T")

MINIMUM_ARCH = 80
MINIMUM_VERSION = (3, 4)  # the oldest that the kernels were compiled with
INDEX_LIMIT = 2**31  # indices within a kernel are 32-bit; offsets in memory are not


@cache
def why_not_installed() -> str | None:
    """Reason why Triton cannot be imported, or None."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    try:
        import triton
    except Exception as error:  # a broken installation raises anything; the text goes to the user
        return f"triton cannot be imported ({type(error).__name__}: {error})"
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < MINIMUM_VERSION:
        needed = ".".join(map(str, MINIMUM_VERSION))
        return f"triton {triton.__version__} is installed, the kernels need {needed} or newer"
    return None


def interpreting() -> bool:
    """Whether Triton runs its kernels in Python on CPU tensors (TRITON_INTERPRET=1)."""
    import triton

    return bool(triton.knobs.runtime.interpret)


def why_not_environment() -> str | None:
    """Reason why no Triton kernel can run in this process, or None."""
    reason = why_not_installed()
    if reason is None and interpreting():
        return None
    if torch.version.hip is not None:
        return not_nvidia()
    if reason is not None:
        return reason
    if not torch.cuda.is_available():
        return "torch sees no CUDA device, and TRITON_INTERPRET=1 is not set"
    return None


def why_not_device(device: torch.device) -> str | None:
    """Reason why Triton kernels cannot run on this device, or None."""
    if device.type not in ("cuda", "cpu"):
        return f"the kernels are for NVIDIA GPUs, these tensors are on {device}"
    reason = why_not_environment()
    if reason is not None:
        return reason
    if interpreting():
        return None if device.type == "cpu" else f"Triton's interpreter runs on CPU tensors, these are on {device}"
    if device.type != "cuda":
        return f"Triton kernels run on CUDA tensors, these are on {device}"
    major, minor = torch.cuda.get_device_capability(device)
    if major * 10 + minor < MINIMUM_ARCH:
        return f"it needs sm_{MINIMUM_ARCH} or newer, {device} is sm_{major}{minor}"
    return None


def why_not_tensors(device: torch.device, dtype: torch.dtype, what: str, *numbers: int) -> str | None:
    """Reason why Triton kernels cannot run on tensors of this device and dtype, or with indices up to ``numbers``.

    Each number is compared on its own: the largest of them would tie a compiled graph to which one that is.
    """
    if reason := why_not_device(device):
        return reason
    if dtype == torch.float64:
        return "its kernels accumulate in float32, and the tensors are float64"
    for number in numbers:
        if number >= INDEX_LIMIT:
            return f"{what} must be below 2^31, got {number}"
    return None


def on_device(run: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a pass, whose first argument is the problem, so that its launches go to the problem's device.

    Triton launches on the current device and its stream, wherever the tensors are.
    """

    @wraps(run)
    def launch(problem: Any, *arguments: Any, **options: Any) -> Any:
        device = problem.device
        if device.type != "cuda" or device.index in (None, torch.cuda.current_device()):
            return run(problem, *arguments, **options)
        with torch.cuda.device(device):
            return run(problem, *arguments, **options)

    return launch


def dot_precision(dtype: torch.dtype) -> str:
    """Triton's name for what torch allows float32 products to do on this process's CUDA devices."""
    if dtype != torch.float32:
        return "ieee"
    settings = torch.backends.cuda.matmul
    # Where torch (2.9) has it, it answers for both settings; the older one then raises if the newer was used.
    precision = getattr(settings, "fp32_precision", None)
    return "tf32" if (settings.allow_tf32 if precision is None else precision == "tf32") else "ieee"


def shape_of_partials(splits: int, *shape: int) -> tuple[int, ...]:
    """Shape of the partial sums of ``splits`` ranges; one range's is the result, and has no dimension for it."""
    return shape if splits == 1 else (splits, *shape)


def sum_partials(partials: Tensor, splits: int) -> Tensor:
    """Add partial sums in their order; torch's sum over the first dimension has no atomics."""
    return partials if splits == 1 else partials.sum(0)


@lru_cache(maxsize=4096)
def chosen(choose: Callable[..., T], *facts: Any) -> T:
    """What a function of a family's config.py returns for these facts, remembered."""
    return choose(*facts)


def is_stored_by_columns(*matrices: Tensor | None) -> bool:
    """Whether some matrix has contiguous columns, and no contiguous rows."""
    strides = (matrix.stride() for matrix in matrices if matrix is not None)
    return any(outer == 1 and inner != 1 for outer, inner in strides)


def next_power_of_2(value: int) -> int:
    return 1 << max(0, value - 1).bit_length()


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def blocks_of_range(size: int, block: int, splits: int) -> int:
    """Blocks of each of ``splits`` ranges that share out a reduction over ``size``; the last ones may have fewer."""
    return cdiv(cdiv(size, block), splits)


def split_count(blocks: int, tiles: int, hardware: Hardware) -> int:
    """Ranges that a reduction over ``blocks`` falls into, for a program per multiprocessor beside ``tiles``."""
    return max(1, min(blocks, hardware.sm_count // tiles))
