"""Host-side questions about the CUDA extension's kernels, and what their launches take: addresses, names, a stream."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

from peft_kernels._core import extension
from peft_kernels._core.device import hardware

VECTOR_BYTES = 16  # the widest that a thread loads at once


def why_not_device(device: torch.device, minimum_arch: int) -> str | None:
    """Reason why kernels that need ``minimum_arch`` cannot run on this device, or None."""
    if device.type != "cuda":
        return f"CUDA kernels run on CUDA tensors, got tensors on {device}"
    reason = extension.why_not()
    if reason is not None:
        return reason
    arch = hardware(device).arch
    if arch < minimum_arch:
        return f"it needs sm_{minimum_arch} or newer, got sm_{arch}"
    return _why_not_compiled(arch)


def runs_on(arch: int, archs: Sequence[str], ptx: str | None) -> bool:
    """Whether a binary with machine code for ``archs``, and with the PTX of one more, runs on an architecture.

    Machine code runs on its own and on later minor versions of one major version; that of "90a" and the like on its own
    alone. PTX is compiled by the driver for its own and everything later.
    """
    if ptx is not None and int(ptx) <= arch:
        return True
    for name in archs:
        if name.isdigit():
            if int(name) // 10 == arch // 10 and int(name) <= arch:
                return True
        elif int(name.rstrip("af")) == arch:
            return True
    return False


def rows_aligned(*matrices: Tensor) -> bool:
    """Whether all rows, those of the last dimension, are contiguous and start at multiples of 16 bytes."""
    return all(map(_has_aligned_rows, matrices))


def _has_aligned_rows(matrix: Tensor) -> bool:
    if matrix.data_ptr() % VECTOR_BYTES != 0:
        return False
    shape, size = matrix.shape, matrix.element_size()
    if matrix.is_contiguous():
        return shape[-1] * size % VECTOR_BYTES == 0
    *outer, inner = matrix.stride()
    steps = [step for step, count in zip(outer, shape[:-1], strict=True) if count > 1]
    return inner == 1 and all(step * size % VECTOR_BYTES == 0 for step in steps)


def address(tensor: Tensor | None) -> int:
    """Where a tensor begins; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def strided(tensor: Tensor | None) -> tuple[int, int] | None:
    """Where a tensor begins, and the elements from one entry of its first dimension to the next; None for None."""
    return None if tensor is None else (tensor.data_ptr(), tensor.stride(0))


def float32_scale(scale: float | Tensor) -> tuple[Tensor | None, float]:
    """The scale as a tensor, and as the number that counts where there is none.

    A tensor of another dtype is cast by a launch of its own. Its address is good as long as the caller holds it.
    """
    return (scale.to(torch.float32), 0.0) if isinstance(scale, Tensor) else (None, float(scale))


def dtype_name(dtype: torch.dtype) -> str:
    """The name by which the extension knows a dtype, such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")


@contextmanager
def stream_of(device: torch.device) -> Iterator[int]:
    """Make a CUDA device the current one, and yield the address of its current stream."""
    with torch.cuda.device(device):
        yield torch.cuda.current_stream(device).cuda_stream


def is_capturing(device: torch.device) -> bool:
    """Whether launches on the device go into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


@cache
def _why_not_compiled(arch: int) -> str | None:
    reason = extension.why_no_record()
    if reason is not None:
        return reason
    record = extension.build_record()
    if runs_on(arch, record["archs"], record["ptx"]):
        return None
    return (
        f"the extension was built for {', '.join(f'sm_{name}' for name in record['archs'])}, this is sm_{arch}; "
        f'PEFT_KERNELS_CUDA_ARCHS="{arch}" builds it for that'
    )
