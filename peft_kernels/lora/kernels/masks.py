"""The keep-mask of some rows at work: drop(x), and a dropped product added in place; who computes it on which device.

Recipe and torch code are dropout.py's. Whoever has something faster makes the mask's bits where they are needed, so
that the mask itself is in no memory:

    HostMask    a CPU: compiled C++ (csrc/lora/dropout_host.h), one pass, as many threads as torch has
    TritonMask  an NVIDIA GPU: one launch (triton_dropout.py)
    ByteMask    one that Triton cannot serve: one launch writes bytes (csrc/lora/dropout_mask.cu), torch selects by them
    TorchMask   everything else, fake tensors and tracers among it

The bits are the same, and a dropped inf or nan is zero on each of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._C import _functorch, _get_tracing_state, _len_torch_dispatch_stack

from peft_kernels._core import cuda_tools, extension, triton_tools
from peft_kernels.lora.kernels import dropout
from peft_kernels.lora.kernels.dropout import Rows

_CUDA_ARCH = 80  # the oldest that csrc is built for


class Mask(Protocol):
    """The mask of some rows, whose tensors are (rows, cols)."""

    def __init__(self, part: Rows) -> None: ...

    def drop(self, x: Tensor, dtype: torch.dtype, factor: float) -> Tensor:
        """Return factor * drop(x), contiguous: x is cast to ``dtype`` first; 1.0 is no product."""

    def add_dropped(self, out: Tensor, product: Tensor, factor: float) -> None:
        """out += factor * drop(product), in place; ``product`` is the caller's no more."""

    def keep(self) -> Tensor:
        """Return the mask as bool."""


def kinds(device: torch.device) -> tuple[type[Mask], ...]:
    """Who could compute masks for tensors with memory on a device, the best first; torch, which always can, last."""
    if device.type == "cpu":
        return (TorchMask,) if extension.why_no_host() else (HostMask, TorchMask)
    able: list[type[Mask]] = [TritonMask] if why_not_triton(device) is None else []
    if why_not_bytes(device) is None:
        able.append(ByteMask)
    return (*able, TorchMask)


def why_not_triton(device: torch.device) -> str | None:
    """Reason why Triton's mask kernels cannot run on this device, or None."""
    if device.type != "cuda":
        return f"the kernels are for NVIDIA GPUs, these tensors are on {device}"
    return triton_tools.why_not_device(device)


def why_not_bytes(device: torch.device) -> str | None:
    """Reason why the extension's mask kernel cannot run on this device, or None."""
    if device.type != "cuda":
        return f"the kernel is for NVIDIA GPUs, these tensors are on {device}"
    return cuda_tools.why_not_device(device, _CUDA_ARCH)


def add(out: Tensor, product: Tensor, factor: float) -> None:
    """out += factor * product, in place, rounded once; torch on a CPU casts by passes of its own if dtypes differ."""
    if out.device.type != "cpu" or out.dtype == product.dtype or not has_memory(out) or extension.why_no_host():
        out.add_(product, alpha=factor)
    else:
        # Nothing is below the threshold 0, so no seed is read.
        _host_add(out, product, factor, _host_arguments(0, 0, out.shape[0], out.shape[1], 0, 0))


class TorchMask:
    """By torch's operations; the bits are computed once and kept."""

    def __init__(self, part: Rows) -> None:
        self.bits = dropout.keep_bits(*part)

    def drop(self, x: Tensor, dtype: torch.dtype, factor: float) -> Tensor:
        return _scaled(dropout.drop(x.to(dtype), self.bits), factor)

    def add_dropped(self, out: Tensor, product: Tensor, factor: float) -> None:
        out.add_(dropout.drop_(product, self.bits), alpha=factor)

    def keep(self) -> Tensor:
        return self.bits != 0


class HostMask:
    """By compiled code, in one pass over memory."""

    def __init__(self, part: Rows) -> None:
        self.part = part
        self.arguments = _host_arguments(part.seed.data_ptr(), *part[1:])

    def drop(self, x: Tensor, dtype: torch.dtype, factor: float) -> Tensor:
        x, out = _with_plain_rows(x), torch.empty(x.shape, dtype=dtype, device=x.device)
        extension.load_host().lora.host_drop(
            x=cuda_tools.strided(x),
            out=cuda_tools.strided(out),
            factor=factor,
            dtype=cuda_tools.dtype_name(x.dtype),
            out_dtype=cuda_tools.dtype_name(dtype),
            **self.arguments,
        )
        return out

    def add_dropped(self, out: Tensor, product: Tensor, factor: float) -> None:
        _host_add(out, product, factor, self.arguments)

    def keep(self) -> Tensor:
        out = torch.empty(self.part.rows, self.part.cols, dtype=torch.bool, device=self.part.seed.device)
        extension.load_host().lora.host_keep(out=out.data_ptr(), **self.arguments)
        return out


