"""What the device can do, measured first in every run, and the time that it leaves to a problem."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.family import Work
from benchmarks.timing import Clock, EventClock, HostClock

REPETITIONS = 20
_MATMUL_SIZE = {"cuda": 8192, "cpu": 2048}
_COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 28}


@dataclass(frozen=True)
class Ceilings:
    """Rates of one device.

    Attributes:
        copy_bytes_per_s: of a copy within the device's memory, bytes read plus bytes written.
        matmul_flops_per_s: by dtype name, of a large square product of random matrices.
    """

    copy_bytes_per_s: float
    matmul_flops_per_s: dict[str, float]


def roofline_us(work: Work, dtype: torch.dtype, ceilings: Ceilings) -> float:
    """The longer of the time to move the bytes and the time to do the arithmetic."""
    memory = work.bytes / ceilings.copy_bytes_per_s
    arithmetic = work.flops / ceilings.matmul_flops_per_s[dtype_name(dtype)]
    return max(memory, arithmetic) * 1e6


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def measure_ceilings(device: torch.device, dtypes: tuple[torch.dtype, ...]) -> Ceilings:
    """Measure the rates; the products are those of torch's library, under the process's TF32 setting."""
    return Ceilings(
        copy_bytes_per_s=_copy_rate(device),
        matmul_flops_per_s={dtype_name(dtype): _matmul_rate(device, dtype) for dtype in dtypes},
    )


def matmul_operands(device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Random matrices: on zeros the power limit is not reached and the rate is not one that a model sees."""
    size = _MATMUL_SIZE[device.type]
    return torch.randn(size, size, device=device).to(dtype), torch.randn(size, size, device=device).to(dtype)


def _copy_rate(device: torch.device) -> float:
    count = _COPY_BYTES[device.type] // 4
    source, target = torch.randn(count, device=device), torch.empty(count, device=device)
    seconds = _least_seconds(lambda: target.copy_(source), device)
    return 2 * _COPY_BYTES[device.type] / seconds


def _matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    a, b = matmul_operands(device, dtype)
    out = torch.empty_like(a)
    seconds = _least_seconds(lambda: torch.mm(a, b, out=out), device)
    return 2 * a.shape[0] ** 3 / seconds


def _least_seconds(function: Callable[[], object], device: torch.device) -> float:
    """The shortest of many: what disturbs a measurement only ever lowers a rate, and a ceiling is the highest one."""
    clock: Clock = EventClock() if device.type == "cuda" else HostClock()
    function()
    clock.finish()
    pairs = []
    for _ in range(REPETITIONS):
        start = clock.mark()
        function()
        pairs.append((start, clock.mark()))
    clock.finish()
    return min(clock.elapsed_us(start, stop) for start, stop in pairs) / 1e6
