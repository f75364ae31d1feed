"""The Hopper GEMM without a GPU: its device body, compiled for the host, in the emulator of tests/simt.

Results against the float64 oracle under the error budget, the same bits from every schedule; faults that are put into
the code on purpose are seen; the order of tiles for many shapes and grids.
"""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from python_ref import compare
from python_ref import lora_linear as oracle
from tests.lora_linear import cases, simt_gemm
from tests.lora_linear.cases import Case

CSRC = Path(__file__).parents[2] / "csrc"
CPU = torch.device("cpu")
BF16, FP16 = torch.bfloat16, torch.float16

pytestmark = pytest.mark.cpu_only

# Case and grid. Sizes are multiples of 8, which the copy engine asks of rows, and of no tile; a last row block of one
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
    (Case(m=300, n=200, k=520, r=20, dtype=BF16), 3),
    (Case(m=1, n=72, k=264, r=32, dtype=BF16, scale=0.0), 2),
    (Case(m=260, n=328, k=392, r=128, dtype=BF16), 2),
    (Case(m=200, n=136, k=200, r=72, dtype=BF16), 5),
    (Case(m=1100, n=64, k=264, r=3, dtype=FP16), 4),
    (Case(m=130, n=264, k=776, r=16, dtype=FP16, scale=-3.0), 1),
    (Case(m=150, n=72, k=520, r=40, dtype=FP16), 3),
)


@pytest.mark.parametrize(("case", "grid"), FORWARD, ids=str)
def test_forward(case: Case, grid: int) -> None:
    tensors = cases.make(case, CPU)
    y, s = simt_gemm.forward(case, tensors, grid, schedules=3)
    exact = oracle.forward(*(tensor.double() for tensor in tensors[:4]), case.scale, _double(tensors.bias))
    eager = oracle.eager(*tensors[:4], case.scale, tensors.bias)
    compare.assert_close(f"{case} y", y, eager, exact[0])
    compare.assert_close(f"{case} S", s, tensors.x.float() @ tensors.lora_a.float().t(), exact[1])


@pytest.mark.parametrize(("case", "grid"), BACKWARD, ids=str)
def test_backward(case: Case, grid: int) -> None:
    tensors, dy = cases.make(case, CPU), cases.output_gradient(case, CPU)
    dx, ds = simt_gemm.backward(case, tensors, dy, grid, schedules=3)
    exact = cases.run_oracle(case, tensors, dy)
    eager = cases.run_eager(case, tensors, dy)
    compare.assert_close(f"{case} dX", dx, eager.x, exact.x)
    exact_ds = case.scale * (dy.double() @ tensors.lora_b.double())
    compare.assert_close(f"{case} dS", ds, case.scale * (dy.float() @ tensors.lora_b.float()), exact_ds)


@pytest.mark.parametrize("seed", range(3))
def test_exact(seed: int) -> None:
    """Small integers, whose every product and sum is exact: no tolerance hides an index."""
    case = Case(m=200, n=328, k=200, r=17, dtype=FP16, scale=2.0)
    tensors, _ = cases.make_exact(case, CPU, seed)
    y, s = simt_gemm.forward(case, tensors, 2, schedules=1)
    exact = oracle.forward(*(tensor.double() for tensor in tensors[:4]), case.scale, _double(tensors.bias))
    compare.assert_bitwise_equal("y", y.double(), exact[0] + 0.0)
    compare.assert_bitwise_equal("S", s.double() + 0.0, exact[1] + 0.0)


def test_infinite_x_stays_in_its_row() -> None:
    """0 * inf in the columns that pad the rank must not make nan of y's inf."""
    case, tensors = _with_an_infinite_row()
    y, _ = simt_gemm.forward(case, tensors, 2, schedules=1)
    eager = oracle.eager(*tensors[:4], case.scale, tensors.bias)
    exact = oracle.forward(*(tensor.double() for tensor in tensors[:4]), case.scale, _double(tensors.bias))
    compare.assert_close("y", y, eager, exact[0])


def _with_an_infinite_row() -> tuple[Case, cases.Tensors]:
    case = Case(m=140, n=264, k=72, r=3, dtype=BF16)
    tensors = cases.make(case, CPU)
    tensors.x[7, 5] = float("inf")
    tensors.lora_b.abs_()
    tensors.lora_a.abs_()
    tensors.weight.abs_()
    return case, tensors


def _double(bias: torch.Tensor | None) -> torch.Tensor | None:
    return None if bias is None else bias.double()