class TritonMask:
    """By one launch; float64, and indices that are more than 32 bits, by torch."""

    def __init__(self, part: Rows) -> None:
        self.part = part

    def drop(self, x: Tensor, dtype: torch.dtype, factor: float) -> Tensor:
        if self._is_foreign(x.dtype, dtype):
            return TorchMask(self.part).drop(x, dtype, factor)
        from peft_kernels.lora.kernels import triton_dropout

        out = torch.empty(x.shape, dtype=dtype, device=x.device)
        triton_dropout.drop(x.resolve_neg(), out, self.part, factor)
        return out

    def add_dropped(self, out: Tensor, product: Tensor, factor: float) -> None:
        if self._is_foreign(out.dtype, product.dtype):
            TorchMask(self.part).add_dropped(out, product, factor)
            return
        from peft_kernels.lora.kernels import triton_dropout

        triton_dropout.add_dropped(out, product.resolve_neg(), self.part, factor)

    def keep(self) -> Tensor:
        ones = torch.ones((), dtype=torch.float32, device=self.part.seed.device)
        return self.drop(ones.expand(self.part.rows, self.part.cols), torch.float32, 1.0) != 0

    def _is_foreign(self, *dtypes: torch.dtype) -> bool:
        last_row = self.part.first_row + self.part.rows
        return torch.float64 in dtypes or max(last_row, self.part.cols) >= triton_tools.INDEX_LIMIT


class ByteMask:
    """One launch writes the mask, torch selects by it."""

    def __init__(self, part: Rows) -> None:
        device = part.seed.device
        self.mask = torch.empty(part.rows, part.cols, dtype=torch.bool, device=device)
        with cuda_tools.stream_of(device) as stream:
            extension.load().lora.dropout_mask(
                mask=self.mask.data_ptr(),
                seed=part.seed.data_ptr(),
                first_row=part.first_row,
                rows=part.rows,
                cols=part.cols,
                threshold=part.limit,
                lane=part.lane,
                stream=stream,
            )

    def drop(self, x: Tensor, dtype: torch.dtype, factor: float) -> Tensor:
        # A selection and a cast commute, and the selection costs less before it.
        return _scaled(torch.where(self.mask, x, 0.0).to(dtype), factor)

    def add_dropped(self, out: Tensor, product: Tensor, factor: float) -> None:
        out.add_(torch.where(self.mask, product, 0.0), alpha=factor)

    def keep(self) -> Tensor:
        return self.mask


class Parts:
    """Masks of rows that are no neighbours, under each other."""

    def __init__(self, parts: Sequence[Mask], counts: list[int]) -> None:
        self.parts, self.counts = parts, counts

    def drop(self, x: Tensor, dtype: torch.dtype, factor: float) -> Tensor:
        pieces = zip(self.parts, x.split(self.counts), strict=True)
        return torch.cat([part.drop(piece, dtype, factor) for part, piece in pieces])

    def add_dropped(self, out: Tensor, product: Tensor, factor: float) -> None:
        pieces = zip(self.parts, out.split(self.counts), product.split(self.counts), strict=True)
        for part, some, more in pieces:
            part.add_dropped(some, more, factor)

    def keep(self) -> Tensor:
        return torch.cat([part.keep() for part in self.parts])


def _host_arguments(seed: int, first_row: int, rows: int, cols: int, limit: int, lane: int) -> dict[str, Any]:
    """What every function of the compiled code takes; ``seed`` is the address of one."""
    return {
        "seed": seed,
        "first_row": first_row,
        "rows": rows,
        "cols": cols,
        "threshold": limit,
        "lane": lane,
        "threads": torch.get_num_threads(),
        "level": _host_level(),
    }


def _host_add(out: Tensor, product: Tensor, factor: float, arguments: dict[str, Any]) -> None:
    product = _with_plain_rows(product)
    extension.load_host().lora.host_add_dropped(
        sum=cuda_tools.strided(out),
        product=cuda_tools.strided(product),
        factor=factor,
        dtype=cuda_tools.dtype_name(out.dtype),
        product_dtype=cuda_tools.dtype_name(product.dtype),
        **arguments,
    )


def _scaled(x: Tensor, factor: float) -> Tensor:
    return x if factor == 1.0 else x.mul_(factor)


def _with_plain_rows(x: Tensor) -> Tensor:
    """x as memory holds it, with elements of a row side by side."""
    x = x.resolve_neg()
    return x if x.stride(1) == 1 or x.shape[1] <= 1 else x.contiguous()


def has_memory(seed: Tensor) -> bool:
    """Whether a call is on real tensors and nobody watches its operations, who would miss what a kernel does."""
    return (
        type(seed) in (Tensor, torch.nn.Parameter)
        and seed.device.type != "meta"
        and not torch.compiler.is_compiling()
        and _functorch.peek_interpreter_stack() is None
        and _get_tracing_state() is None
        and _len_torch_dispatch_stack() == 0
    )


@cache
def _host_level() -> str:
    """The best instructions that the processor has."""
    level: str = extension.load_host().lora.host_levels()[-1]
    return level
