"""The Hopper GEMM's launcher: what it refuses, what it hands to the extension and copies before, all gradients.
The device body runs in the emulator."""

from __future__ import annotations

import ctypes
import dataclasses
import re
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import peft_kernels as pk
from peft_kernels._core.device import Hardware
from peft_kernels.lora import qualification
from peft_kernels.lora.kernels.dropout import NO_DROPOUT, Dropout
from peft_kernels.lora.linear import cuda_impl, problem
from tests.compiled import built_extension
from tests.lora import emulated_extension, simt_gemm
from tests.lora.cases import Case, check_budget, make, make_exact, output_gradient, run_oracle
from tests.lora.test_cuda_backend import _by_cuda

pytestmark = pytest.mark.cpu_only

CPU = torch.device("cpu")
BF16, FP16 = torch.bfloat16, torch.float16


class EmulatedGemm:
    """gemm_sm90 and gemm_workspace on the CPU's memory, by the device body in the emulator."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    @staticmethod
    def workspace(m: int, r: int) -> tuple[int, int]:
        flags = 4 * -(-m // 256)
        return flags, 8 * flags + 2 * m * simt_gemm.padded_rank(r)

    def launch(self, **call: Any) -> None:
        self.calls.append(call)
        dtype, m, n, k, r = getattr(torch, call["dtype"]), call["m"], call["n"], call["k"], call["r"]
        back = call["backward"]
        shapes = {"x": (m, k), "w": (k, n) if back else (n, k), "down": (k, r) if back else (r, k)}
        shapes["up"] = (r, n) if back else (n, r)
        operands = {name: _memory(call[name], shape, dtype) for name, shape in shapes.items()}
        bias = _memory((call["bias"], n), (1, n), dtype)[0] if call["bias"] else None
        address, scale = call["scale"]
        if address:
            scale = ctypes.c_float.from_address(address).value
        case = Case(m=m, n=n, k=k, r=r, dtype=dtype, scale=scale)
        drop = NO_DROPOUT
        if call["threshold"]:
            seed = torch.tensor(ctypes.c_int64.from_address(call["seed"]).value)
            drop = Dropout(seed, call["threshold"], call["keep_scale"])
        kind = "kBf16" if dtype == BF16 else "kFp16"
        config = simt_gemm.name(kind, simt_gemm.padded_rank(r), "kBackward" if back else "kForward", drop.threshold > 0)
        results = simt_gemm.run(
            simt_gemm.program(), config, operands, bias, case, (m, n, k), grid=3, schedules=1, drop=drop
        )
        for name, value in zip(("y", "s"), results, strict=True):
            ctypes.memmove(call[name], value.data_ptr(), value.numel() * value.element_size())


def _memory(strided: tuple[int, int], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    (address, stride), (rows, cols) = strided, shape
    content = ctypes.string_at(address, ((rows - 1) * stride + cols) * dtype.itemsize)
    return torch.frombuffer(bytearray(content), dtype=dtype).as_strided(shape, (stride, 1))


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> EmulatedGemm:
    gemm, stand_in = EmulatedGemm(), emulated_extension.install(monkeypatch)
    stand_in.lora.gemm_sm90 = gemm.launch
    stand_in.lora.gemm_workspace = gemm.workspace
    return gemm


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(
    "case",
    [
        Case(m=140, n=264, k=72, r=16, dtype=BF16),
        Case(m=140, n=264, k=72, r=3, dtype=BF16, layout="expanded", bias=False),
        Case(m=33, n=72, k=136, r=27, dtype=FP16),
        Case(m=140, n=264, k=72, r=16, dtype=BF16, p=0.3),
        Case(m=33, n=72, k=136, r=27, dtype=FP16, p=0.9),
    ],
    ids=str,
)
def test_all_gradients(emulated: EmulatedGemm, case: Case) -> None:
    check_budget(case, CPU, _by_cuda)
    assert [call["backward"] for call in emulated.calls[:2]] == [False, True]


def test_copies_and_strides(emulated: EmulatedGemm) -> None:
    """Wider rows of x and W as they are; B of an odd rank, every second element of a bias, a strided dY by a copy."""
    case = Case(m=24, n=72, k=64, r=9, dtype=BF16)
    tensors, dy = make_exact(case, CPU)
    wide = torch.randn(24, 80, dtype=BF16)
    wide[:, 8:72] = tensors.x
    x = wide[:, 8:72].requires_grad_()
    weight = torch.cat((tensors.weight, tensors.weight[:, :16]), dim=1)[:, :64]
    bias = torch.stack((tensors.bias, tensors.bias + 1), dim=1)[:, 0]
    scale = torch.tensor(case.scale, dtype=torch.float64)
    y = pk.lora_linear(x, weight, tensors.lora_a, tensors.lora_b, scale, bias, backend="cuda")
    (dx,) = torch.autograd.grad(y, x, dy.t().contiguous().t())
    expected = run_oracle(case, tensors, dy)
    assert torch.equal(y.double(), expected.y)
    assert torch.equal(dx.double(), expected.x)
    forward, backward = emulated.calls
    assert [forward[name][1] for name in ("x", "w", "up")] == [80, 80, 16]
    assert [backward[name][1] for name in ("x", "w", "down")] == [72, 80, 16]
    assert forward["nonce"] != backward["nonce"]


def test_gradients_that_nobody_asks_for(emulated: EmulatedGemm) -> None:
    """Without dX there is no launch in the backward pass."""
    case = Case(m=24, n=72, k=64, r=8, dtype=BF16)
    x, weight, lora_a, lora_b, bias = make(case, CPU)
    leaves = lora_a.requires_grad_(), lora_b.requires_grad_()
    y = pk.lora_linear(x, weight, *leaves, case.scale, bias, backend="cuda")
    torch.autograd.grad(y, leaves, output_gradient(case, CPU))
    assert [call["backward"] for call in emulated.calls] == [False]


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": torch.float32}, "it takes bfloat16 and float16, got torch.float32"),
        ({"adapter_dtype": torch.float32}, "does not round adapters, got torch.float32"),
        ({"r": 129}, "up to rank 128, got 129"),
        ({"n": 68}, "N must be a multiple of 8, got 68"),
        ({"k": 68}, "K must be a multiple of 8, got 68"),
        ({"layout": "columns"}, "rows are strided or off 16-byte boundaries"),
    ],
    ids=str,
)
def test_refusals(change: dict[str, Any], reason: str) -> None:
    case = dataclasses.replace(Case(m=40, n=72, k=64, r=4, dtype=BF16), **change)
    tensors = make(case, CPU)
    with pytest.raises(pk.UnsupportedError, match=rf"'cuda' cannot run this problem: .*gemm: .*{reason}.*'auto' can$"):
        pk.lora_linear(*tensors[:4], dropout_p=case.p, backend="cuda")


def test_other_architectures_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(m=40, n=72, k=64, r=4, dtype=BF16)
    described = problem.make_problem(problem.Inputs(*make(case, CPU)[:4], 1.0, None, 0.0, None))
    emulated_extension.install(monkeypatch)
    monkeypatch.setattr(cuda_impl, "hardware", lambda device: Hardware(arch=100, sm_count=148))
    assert "gemm: it is written in sm_90a's instructions, got sm_100" in (cuda_impl.why_not(described) or "")


@pytest.mark.parametrize(
    ("busy", "reason"), [(0.5, None), (0.3, "gemm: its tiles leave most .* got M = 40 and N = 72")]
)
def test_auto_passes_over_few_tiles(monkeypatch: pytest.MonkeyPatch, busy: float, reason: str | None) -> None:
    """Which a caller who forces the backend does not notice."""
    stand_in = emulated_extension.install(monkeypatch)
    stand_in.lora.gemm_tiles = lambda **sizes: (128, 1, busy if sizes["m"] == 40 else 1.0)
    case = Case(m=40, n=72, k=64, r=4, dtype=BF16)
    described = problem.make_problem(problem.Inputs(*make(case, CPU)[:4], 1.0, None, 0.0, None))
    assert cuda_impl.why_not(described) is None
    got = cuda_impl.IMPLEMENTATION.slower(described)
    assert got is None if reason is None else re.match(reason, got or "")


@pytest.fixture
def built() -> ModuleType:
    return built_extension()


@pytest.mark.parametrize("m", [1, 128, 129, 5000])
@pytest.mark.parametrize("r", [1, 16, 17, 64, 65, 128])
def test_workspace_of_the_extension(built: ModuleType, m: int, r: int) -> None:
    assert built.lora.gemm_workspace(m=m, r=r) == EmulatedGemm.workspace(m, r)
    assert built.lora.GEMM_MAX_RANK == 128


@pytest.mark.parametrize("multiprocessors", [78, 114, 132])
@pytest.mark.parametrize("part", [part for part in qualification._CUDA if part.startswith("gemm")])
def test_qualification_reaches_all_tiles(built: ModuleType, part: str, multiprocessors: int) -> None:
    """Each direction of each part with wide and with narrow tiles, in clusters and alone."""
    cases = qualification._cuda_cases(part, Hardware(arch=90, sm_count=multiprocessors))
    for backward in (False, True):
        seen = set()
        for case in cases:
            n, k = (case.k, case.n) if backward else (case.n, case.k)
            dtype = str(case.dtype).removeprefix("torch.")
            shape = built.lora.gemm_tiles(
                m=case.m, n=n, k=k, r=case.r, dtype=dtype, backward=backward, dropout=case.p > 0,
                multiprocessors=multiprocessors,
            )  # fmt: skip
            seen.add(shape[:2])
        if part.endswith("dropout"):
            width = {"r64": 192, "r128": 128}.get(part.split()[2], 256)
            assert seen == {(width, 1), (width, 2)}, (backward, seen)
            continue
        wide = 256 if not part.endswith("128") else 192
        if part.endswith("128") and "float16" in part and "bfloat16" not in part and not backward:
            wide = 128
        assert seen >= {(wide, 2), (128, 2), (128, 1)}, (backward, seen)
        assert backward or (wide, 1) in seen, seen


def test_few_tiles_of_the_extension(built: ModuleType) -> None:
    def busy(m: int) -> float:
        return built.lora.gemm_tiles(
            m=m, n=4096, k=4096, r=16, dtype="bfloat16", backward=False, dropout=False, multiprocessors=132
        )[2]

    assert busy(128) < cuda_impl.LEAST_BUSY < busy(256) < busy(8192) < 1.0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"m": 0}, "must be positive and below 2\\^31 - 1023, got 0"),
        ({"k": 2**31}, "must be positive and below 2\\^31 - 1023, got 2147483648"),
        ({"r": 129}, "takes ranks up to 128, got 129"),
        ({"n": 68}, "n must be a multiple of 8"),
        ({"bias": 2}, "bias on a 4-byte boundary"),
        ({"x": (16, 68)}, "those of x are 68 elements apart, for 64 columns"),
        ({"w": (24, 64)}, "those of w are"),
        ({"down": (16, 56)}, "those of down are 56 elements apart, for 64 columns"),
        ({"up": (16, 4)}, "those of up are 4 elements apart"),
        ({"dtype": "float32"}, "takes bfloat16 or float16"),
        ({"dtype": "int8"}, "dtype must be one of bfloat16, float16, float32, got int8"),
        ({"threshold": 65536}, "threshold must be below 65536, got 65536"),
        ({"threshold": 1}, "gemm_sm90's dropout needs a seed"),
        ({"multiprocessors": 0}, "multiprocessors must be positive, got 0"),
    ],
    ids=str,
)
def test_bad_arguments_of_the_extension(built: ModuleType, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        built.lora.gemm_sm90(**{**ARGUMENTS, **wrong})


def test_a_direction_is_true_or_false(built: ModuleType) -> None:
    with pytest.raises(TypeError, match="gemm_sm90: backward must be a bool, got 1"):
        built.lora.gemm_sm90(**{**ARGUMENTS, "backward": 1})


def test_launch_without_a_device_says_so(built: ModuleType) -> None:
    if built.why_no_device() is None:
        pytest.skip("there is a CUDA device")
    with pytest.raises(RuntimeError, match="launch of lora_linear's gemm_sm90 failed: cudaError"):
        built.lora.gemm_sm90(**ARGUMENTS)


ARGUMENTS: dict[str, Any] = {
    **dict.fromkeys(("x", "w", "down"), (16, 64)),
    **dict.fromkeys(("bias", "y", "s", "workspace"), 16),
    "up": (16, 8),
    "scale": (0, 1.0),
    "seed": None,
    "threshold": 0,
    "keep_scale": 1.0,
    "nonce": 1,
    "m": 40,
    "n": 72,
    "k": 64,
    "r": 3,
    "dtype": "bfloat16",
    "backward": False,
    "multiprocessors": 132,
    "stream": 0,
}
