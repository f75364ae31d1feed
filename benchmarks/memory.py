"""Peak memory of one call above what was allocated before it. A pass of its own: watching it takes time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

_ALLOCATION = "[memory]"  # how the profiler names the events of torch's allocators


def running_peak(changes: Iterable[int], base: int = 0) -> int:
    """The largest sum of a prefix of the changes, and at least ``base``, which all of them start from."""
    held = peak = base
    for change in changes:
        held += change
        peak = max(peak, held)
    return peak


def peak_bytes(function: Callable[[], object], device: torch.device, before: Callable[[], object] | None = None) -> int:
    """Peak memory while ``function`` runs, above the level before ``before``.

    Args:
        function: run once beforehand by the caller, so that caches and workspaces exist.
        device: CUDA or CPU. On a CPU the tensors that torch allocates are counted, not the scratch space inside the
            matrix product library.
        before: what makes ``function`` possible, as a forward pass its backward pass; its result is kept until the end,
            and counts, but its own peak does not.
    """
    return _peak_on_cuda(function, device, before) if device.type == "cuda" else _peak_on_host(function, before)


def _peak_on_cuda(function: Callable[[], object], device: torch.device, before: Callable[[], object] | None) -> int:
    torch.cuda.synchronize(device)
    level = torch.cuda.memory_allocated(device)
    held = before() if before is not None else None
    torch.cuda.reset_peak_memory_stats(device)
    result = function()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - level
    del held, result
    return peak


def _peak_on_host(function: Callable[[], object], before: Callable[[], object] | None) -> int:
    base = 0
    held = None
    if before is not None:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as first:
            held = before()
        base = sum(_changes(first))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as second:
        result = function()
    peak = running_peak(_changes(second), base)
    del held, result
    return peak


def _changes(measured: profile) -> list[int]:
    """Bytes allocated (positive) and freed (negative) in the order in which that happened."""
    # The profiler's public list has one sum for each operation, in which a temporary inside of it vanishes.
    results: Any = measured.profiler
    events = [event for event in results.kineto_results.events() if event.name() == _ALLOCATION]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
