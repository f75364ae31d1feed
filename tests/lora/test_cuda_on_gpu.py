"""The CUDA backend on the GPUs that its kernels are written for. What the host's emulator shows without one is in
test_cuda_backend.py, test_cuda_decode.py, test_cuda_gemm.py and test_csrc_reduce.py."""

from __future__ import annotations

import functools

import pytest
import torch

import peft_kernels as pk
from peft_kernels._core.device import hardware
from peft_kernels.lora.kernels import cuda_gemm, cuda_reduce
from peft_kernels.lora.kernels.cuda_reduce import OverDy, OverX
from peft_kernels.lora.kernels.dropout import Dropout, keep_scale
from python_ref import compare
from tests.lora.cases import Case, check_budget, make, output_gradient
from tests.lora.simt_reduce import Operands, Task
from tests.lora.test_csrc_gemm import BACKWARD, BACKWARD_DROPPED, FORWARD, FORWARD_DROPPED
from tests.lora.test_csrc_reduce import TASKS, draw, expected
from tests.lora.test_cuda_backend import _by_cuda
from tests.lora.test_cuda_decode import GRID

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poison")]

BF16, FP16 = torch.bfloat16, torch.float16
GEMM = [case for case, _ in (*FORWARD, *FORWARD_DROPPED, *BACKWARD, *BACKWARD_DROPPED) if case.m > 16]
# Wide tiles, more than multiprocessors, and row blocks that end in a ghost.
WIDE = [
    Case(m=4200, n=4088, k=4072, r=r, dtype=dtype) for r in (16, 40, 128) for dtype in (torch.bfloat16, torch.float16)
]
# More tiles of y than multiprocessors, with a mask that the oracle draws in seconds.
WIDE_DROPPED = [
    Case(m=1100, n=4088, k=264, r=r, dtype=dtype, p=0.1)
    for r in (16, 40, 128)
    for dtype in (torch.bfloat16, torch.float16)
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


@pytest.mark.parametrize("case", [*(case for case, _ in GRID), *GEMM, *WIDE, *WIDE_DROPPED], ids=str)
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


# All blocks of a GPU, several to a tile and several tiles to a block; with them what the emulator runs.
REDUCED = [
    *TASKS,
    Task(m=8193, n=4096, k=4096, r=16, dtype=BF16, adapter_dtype=BF16, threshold=6554),
    Task(m=2048, n=520, k=264, r=128, dtype=FP16, adapter_dtype=FP16),
    Task(m=1000, n=14336, k=8, r=64, dtype=BF16, adapter_dtype=BF16, da=False, ds=True),
    Task(m=300, n=4096, k=1000, r=40, dtype=BF16, adapter_dtype=torch.float32),
]


def _reduced(task: Task, device: torch.device) -> tuple[cuda_reduce.Sums, Operands]:
    operands = draw(task)
    dy, s, x, ds, lora_b = (tensor.to(device) for tensor in operands[:5])
    seed = torch.tensor(operands.seed, device=device) if task.threshold else None
    over_dy = OverDy(dy, 0.5, s if task.db else None, lora_b if task.ds else None, task.dbias)
    over_x = OverX(x, ds, Dropout(seed, task.threshold, keep_scale(task.threshold))) if task.da else None
    return cuda_reduce.reduce_rows(over_dy, over_x, task.r, task.adapter_dtype), operands


@pytest.mark.parametrize("task", REDUCED, ids=str)
def test_sums_over_tokens(task: Task, device: torch.device) -> None:
    got, operands = _reduced(task, device)
    scales = 0.5, keep_scale(task.threshold)
    eager = expected(task, operands, *scales, task.adapter_dtype)
    oracle = expected(task, operands, *scales, torch.float64)
    for name in ("db", "dbias", "da", "ds"):
        ours = getattr(got, name)
        assert (ours is None) == (getattr(oracle, name) is None), name
        if ours is not None:
            ours = ours.cpu()
            compare.assert_close(f"{task} {name}", ours, getattr(eager, name).to(ours.dtype), getattr(oracle, name))


@pytest.mark.parametrize("task", REDUCED, ids=str)
def test_sums_have_the_same_bits(task: Task, device: torch.device) -> None:
    first, _ = _reduced(task, device)
    for _ in range(20):
        for name, one, other in zip(first._fields, first, _reduced(task, device)[0], strict=True):
            if one is not None:
                compare.assert_bitwise_equal(name, one, other)


@pytest.mark.parametrize("case", REPLAYED, ids=str)
def test_graph_replays(case: Case, device: torch.device) -> None:
    """Each replay must compute again: flags and tickets of the replay before may not count."""
    _skip_where_none_is_for(case, device)
    x, weight, lora_a, lora_b, _ = make(case, device)
    leaves = tuple(tensor.requires_grad_() for tensor in (x, lora_a, lora_b))
    dy = output_gradient(case, device)

    def call() -> tuple[torch.Tensor, ...]:
        y = pk.lora_linear(x, weight, lora_a, lora_b, backend="cuda")
        return y, *torch.autograd.grad(y, leaves, dy)

    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    for seed in range(20):
        x.data.copy_(make(case, device, seed).x)
        graph.replay()
        for name, one, other in zip(("y", "dx", "da", "db"), results, call(), strict=True):
            compare.assert_bitwise_equal(name, one, other)
