"""The operator: autograd, torch.library, compile, checkpointing, autocast, saved memory, wrong input."""

from __future__ import annotations

import math
import warnings
from unittest import mock

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import peft_kernels as pk
from peft_kernels.lora.kernels import dropout
from peft_kernels.lora.linear import op
from python_ref import compare
from python_ref import lora as oracle
from tests.lora.cases import SEED, Case, make, output_gradient


def _double(*shape: int, requires_grad: bool = True) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).requires_grad_(requires_grad)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_gradcheck(p: float) -> None:
    torch.manual_seed(0)
    inputs = (_double(2, 3, 5), _double(4, 5), _double(2, 5), _double(4, 2), _double(4))

    def call(x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, bias: Tensor) -> Tensor:
        return pk.lora_linear(x, weight, lora_a, lora_b, 0.7, bias, dropout_p=p, seed=SEED)

    assert torch.autograd.gradcheck(call, inputs)


def test_second_derivative_is_refused() -> None:
    x, w, a, b = _double(3, 5), _double(4, 5, requires_grad=False), _double(2, 5), _double(4, 2)
    dy = _double(3, 4)
    (dx,) = torch.autograd.grad(pk.lora_linear(x, w, a, b), x, dy, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("tensor_scale", [False, True])
def test_opcheck(p: float, tensor_scale: bool) -> None:
    x, w, a, b, bias = (torch.randn(s).requires_grad_() for s in ((2, 3, 8), (6, 8), (2, 8), (6, 2), (6,)))
    scale = torch.tensor(0.5) if tensor_scale else None
    seed = torch.tensor(SEED) if p else None
    torch.library.opcheck(torch.ops.peft_kernels.lora_linear.default, (x, w, a, b, 0.5, scale, bias, p, seed, "torch"))
    s, dy = torch.randn(6, 2), torch.randn(2, 3, 6)
    detached = [tensor.detach() for tensor in (x, w, a, b)]
    torch.library.opcheck(
        torch.ops.peft_kernels.lora_linear_backward.default,
        (dy, *detached, 0.5, scale, p, seed, s, [True, False, True, True, False], "torch"),
    )


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_compile_without_graph_break(compiler: str, p: float) -> None:
    torch._dynamo.reset()
    case = Case(p=p)
    tensors = [None if t is None else t.requires_grad_() for t in make(case, torch.device("cpu"))]
    dy = output_gradient(case, torch.device("cpu"))

    def call(x: Tensor, w: Tensor, a: Tensor, b: Tensor, bias: Tensor) -> Tensor:
        return pk.lora_linear(x * 2, w, a, b, 0.5, bias, dropout_p=p, seed=SEED).relu()

    eager = call(*tensors)
    expected = torch.autograd.grad(eager, tensors, dy)
    compiled = torch.compile(call, fullgraph=True, backend=compiler)
    got = compiled(*tensors)
    torch.testing.assert_close(got, eager)
    torch.testing.assert_close(torch.autograd.grad(got, tensors, dy), expected)


def test_compiled_dropout_draws_its_seed() -> None:
    """Under compile a fresh seed comes from torch's generator: the same after the same manual_seed, else another."""
    torch._dynamo.reset()
    x, w, a, b = torch.randn(64, 16), torch.zeros(8, 16), torch.randn(4, 16), torch.randn(8, 4)
    compiled = torch.compile(lambda x: pk.lora_linear(x, w, a, b, dropout_p=0.5), fullgraph=True, backend="aot_eager")
    torch.manual_seed(1)
    first, second = compiled(x), compiled(x)
    torch.manual_seed(1)
    assert torch.equal(compiled(x), first)
    assert not torch.equal(first, second)


def test_scale_value_does_not_recompile() -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    x, w, a, b = torch.randn(4, 8), torch.randn(6, 8), torch.randn(2, 8), torch.randn(6, 2)
    compiled = torch.compile(lambda s: pk.lora_linear(x, w, a, b, s), fullgraph=True, backend=counter)
    for value in (0.5, 2.0, 3.0):
        compiled(torch.tensor(value))
    assert counter.frame_count == 1


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_replays_the_mask(use_reentrant: bool) -> None:
    case = Case(m=64, p=0.5)
    tensors = [t.requires_grad_() for t in make(case, torch.device("cpu")) if t is not None]

    def call(x: Tensor, w: Tensor, a: Tensor, b: Tensor, bias: Tensor) -> Tensor:
        return pk.lora_linear(x, w, a, b, 0.5, bias, dropout_p=0.5)

    torch.manual_seed(3)
    y = call(*tensors)
    expected = torch.autograd.grad(y.square().sum(), tensors)
    torch.manual_seed(3)
    again = checkpoint(call, *tensors, use_reentrant=use_reentrant)
    compare.assert_bitwise_equal("y", again.detach(), y.detach())
    again.square().sum().backward()  # reentrant checkpointing knows no autograd.grad
    for tensor, gradient in zip(tensors, expected, strict=True):
        compare.assert_bitwise_equal("gradient", tensor.grad, gradient)


def test_dropout_is_unbiased_and_fresh() -> None:
    torch.manual_seed(0)
    x, a, b, w = torch.ones(400, 512), torch.ones(1, 512) / 512, torch.ones(1, 1), torch.zeros(1, 512)
    p = 0.3
    y = pk.lora_linear(x, w, a, b, dropout_p=p)
    # Each row is a mean of 512 draws of variance p / (1 - p); five standard errors of the mean over 400 rows.
    error = math.sqrt(p / (1 - p) / (400 * 512))
    assert abs(y.mean().item() - 1.0) < 5 * error
    assert not torch.equal(y, pk.lora_linear(x, w, a, b, dropout_p=p))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gives_linear_s_dtype(dtype: torch.dtype) -> None:
    x, w, a, b = torch.randn(4, 8, requires_grad=True), torch.randn(6, 8), torch.randn(2, 8), torch.randn(6, 2)
    a.requires_grad_()
    with torch.autocast("cpu", dtype):
        y = pk.lora_linear(x, w, a, b, 0.5)
        assert y.dtype == torch.nn.functional.linear(x, w).dtype == dtype
        y.float().sum().backward()
    assert x.grad.dtype == a.grad.dtype == torch.float32
    direct = pk.lora_linear(x.detach().to(dtype), w.to(dtype), a.detach(), b, 0.5)
    compare.assert_bitwise_equal("y", y.detach(), direct)


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_saved_bytes_are_x_and_s(p: float) -> None:
    """Besides tensors that exist anyway, a call keeps S (M, r) and an 8-byte seed: no mask, no cast or dropped x."""
    case = Case(m=256, n=128, k=128, r=4, dtype=torch.bfloat16, adapter_dtype=torch.float32, p=p)
    tensors = make(case, torch.device("cpu"))
    leaves = [tensor.requires_grad_() for tensor in tensors if tensor is not None]
    known = {tensor.untyped_storage().data_ptr() for tensor in leaves}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        pk.lora_linear(*tensors[:4], 0.5, tensors.bias, dropout_p=p)
    assert sum(saved.values()) == case.m * case.r * 4 + (8 if p else 0)


def test_inference_saves_nothing() -> None:
    case = Case(p=0.3)
    tensors = make(case, torch.device("cpu"))
    with mock.patch.object(op._LoraLinear, "backward", side_effect=AssertionError), torch.no_grad():
        y = pk.lora_linear(*tensors[:4], 0.5, tensors.bias)
    assert y.grad_fn is None


def _arguments(**changes: object) -> dict[str, object]:
    arguments: dict[str, object] = {
        "x": torch.randn(3, 8),
        "weight": torch.randn(6, 8),
        "lora_a": torch.randn(2, 8),
        "lora_b": torch.randn(6, 2),
    }
    return {**arguments, **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.randn(3, 7)}, r"x must be \(\.\.\., K\) with K = 8"),
        ({"x": torch.tensor(1.0)}, r"x must be \(\.\.\., K\), got a 0-d"),
        ({"x": [1.0]}, "x must be a torch.Tensor, got list"),
        ({"x": torch.ones(3, 8, dtype=torch.int64)}, "x must have one of the dtypes .*got torch.int64"),
        ({"weight": torch.randn(6, 8).bfloat16()}, r"weight must have the dtype of x \(torch.float32\)"),
        ({"weight": torch.randn(8)}, r"weight must be \(N, K\)"),
        ({"lora_a": torch.randn(2, 7)}, r"lora_a must be \(r, K\) = \(2, 8\), got \(2, 7\)"),
        ({"lora_a": torch.randn(0, 8), "lora_b": torch.randn(6, 0)}, "rank r >= 1, got rank 0"),
        ({"lora_a": torch.randn(2, 8).bfloat16()}, "lora_a must have the dtype of x, or float32"),
        ({"lora_b": torch.randn(5, 2)}, r"lora_b must be \(N, r\) = \(6, 2\), got \(5, 2\)"),
        ({"lora_b": torch.randn(6, 2).double()}, "lora_b must have the dtype of lora_a"),
        ({"bias": torch.randn(5)}, r"bias must be \(N,\) = \(6,\), got \(5,\)"),
        ({"bias": torch.randn(6).double()}, "bias must have the dtype of x"),
        ({"weight": torch.randn(6, 8, device="meta")}, r"weight must be on the device of x \(cpu\), got meta"),
        ({"dropout_p": 1.0}, r"dropout_p must be in \[0, 1\), got 1.0"),
        ({"dropout_p": -0.1}, r"dropout_p must be in \[0, 1\), got -0.1"),
        ({"dropout_p": math.nan}, r"dropout_p must be in \[0, 1\), got nan"),
        ({"dropout_p": 0.5, "seed": 1.5}, "seed must be None, a 64-bit int"),
        ({"dropout_p": 0.5, "seed": 2**63}, "seed must be None, a 64-bit int"),
        ({"dropout_p": 0.5, "seed": torch.tensor([1])}, "seed must be a 0-d int64 tensor"),
        ({"scale": torch.ones(2)}, "scale must be a float or a 0-d floating tensor"),
        ({"scale": "1"}, "scale must be a float or a 0-d floating tensor, got str"),
        ({"backend": "cudnn"}, "backend must be one of 'auto', 'torch', 'triton', 'cuda', got 'cudnn'"),
    ],
)
def test_wrong_input_is_named(changes: dict[str, object], message: str) -> None:
    arguments = _arguments(**changes)
    with pytest.raises(ValueError, match=message):
        pk.lora_linear(**arguments)


