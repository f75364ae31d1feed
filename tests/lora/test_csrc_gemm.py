"""The Hopper GEMM without a GPU: its device body, compiled for the host, in the emulator of tests/simt.

Results against the float64 oracle under the error budget, the same bits from every schedule. What breaks it:
test_csrc_gemm_faults.py; in which tiles and which order: test_gemm_tiles.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import peft_kernels as pk
from python_ref import compare
from python_ref import lora as oracle
from tests.contract.operators import double
from tests.lora import cases, simt_gemm
from tests.lora.cases import Case

CPU = torch.device("cpu")
BF16, FP16 = torch.bfloat16, torch.float16

pytestmark = pytest.mark.cpu_only

# Case and grid. Sizes are multiples of 8, which TMA asks of rows, and of no tile; a last row block of one
# row, of less than a consumer's half, and of both halves; fewer, as many and more blocks than row blocks.
FORWARD = (
    (Case(m=300, n=520, k=200, r=3, dtype=BF16), 3),
    (Case(m=129, n=264, k=72, r=1, dtype=BF16, bias=False), 2),
    (Case(m=1100, n=264, k=64, r=16, dtype=BF16, scale=-3.0), 5),
    (Case(m=70, n=776, k=136, r=40, dtype=BF16), 1),
    (Case(m=200, n=24, k=8, r=25, dtype=FP16), 4),
    (Case(m=150, n=520, k=264, r=17, dtype=FP16), 3),
    (Case(m=260, n=392, k=328, r=128, dtype=FP16), 2),
    (Case(m=140, n=200, k=72, r=100, dtype=FP16, bias=False), 4),
)
BACKWARD = (
    (Case(m=300, n=200, k=520, r=11, dtype=BF16), 3),
    (Case(m=1, n=72, k=264, r=16, dtype=BF16, scale=0.0), 2),
    (Case(m=260, n=328, k=392, r=128, dtype=BF16), 2),
    (Case(m=200, n=136, k=200, r=72, dtype=BF16), 5),
    (Case(m=1100, n=64, k=264, r=20, dtype=FP16), 4),
    (Case(m=130, n=264, k=776, r=32, dtype=FP16, scale=-3.0), 1),
    (Case(m=150, n=72, k=520, r=40, dtype=FP16), 3),
)
# With dropout: few kept and few dropped, two row blocks that end in a ghost, one of less than a consumer's half.
FORWARD_DROPPED = (
    (Case(m=300, n=520, k=200, r=3, dtype=BF16, p=0.3), 3),
    (Case(m=140, n=264, k=392, r=100, dtype=BF16, p=0.1, bias=False), 2),
    (Case(m=1100, n=264, k=64, r=20, dtype=FP16, p=0.5, scale=-3.0), 5),
    (Case(m=33, n=24, k=136, r=64, dtype=FP16, p=0.9), 1),
)
BACKWARD_DROPPED = (
    (Case(m=300, n=200, k=520, r=3, dtype=BF16, p=0.3), 3),
    (Case(m=33, n=72, k=328, r=40, dtype=BF16, p=0.9, scale=-3.0), 2),
    (Case(m=1100, n=64, k=264, r=20, dtype=FP16, p=0.1), 4),
    (Case(m=260, n=136, k=392, r=128, dtype=FP16, p=0.5), 2),
)


@pytest.mark.slow
@pytest.mark.parametrize(("case", "grid"), (*FORWARD, *FORWARD_DROPPED), ids=str)
def test_forward(case: Case, grid: int) -> None:
    tensors = cases.make(case, CPU)
    simt_gemm.check_forward(case, tensors, *simt_gemm.forward(case, tensors, grid, schedules=3))


@pytest.mark.parametrize(("case", "grid"), (*BACKWARD, *BACKWARD_DROPPED), ids=str)
def test_backward(case: Case, grid: int) -> None:
    tensors, dy = cases.make(case, CPU), cases.output_gradient(case, CPU)
    simt_gemm.check_backward(case, tensors, dy, *simt_gemm.backward(case, tensors, dy, grid, schedules=3))


@pytest.mark.parametrize("seed", range(3))
def test_exact(seed: int) -> None:
    """Small integers, whose every product and sum is exact: no tolerance hides an index."""
    case = Case(m=200, n=328, k=200, r=17, dtype=FP16, scale=2.0)
    tensors, _ = cases.make_exact(case, CPU, seed)
    y, s = simt_gemm.forward(case, tensors, 2, schedules=1)
    *factors, bias = double(tensors)
    exact = oracle.forward(*factors, case.scale, bias)
    compare.assert_bitwise_equal("y", y.double(), exact[0] + 0.0)
    compare.assert_bitwise_equal("S", s.double() + 0.0, exact[1] + 0.0)


@pytest.mark.parametrize("seed", range(2))
def test_dropout_is_exact(seed: int) -> None:
    """A factor of 2 and small integers: no tolerance hides whose decision an element has had."""
    case = Case(m=200, n=200, k=328, r=17, dtype=FP16, scale=2.0, p=0.5)
    tensors, dy = cases.make_exact(case, CPU, seed)
    y, s = simt_gemm.forward(case, tensors, 2, schedules=1)
    dx, ds = simt_gemm.backward(case, tensors, dy, 2, schedules=1)
    *factors, bias = double(tensors)
    keep = pk.lora_linear_dropout_mask(cases.SEED, case.m, case.k, case.p, CPU)
    masked: Any = {"dropout_mask": keep, "dropout_p": case.p}
    exact = oracle.forward(*factors, case.scale, bias, **masked)
    compare.assert_bitwise_equal("y", y.double() + 0.0, exact[0] + 0.0)
    compare.assert_bitwise_equal("S", s.double() + 0.0, exact[1] + 0.0)
    compare.assert_bitwise_equal(
        "dX", dx.double() + 0.0, oracle.backward(dy.double(), *factors, case.scale, **masked).x + 0.0
    )
    compare.assert_bitwise_equal("dS", ds.double() + 0.0, case.scale * (dy.double() @ factors[3]) + 0.0)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_clusters_do_not_change_bits(backward: bool, p: float) -> None:
    """One block or two, and a second one below the last row of y."""
    case = Case(m=270, n=328, k=136, r=17, dtype=FP16, scale=0.3, p=p)
    tensors, dy = cases.make(case, CPU), cases.output_gradient(case, CPU)
    alone, paired = (
        simt_gemm.backward(case, tensors, dy, 3, 1, cluster) if backward
        else simt_gemm.forward(case, tensors, 3, 1, cluster) for cluster in (1, 2)
    )  # fmt: skip
    for name, one, other in zip(("y", "S"), alone, paired, strict=True):
        compare.assert_bitwise_equal(name, one, other)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_dropout_is_a_selection(backward: bool) -> None:
    """An infinite element that is dropped leaves nothing: no nan, and the same bits as a zero in its place."""
    case = Case(m=140, n=72, k=136, r=17, dtype=FP16, p=0.5, scale=2.0)
    tensors, dy = cases.make(case, CPU), cases.output_gradient(case, CPU)
    keep = pk.lora_linear_dropout_mask(cases.SEED, case.m, case.k, case.p, CPU)
    tensors.weight.zero_()
    if backward:
        finite, _ = simt_gemm.backward(case, tensors, dy, 2, 1)
        tensors.lora_a.fill_(float("inf"))
        dx, _ = simt_gemm.backward(case, tensors, dy, 2, 1)
        assert not dx[keep].isfinite().any()
        compare.assert_bitwise_equal("dX", dx[~keep], torch.zeros_like(dx[~keep]))
        assert (finite[keep] != 0).float().mean() > 0.99
        return
    x = torch.where(keep, tensors.x, 0.0)
    _, expected = simt_gemm.forward(case, tensors._replace(x=x), 2, 1)
    _, s = simt_gemm.forward(case, tensors._replace(x=torch.where(keep, x, float("inf"))), 2, 1)
    compare.assert_bitwise_equal("S", s, expected)
    assert s.isfinite().all()


@pytest.mark.parametrize(("scale", "a", "b"), [(4096.0, 1e2, 1e-3), (1e-5, 1e-3, 1e4)])
def test_float16_keeps_its_range(scale: float, a: float, b: float) -> None:
    """Scale times S is inf or zero in float16, and scale times S B^T is neither, as in eager."""
    case = Case(m=40, n=72, k=136, r=17, dtype=FP16, scale=scale, bias=False)
    tensors = cases.make(case, CPU)
    tensors.weight.zero_()
    tensors.lora_a.mul_(a)
    tensors.lora_b.mul_(b)
    simt_gemm.check_forward(case, tensors, *simt_gemm.forward(case, tensors, 1, schedules=1))


def test_infinite_x_stays_infinite() -> None:
    """0 * inf in the columns that pad the rank must not make nan of y's inf."""
    case = Case(m=140, n=264, k=72, r=3, dtype=BF16)
    tensors = simt_gemm.with_an_infinite_row(case)
    simt_gemm.check_forward(case, tensors, *simt_gemm.forward(case, tensors, 2, schedules=1))
