"""The CUDA backend without a GPU: its kernel in the host's emulator, its refusals, its launcher's checks.

No GPU has run the kernel. What the emulator does and does not model is in tests/simt/README.md.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import peft_kernels as pk
from peft_kernels._core import cuda_tools, extension
from peft_kernels._core.device import Hardware
from peft_kernels.adapter import cuda_impl, torch_impl
from peft_kernels.adapter.kernels import config
from peft_kernels.adapter.problem import BottleneckAdapterProblem, Inputs, make_problem
from python_ref import adapter as oracle
from python_ref import compare
from tests.adapter import simt_forward
from tests.adapter.cases import (
    ACTIVATIONS,
    CUDA_GRID,
    Case,
    arguments,
    check_budget,
    make,
    make_exact,
    run_oracle,
    run_ours,
)
from tests.compiled import built_extension
from tests.contract.operators import double

pytestmark = [pytest.mark.cpu_only, pytest.mark.usefixtures("poison")]

CPU = torch.device("cpu")
BF16, FP16 = torch.bfloat16, torch.float16


@pytest.mark.parametrize(("case", "cluster"), CUDA_GRID, ids=str)
def test_kernel(case: Case, cluster: int) -> None:
    """y and z under three schedules, which give the same bits."""
    seed = 3 * CUDA_GRID.index((case, cluster))
    tensors = make(case, CPU)
    before = [None if tensor is None else tensor.clone() for tensor in tensors]
    with simt_forward.kernel(schedules=3, first_seed=seed, cluster=cluster):
        y, z = _forward(case, tensors)
    for old, new in zip(before, tensors, strict=True):
        if old is not None:
            compare.assert_bitwise_equal("an input after the call", new, old)
    _check(case, tensors, y, z)


def _forward(case: Case, tensors: Any, scale: float | Tensor | None = None) -> tuple[Tensor, Tensor]:
    problem, inputs = _problem(case, tensors, scale)
    assert cuda_impl.why_not(problem) is None
    return cuda_impl.forward(problem, inputs)


def _problem(case: Case, tensors: Any, scale: float | Tensor | None = None) -> tuple[BottleneckAdapterProblem, Inputs]:
    inputs = Inputs(*tensors, case.residual == "x", case.activation, case.scale if scale is None else scale)
    return make_problem(inputs), inputs


def _check(case: Case, tensors: Any, y: Tensor, z: Tensor) -> None:
    wide = double(tensors)
    exact_y, exact_z = oracle.forward(**arguments(case, wide))
    compare.assert_close("y", y, oracle.eager(**arguments(case, tensors)), exact_y)
    # Eager's z is in half precision and says nothing about a float32 one. Products of half-precision values are exact
    # in float32; each of K additions, in whatever order, is off by at most half an eps of what the sizes sum to.
    sizes = F.linear(wide.x.abs(), wide.down_weight.abs(), None if wide.down_bias is None else wide.down_bias.abs())
    allowed = (case.k + 1) * torch.finfo(torch.float32).eps / 2 * sizes
    assert z.dtype == torch.float32 and z.shape == exact_z.shape
    assert ((z.double() - exact_z).abs() <= allowed).all()


@pytest.mark.parametrize(
    ("case", "cluster"),
    [
        (Case(m=5, k=264, r=8, dtype=BF16, residual="tensor", n=200), 1),
        (Case(m=65, k=520, r=8, dtype=BF16, residual="x"), 2),
    ],
    ids=str,
)
def test_kernel_under_many_schedules(case: Case, cluster: int) -> None:
    """Few threads and many chunks: whatever is not waited for is late in some of them."""
    tensors = make(case, CPU)
    with simt_forward.kernel(schedules=24, first_seed=100, cluster=cluster):
        y, z = _forward(case, tensors)
    _check(case, tensors, y, z)


@pytest.mark.parametrize("residual", ["x", "tensor", "none"])
@pytest.mark.parametrize("r", [24, 72])
def test_kernel_on_integers(residual: str, r: int) -> None:
    """Nothing is rounded, so no bit may differ from the oracle's."""
    case = Case(m=70, k=136, n=72, r=r, dtype=BF16, residual=residual, activation="relu", scale=0.5)
    tensors, _ = make_exact(case, CPU)
    with simt_forward.kernel(schedules=2, cluster=2):
        y, z = _forward(case, tensors)
    exact_y, exact_z = oracle.forward(**arguments(case, double(tensors)))
    assert torch.equal(y.double(), exact_y) and torch.equal(z.double(), exact_z)


