"""The CUDA backend on the GPU that it is written for: the launcher's tensor maps, clusters and stream, and the kernel.

What the host's emulator shows without one is in test_cuda.py.
"""

from __future__ import annotations

import functools

import pytest
import torch

import peft_kernels as pk
from peft_kernels._core.device import hardware
from peft_kernels.adapter.kernels.config import CUDA_ARCH
from python_ref import compare
from tests.adapter.cases import (
    CUDA_GRID,
    Case,
    arguments,
    check_budget,
    make,
    make_exact,
    output_gradient,
    run_oracle,
    run_ours,
)

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poison", "hopper")]

BF16 = torch.bfloat16
# Several clusters a multiprocessor after one another, and shared memory for one block and for two.
LARGE = (
    Case(m=8192 + 5, k=4096, r=64, dtype=BF16, residual="x", activation="gelu"),
    Case(m=1000, k=8192, r=128, dtype=torch.float16, residual="x", activation="silu"),
    Case(m=3000, k=1024, n=4096, r=48, dtype=BF16, residual="tensor"),
)


@pytest.fixture
def hopper(device: torch.device) -> None:
    arch = hardware(device).arch
    if arch != CUDA_ARCH:
        pytest.skip(f"the kernel is for sm_{CUDA_ARCH}, {device} is sm_{arch}")


@pytest.mark.parametrize("case", [*(case for case, _ in CUDA_GRID), *LARGE], ids=str)
def test_error_budget(case: Case, device: torch.device) -> None:
    check_budget(case, device, functools.partial(run_ours, variant="cuda"))


@pytest.mark.parametrize("residual", ["x", "tensor", "none"])
@pytest.mark.parametrize("r", [24, 72])
def test_integers(residual: str, r: int, device: torch.device) -> None:
    case = Case(m=1000, k=520, n=264, r=r, dtype=BF16, residual=residual, activation="relu", scale=0.5)
    tensors, dy = make_exact(case, device)
    got, exact = run_ours(case, tensors, dy, "cuda"), run_oracle(case, tensors, dy)
    assert torch.equal(got.y.double(), exact.y)


def test_many_runs_give_the_same_bits(device: torch.device) -> None:
    """Also beside other launches, which change what is resident when."""
    case = LARGE[0]
    tensors, dy = make(case, device), output_gradient(case, device)
    first = run_ours(case, tensors, dy, "cuda")
    other = torch.cuda.Stream(device)
    for _ in range(20):
        with torch.cuda.stream(other):
            torch.mm(tensors.x, tensors.x.t())
        for label, bits in vars(run_ours(case, tensors, dy, "cuda")).items():
            compare.assert_bitwise_equal(label, bits, getattr(first, label))


def test_stream_and_graph(device: torch.device) -> None:
    """The launch goes to torch's current stream, and is captured there."""
    case = CUDA_GRID[0][0]
    given = arguments(case, make(case, device))
    expected = pk.bottleneck_adapter(**given, backend="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = pk.bottleneck_adapter(**given, backend="cuda")
    captured.fill_(torch.nan)
    graph.replay()
    torch.cuda.synchronize(device)
    compare.assert_bitwise_equal("y", captured, expected)
