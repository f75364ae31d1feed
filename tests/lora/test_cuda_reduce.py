"""The reduce kernel's launcher: which passes a backward takes, what they are handed, what the extension refuses. The
device body runs in the emulator."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch

import peft_kernels as pk
from peft_kernels.lora.kernels import cuda_reduce, dropout
from peft_kernels.lora.kernels.cuda_reduce import OverDy, OverX
from peft_kernels.lora.kernels.dropout import NO_DROPOUT, Dropout
from tests.compiled import built_extension
from tests.lora import emulated_extension
from tests.lora.cases import Case, make_exact, run_oracle
from tests.lora.emulated_reduce import EmulatedReduce
from tests.lora.simt_reduce import Task
from tests.lora.test_csrc_reduce import draw, expected

pytestmark = [pytest.mark.cpu_only, pytest.mark.usefixtures("poison")]

CPU = torch.device("cpu")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
FACTORS = ("lora_a", "lora_b", "bias")


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> EmulatedReduce:
    return emulated_extension.install(monkeypatch).reduce


def passes(call: dict[str, Any]) -> set[str]:
    return {name for name in ("db", "dbias", "da", "ds_parts") if call[name]}


@pytest.mark.parametrize(
    ("asked", "launches"),
    [
        (("x", *FACTORS), [{"db", "dbias", "ds_parts"}, {"da"}]),
        (FACTORS, [{"db", "dbias", "ds_parts"}, {"da"}]),
        (("lora_b", "bias"), [{"db", "dbias"}]),
        (("lora_a",), [{"ds_parts"}, {"da"}]),
        (("bias",), [{"dbias"}]),
        (("x",), [{"ds_parts"}]),
        (("weight",), []),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, tuple) else None,
)
@pytest.mark.parametrize("adapter", [BF16, FP32])
def test_gradients_of_few_tokens(
    emulated: EmulatedReduce, adapter: torch.dtype, asked: tuple[str, ...], launches: list[set[str]]
) -> None:
    """Integers, so every gradient is the oracle's; rows of dY that are off 16-byte boundaries are copied."""
    case = Case(m=5, n=35, k=72, r=7, dtype=BF16, adapter_dtype=adapter, scale=0.5)
    tensors, dy = make_exact(case, CPU)
    leaves = [getattr(tensors, name).requires_grad_() for name in asked]
    y = pk.lora_linear(*tensors[:4], case.scale, tensors.bias, backend="cuda")
    gradients = torch.autograd.grad(y, leaves, dy)
    oracle = run_oracle(case, tensors, dy)
    for name, gradient in zip(asked, gradients, strict=True):
        assert torch.equal(gradient.double(), getattr(oracle, name)), name
    assert [passes(call) for call in emulated.calls] == launches


def test_one_launch_for_both_passes(emulated: EmulatedReduce) -> None:
    """As behind the Hopper GEMM, which makes dS: dropout, a scale on the device, strides."""
    task = Task(m=40, n=35, k=264, r=9, dtype=FP16, adapter_dtype=FP16, threshold=32768)
    operands = draw(task, integers=True)
    seed = torch.tensor(operands.seed)
    got = cuda_reduce.reduce_rows(
        OverDy(operands.dy.t().contiguous().t(), torch.tensor(0.5, dtype=torch.float64), operands.s, None, True),
        OverX(operands.x, operands.ds, Dropout(seed, task.threshold, dropout.keep_scale(task.threshold))),
        task.r,
        task.adapter_dtype,
    )
    oracle = expected(task, operands, 0.5, 2.0, torch.float64)
    for name in ("db", "dbias", "da"):
        assert torch.equal(getattr(got, name).double(), getattr(oracle, name)), name
    assert got.ds is None
    (call,) = emulated.calls
    assert call["x"] == (operands.x.data_ptr(), 264) and call["dy"][1] == 40