@pytest.mark.parametrize("resident", [1, 2])
def test_kernel_with_few_clusters_at_a_time(resident: int) -> None:
    """No cluster waits for another; the bits are those of all of them at once."""
    case = Case(m=260, k=136, r=8, dtype=BF16, activation="gelu")
    tensors = make(case, CPU)
    with simt_forward.kernel(schedules=2, cluster=2):
        expected = _forward(case, tensors)
    with simt_forward.kernel(schedules=2, cluster=2, resident_clusters=resident):
        got = _forward(case, tensors)
    compare.assert_bitwise_equal("y", got[0], expected[0])
    compare.assert_bitwise_equal("z", got[1], expected[1])


def test_what_is_not_finite_stays_in_its_row() -> None:
    """Zeros beside a width's columns meet nan and infinite values of x, and must hide nothing and spread nothing."""
    case = Case(m=37, k=72, n=40, r=1, dtype=BF16, residual="none", up_bias=False)
    tensors = make(case, CPU)
    with simt_forward.kernel(cluster=2):
        clean, _ = _forward(case, tensors)
        tensors.x[3, 7], tensors.x[35, 2], tensors.x[36, 2] = torch.nan, torch.inf, -torch.inf
        tensors.down_weight[0, 2] = 1.0
        got, _ = _forward(case, tensors)
    eager = oracle.eager(**arguments(case, tensors))
    assert torch.equal(got.isfinite(), eager.isfinite())
    # relu(-inf) is a zero in the one column of h; a nan beside it would show here.
    assert got[36].isfinite().all() and got[35].isinf().any() and got[3].isnan().all()
    rows = [row for row in range(case.m) if row not in (3, 35, 36)]
    assert got[rows].isfinite().all() and clean.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensor_scale(dtype: torch.dtype) -> None:
    case = Case(m=9, k=72, r=8, dtype=BF16)
    tensors = make(case, CPU)
    with simt_forward.kernel():
        expected, _ = _forward(case, tensors)
        got, _ = _forward(case, tensors, torch.tensor(case.scale, dtype=dtype))
    compare.assert_bitwise_equal("y", got, expected)


@pytest.mark.parametrize(
    "case",
    [
        Case(m=37, k=72, r=20, dtype=BF16, activation="gelu"),
        Case(m=37, k=72, n=40, r=20, dtype=FP16, activation="silu", residual="tensor"),
        Case(m=9, k=40, n=72, r=128, dtype=BF16, activation="leaky_relu", residual="none"),
    ],
    ids=str,
)
def test_whole_backend(case: Case) -> None:
    """The public function with its gradients, which torch's products make from the z that the kernel saved."""
    with simt_forward.kernel(schedules=1):
        check_budget(case, CPU, functools.partial(run_ours, variant="cuda"))