@pytest.mark.parametrize(
    ("backend", "dtype", "message"),
    [
        ("cuda", torch.float32, "backend 'cuda' cannot run this problem: CUDA kernels run on CUDA tensors"),
        ("triton", torch.float64, "backend 'triton' cannot run this problem: .*float64"),
    ],
)
def test_forced_backend_never_falls_back(backend: str, dtype: torch.dtype, message: str) -> None:
    arguments = {name: tensor.to(dtype) for name, tensor in _arguments().items()}
    with pytest.raises(pk.UnsupportedError, match=message):
        pk.lora_linear(**arguments, backend=backend)
    with pk.use_backend(backend), pytest.raises(pk.UnsupportedError, match=message):
        pk.lora_linear(**arguments)


def test_cpu_runs_on_torch_without_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pk.lora_linear(**_arguments())


def test_eager_calls_bypass_the_operator() -> None:
    with mock.patch.object(op, "_operator", side_effect=AssertionError("dispatched")):
        pk.lora_linear(**_arguments())


@pytest.mark.parametrize("p", [2**-18, 0.1, 0.5, 1 - 2**-17])
def test_dropout_probability_is_quantised(p: float) -> None:
    limit = dropout.threshold(p)
    assert abs(limit / 65536 - p) <= 2**-17 or limit == 65535
    assert dropout.keep_scale(limit) == pytest.approx(1 / (1 - oracle.effective_dropout(p)), rel=0)


def test_mask_refuses_bad_arguments() -> None:
    for arguments in ((0, 2, 3, 1.0), (0, -1, 3, 0.5), ("seed", 2, 3, 0.5), (True, 2, 3, 0.5)):
        with pytest.raises(ValueError):
            pk.lora_linear_dropout_mask(*arguments)
