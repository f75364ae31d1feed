"""The CUDA backend on the GPUs that its kernels are written for. What the host's emulator shows without one is in
test_cuda_backend.py, test_cuda_decode.py and test_cuda_gemm.py."""

from __future__ import annotations

import functools

import pytest
import torch

import peft_kernels as pk
from peft_kernels._core.device import hardware
from peft_kernels.lora.kernels import cuda_gemm
from python_ref import compare
from tests.lora.cases import Case, check_budget, make
from tests.lora.test_csrc_gemm import BACKWARD, FORWARD
from tests.lora.test_cuda_backend import _by_cuda
from tests.lora.test_cuda_decode import GRID

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poison")]

BF16 = torch.bfloat16
GEMM = [case for case, _ in (*FORWARD, *BACKWARD) if case.m > 16]
# Wide tiles, more than multiprocessors, and row blocks that end in a ghost.
WIDE = [
    Case(m=4200, n=4088, k=4072, r=r, dtype=dtype) for r in (16, 40, 128) for dtype in (torch.bfloat16, torch.float16)
]
# One token and as many as the decode kernel takes; many tiles a block, and row blocks that end in one row.
REPEATED = [
    *(Case(m=m, n=4096, k=4096, r=16, dtype=BF16, bias=False) for m in (1, 16)),
    *(Case(m=8193, n=4096, k=1024, r=r, dtype=BF16) for r in (16, 128)),
]
REPLAYED = [
    Case(m=4, n=1024, k=4096, r=16, dtype=BF16, bias=False),
    Case(m=640, n=1024, k=1024, r=16, dtype=BF16, bias=False),
]


def _skip_where_none_is_for(case: Case, device: torch.device) -> None:
    if case.m > 16 and hardware(device).arch != cuda_gemm.ARCH:
        pytest.skip(f"the kernel is for sm_{cuda_gemm.ARCH}")


@pytest.mark.parametrize("case", [*(case for case, _ in GRID), *GEMM, *WIDE], ids=str)
def test_error_budget(case: Case, device: torch.device) -> None:
    _skip_where_none_is_for(case, device)
    check_budget(case, device, _by_cuda)


@pytest.mark.parametrize("case", REPEATED, ids=str)
def test_same_bits(case: Case, device: torch.device) -> None:
    _skip_where_none_is_for(case, device)
    tensors = make(case, device)
    call = functools.partial(pk.lora_linear, *tensors[:4], case.scale, tensors.bias, backend="cuda")
    first = call()
    for _ in range(50):
        compare.assert_bitwise_equal("y", call(), first)


@pytest.mark.parametrize("case", REPLAYED, ids=str)
def test_graph_replays(case: Case, device: torch.device) -> None:
    """Each replay must compute again: flags of the replay before may not count."""
    _skip_where_none_is_for(case, device)
    x, weight, lora_a, lora_b, _ = make(case, device)
    call = functools.partial(pk.lora_linear, x, weight, lora_a, lora_b, backend="cuda")
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call()
    for seed in range(20):
        x.copy_(make(case, device, seed).x)
        graph.replay()
        compare.assert_bitwise_equal("y", y, call())