def test_strides_of_b(emulated: EmulatedReduce) -> None:
    task = Task(m=40, n=300, k=8, r=9, dtype=BF16, adapter_dtype=BF16, ds=True)
    operands = draw(task, integers=True)
    lora_b = operands.lora_b.t().contiguous().t()
    got = cuda_reduce.reduce_rows(OverDy(operands.dy, 0.5, None, lora_b, False), None, task.r, BF16)
    oracle = expected(task, operands, 0.5, 1.0, torch.float64)
    assert got.ds is not None and oracle.ds is not None and got.ds.shape == (40, 9)
    assert torch.equal(got.ds.double(), oracle.ds)
    (call,) = emulated.calls
    assert call["lora_b"][1:] == (1, 300)


def test_each_launch_has_its_nonce(emulated: EmulatedReduce) -> None:
    task = Task(m=1, n=8, k=8, r=1, dtype=BF16, adapter_dtype=BF16)
    operands = draw(task)
    for _ in range(2):
        cuda_reduce.reduce_rows(None, OverX(operands.x, operands.ds, NO_DROPOUT), 1, BF16)
    first, second = (call["nonce"] for call in emulated.calls)
    assert first != second


@pytest.fixture
def built() -> ModuleType:
    return built_extension()


@pytest.mark.parametrize("m", [1, 32, 33, 5000])
@pytest.mark.parametrize("r", [1, 32, 33, 130])
@pytest.mark.parametrize(("n", "k"), [(4096, 4096), (1, 0), (0, 257), (700, 14336)])
def test_workspace_of_the_extension(built: ModuleType, m: int, n: int, k: int, r: int) -> None:
    for exact in (False, True):
        for narrow in (False, True):
            shape = {"m": m, "n": n, "k": k, "r": r, "exact": exact, "narrow": narrow, "multiprocessors": 132}
            assert built.lora.reduce_workspace(**shape) == EmulatedReduce.workspace(**shape), shape


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"m": 0}, "m must be positive and at most 2\\^31 - 1024, got 0"),
        ({"n": 2**31 - 1}, "n must be positive and at most"),
        ({"r": 0}, "r must be positive"),
        ({"dy": (8, 72)}, "rows whose number of columns is n do not start at multiples of 16 bytes"),
        ({"x": (16, 68)}, "rows whose number of columns is k do not start"),
        ({"s": 0}, "the other factor of a gradient over n is missing"),
        ({"ds": 0}, "the other factor of a gradient over k is missing"),
        ({"dy": None, "x": None}, "there is nothing to do"),
        ({"threshold": 65536}, "threshold must be below 65536, got 65536"),
        ({"threshold": 1}, "dropout needs a seed"),
        ({"ds_parts": 16}, "dS needs dY and lora_b"),
        ({"dtype": "float32"}, "bfloat16 or float16 with adapters of that dtype or float32"),
        ({"adapter_dtype": "float16"}, "bfloat16 or float16 with adapters of that dtype or float32"),
        ({"multiprocessors": 0}, "multiprocessors must be positive, got 0"),
    ],
    ids=str,
)
def test_bad_arguments_of_the_extension(built: ModuleType, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"lora_linear: reduce_rows: .*{message}"):
        built.lora.reduce_rows(**{**ARGUMENTS, **wrong})


def test_launch_without_a_device_says_so(built: ModuleType) -> None:
    if built.why_no_device() is None:
        pytest.skip("there is a CUDA device")
    with pytest.raises(RuntimeError, match="launch of lora_linear's reduce_rows failed: cudaError"):
        built.lora.reduce_rows(**ARGUMENTS)


ARGUMENTS: dict[str, Any] = {
    **dict.fromkeys(("s", "dbias", "ds", "workspace"), 16),
    "dy": (16, 72),
    "x": (16, 64),
    "db": (16, 3, 1),
    "da": (16, 64, 1),
    "lora_b": None,
    "ds_parts": 0,
    "scale": (0, 1.0),
    "keep_scale": 1.0,
    "seed": 0,
    "threshold": 0,
    "nonce": 1,
    "m": 40,
    "n": 72,
    "k": 64,
    "r": 3,
    "dtype": "bfloat16",
    "adapter_dtype": "bfloat16",
    "multiprocessors": 132,
    "stream": 0,
}
