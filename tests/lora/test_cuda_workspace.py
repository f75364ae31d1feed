"""Workspaces: a nonce for each launch, and what is zeroed where a graph will replay it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from peft_kernels._core import cuda_tools
from peft_kernels.lora.kernels import cuda_workspace

CPU = torch.device("cpu")


@pytest.mark.usefixtures("poison")
def test_nothing_is_written() -> None:
    """Poison stays: the memory of a launch is what the allocator gives."""
    workspace = cuda_workspace.allocate(3, 8 * 5 + 4, CPU)
    assert workspace.tensor.tolist() == [torch.iinfo(torch.int64).max] * 6


@pytest.mark.usefixtures("poison")
def test_flags_are_zeroed_under_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_tools, "is_capturing", lambda device: True)
    workspace = cuda_workspace.allocate(3, 8 * 5, CPU)
    assert workspace.tensor.tolist() == [0, 0, 0, *[torch.iinfo(torch.int64).max] * 2]
    assert workspace.nonce != 0


def test_nonces_differ_between_threads() -> None:
    with ThreadPoolExecutor(8) as pool:
        nonces = list(pool.map(lambda _: cuda_workspace.allocate(1, 8, CPU).nonce, range(2000)))
    assert len(set(nonces)) == 2000


def test_nonces_wrap_around_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """Zero is what flags are set to under capture."""
    monkeypatch.setattr(cuda_workspace, "_start", lambda: 2**64 - 2)
    monkeypatch.setattr(cuda_workspace, "_counter", iter(range(4)))
    assert [cuda_workspace._next_nonce() for _ in range(3)] == [2**64 - 2, 2**64 - 1, 1]


def test_start_is_the_process_s_own() -> None:
    cuda_workspace._start.cache_clear()
    first = cuda_workspace._start()
    assert cuda_workspace._start() == first
    cuda_workspace._start.cache_clear()
    assert cuda_workspace._start() != first


@pytest.mark.parametrize("is_capturing", [False, True])
def test_only_a_cuda_device_captures(is_capturing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: is_capturing)
    assert cuda_tools.is_capturing(torch.device("cuda", 0)) == is_capturing
    assert not cuda_tools.is_capturing(CPU)