def test_whole_backend_on_integers() -> None:
    case = Case(m=70, k=64, n=72, r=20, dtype=BF16, residual="tensor", scale=0.5)
    tensors, dy = make_exact(case, CPU)
    with simt_forward.kernel(schedules=1):
        got = run_ours(case, tensors, dy, "cuda")
    exact = run_oracle(case, tensors, dy)
    for label, value in vars(got).items():
        assert torch.equal(value.double(), getattr(exact, label)), label


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": torch.float32}, "bfloat16 or float16, got torch.float32"),
        ({"adapter_dtype": torch.float32}, "one dtype"),
        ({"residual": "wide"}, "residual has x's dtype, got torch.float32"),
        ({"k": 36}, "multiples of 8 (rows of 16 bytes), got 36"),
        ({"r": 129}, "r must be at most 128, got 129"),
        ({"k": 11272}, "up to 11264 at this width, got 11272 at r = 16"),
        ({"k": 8200, "r": 65}, "up to 8192 at this width, got 8200 at r = 65"),
    ],
)
def test_refusals(change: dict[str, Any], reason: str) -> None:
    case = dataclasses.replace(Case(m=2, k=72, r=16, dtype=BF16), **change)
    problem, _ = _problem(case, make(case, CPU))
    with simt_forward.kernel():
        assert reason in str(cuda_impl.why_not(problem))
    with simt_forward.kernel(), pytest.raises(pk.UnsupportedError, match="backend 'cuda' cannot run this problem"):
        pk.bottleneck_adapter(**arguments(case, make(case, CPU)), backend="cuda")


def test_most_rows() -> None:
    case = Case(m=1, k=72, r=16, dtype=BF16)
    problem, _ = _problem(case, make(case, CPU))
    with simt_forward.kernel():
        assert cuda_impl.why_not(dataclasses.replace(problem, m=2**31 - 1)) is None
        assert cuda_impl.why_not(dataclasses.replace(problem, m=2**31)) == "M must be below 2^31, got 2147483648"


def test_its_emulator_is_not_in_auto() -> None:
    case = Case(m=2, k=72, r=16, dtype=BF16)
    problem, _ = _problem(case, make(case, CPU))
    assert "for tests" in str(cuda_impl.IMPLEMENTATION.why_not_auto(problem))


def test_refuses_cpu_tensors_with_a_reason() -> None:
    case = Case(m=2, k=72, r=16, dtype=BF16)
    with pytest.raises(pk.UnsupportedError, match="CUDA kernels run on CUDA tensors, got tensors on cpu"):
        pk.bottleneck_adapter(**arguments(case, make(case, CPU)), backend="cuda")


@pytest.mark.parametrize(
    ("arch", "archs", "reason"),
    [
        (80, ["80", "90a"], "it needs sm_90 or newer, got sm_80"),
        (100, ["90a", "100"], "its kernel is for sm_90 alone (wgmma), got sm_100"),
        (90, ["80", "90"], "its kernel needs an extension built for 90a, got 80, 90"),
        (90, ["80", "90a"], None),
    ],
)
def test_refuses_other_devices_and_builds(arch: int, archs: list[str], reason: str | None) -> None:
    case = Case(m=2, k=72, r=16, dtype=BF16)
    problem, _ = _problem(case, make(case, CPU))
    chip, record = Hardware(arch=arch, sm_count=132), {"archs": archs, "ptx": None}
    with contextlib.ExitStack() as stack:
        for module, name, value in (
            (extension, "why_not", lambda: None),
            (extension, "build_record", lambda: record),
            (extension, "load", lambda: SimpleNamespace(adapter=simt_forward.LIMITS)),
            (cuda_tools, "hardware", lambda device: chip),
            (cuda_impl, "hardware", lambda device: chip),
        ):
            stack.enter_context(mock.patch.object(module, name, value))
        cuda_tools._why_not_compiled.cache_clear()
        try:
            on_gpu = dataclasses.replace(problem, device=torch.device("cuda"))
            assert cuda_impl.why_not(on_gpu) == reason
        finally:
            cuda_tools._why_not_compiled.cache_clear()


@pytest.mark.parametrize(
    ("m", "k", "sms", "cluster"),
    [
        (8192, 4096, 132, 8),
        (8192, 2048, 132, 4),
        (8192, 768, 132, 2),
        (16384, 512, 132, 1),
        (8192, 8192, 132, 8),
        (64, 4096, 132, 8),
        (2048, 768, 132, 8),  # 32 blocks of rows: 5 CTAs each would do, 4 leave four multiprocessors idle
        (64, 72, 132, 2),  # two chunks
    ],
)
def test_cluster(m: int, k: int, sms: int, cluster: int) -> None:
    chosen = config.cuda_forward_config(m, k, k, Hardware(arch=90, sm_count=sms))
    assert cluster == chosen.CLUSTER


@pytest.fixture(scope="module")
def built() -> ModuleType:
    return built_extension().adapter


def test_limits_of_the_extension(built: ModuleType) -> None:
    assert built.MAX_RANK == simt_forward.LIMITS.MAX_RANK
    assert [built.max_columns(r) for r in (1, 64, 65, 128)] == [
        simt_forward.LIMITS.max_columns(r) for r in (1, 64, 65, 128)
    ]


VALID = {
    "x": (16, 64), "down_weight": (16, 64), "up_weight": (16, 8), "down_bias": None, "up_bias": 0, "residual": None,
    "scale": (None, 1.0), "z": 16, "y": 16, "m": 4, "n": 64, "k": 64, "r": 3, "serial": True, "activation": "relu",
    "dtype": "bfloat16", "cluster": 1, "stream": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": (8, 64)}, "x must start at a multiple of 16 bytes"),
        ({"x": (16, 68)}, "x's row stride must be a multiple of 8"),
        ({"up_weight": (16, 0)}, "up_weight's row stride must be a multiple of 8 and at least 3, got 0"),
        ({"residual": (24, 64), "serial": False}, "residual must start at"),
        ({"y": 8}, "y must start at"),
        ({"m": -1}, "M must be in"),
        ({"k": 60}, "multiples of 8, got 64, 60"),
        ({"r": 129}, "r must be in [1, 128], got 129"),
        ({"cluster": 3}, "cluster must be 1, 2, 4 or 8, got 3"),
        ({"n": 72}, "the serial form has N = K"),
        ({"k": 2048, "n": 2048, "x": (16, 2048), "down_weight": (16, 2048)}, "a cluster of 1 cannot hold"),
        ({"k": 11328, "n": 64, "serial": False}, "at most 11264"),
        ({"dtype": "float32"}, "dtype must be bfloat16 or float16, got float32"),
    ],
)
def test_launcher_refuses(built: ModuleType, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        built.forward(**{**VALID, **change})
    assert "bottleneck_adapter: " in str(error.value) and message in str(error.value)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_extension_knows_every_activation(built: ModuleType, activation: str) -> None:
    built.forward(**{**VALID, "m": 0, "activation": activation})


def test_other_activations_are_refused(built: ModuleType) -> None:
    with pytest.raises(ValueError, match=r"activation must be one of relu, gelu, .*, identity, got swish"):
        built.forward(**{**VALID, "activation": "swish"})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_launch_without_a_device(built: ModuleType) -> None:
    with pytest.raises(RuntimeError, match=r"bottleneck_adapter's forward_sm90.* failed: cuda\w+: "):
        built.forward(**VALID)
    built.forward(**{**VALID, "m": 0})  # nothing to do, and nothing is asked of a device


def test_activations_are_all_there() -> None:
    assert {case.activation for case, _ in CUDA_GRID} == set(ACTIVATIONS)


def test_saves_what_torch_saves() -> None:
    """The backward pass is torch's own."""
    assert cuda_impl.IMPLEMENTATION.backward is torch_impl.backward
    case = Case(m=5, k=72, r=8, dtype=BF16)
    tensors = make(case, CPU)
    with simt_forward.kernel(schedules=1):
        _, z = _forward(case, tensors)
    _, expected = torch_impl.forward(*_problem(case, tensors))
    assert (z.dtype, z.shape, z.stride()) == (expected.dtype, expected.shape, expected.stride())
