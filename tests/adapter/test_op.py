"""The operator: autograd, torch.library, compile, checkpointing, autocast, saved memory, wrong input."""

from __future__ import annotations

import contextlib
import doctest
import importlib
import warnings
from collections.abc import Callable

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import peft_kernels as pk
from peft_kernels.adapter.kernels.activations import ACTIVATIONS
from python_ref import adapter as oracle
from python_ref import compare
from tests.adapter.cases import RESIDUALS, Case, Tensors, arguments, make, output_gradient

CPU = torch.device("cpu")


def _leaves(case: Case) -> Tensors:
    return Tensors(*(None if tensor is None else tensor.requires_grad_() for tensor in make(case, CPU)))


def _some(tensors: Tensors) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor is not None]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("residual", ["none", "x", "tensor"])
def test_gradcheck(activation: str, residual: str) -> None:
    case = Case(m=6, n=4, k=5, r=3, dtype=torch.float64, residual=residual, activation=activation)
    leaves = _leaves(case)

    def call(*some: Tensor) -> Tensor:
        rest = iter(some)
        given = Tensors(*(None if leaf is None else next(rest) for leaf in leaves))
        # gradcheck perturbs x in place, so that x as the residual must be the tensor that it passes.
        return pk.bottleneck_adapter(**arguments(case, given._replace(x=given.x.view(2, 3, 5).view(6, 5))))

    assert torch.autograd.gradcheck(call, _some(leaves))


def test_second_derivative_is_refused() -> None:
    case = Case(m=3, dtype=torch.float64)
    leaves, dy = _leaves(case), torch.randn(3, 40, dtype=torch.float64, requires_grad=True)
    (dx,) = torch.autograd.grad(pk.bottleneck_adapter(**arguments(case, leaves)), leaves.x, dy, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("tensor_scale", [False, True])
def test_opcheck(residual: str, tensor_scale: bool) -> None:
    case = Case(m=6, r=3, residual=residual, dtype=torch.bfloat16 if residual == "wide" else torch.float32)
    leaves, serial = _leaves(case), residual == "x"
    kind = (serial, "silu", 0.5, torch.tensor(0.5) if tensor_scale else None)
    torch.library.opcheck(torch.ops.peft_kernels.bottleneck_adapter.default, (*leaves, *kind, "torch"))
    x, down_weight, up_weight = (leaf.detach() for leaf in leaves[:3])
    z, dy = torch.randn(6, 3), output_gradient(case, CPU)
    for needs in ([True] * 5, [True, False, True, False, False]):
        torch.library.opcheck(
            torch.ops.peft_kernels.bottleneck_adapter_backward.default,
            (dy, x, down_weight, up_weight, z, *kind, needs, "torch"),
        )


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("residual", RESIDUALS)
def test_compile_without_graph_break(compiler: str, residual: str) -> None:
    torch._dynamo.reset()
    case = Case(residual=residual, activation="gelu", dtype=torch.bfloat16 if residual == "wide" else torch.float32)
    leaves, dy = _leaves(case), output_gradient(case, CPU)

    def call(*given: Tensor | None) -> Tensor:
        tensors = Tensors(*given)
        return pk.bottleneck_adapter(**arguments(case, tensors._replace(x=tensors.x * 2))).sin()

    eager = call(*leaves)
    expected = torch.autograd.grad(eager, _some(leaves), dy)
    got = torch.compile(call, fullgraph=True, backend=compiler)(*leaves)
    torch.testing.assert_close(got, eager)
    torch.testing.assert_close(torch.autograd.grad(got, _some(leaves), dy), expected)


def test_compiled_serial_call_reads_x_once() -> None:
    """Identity of x and the residual is seen while tracing, also where autocast has nothing to cast."""
    torch._dynamo.reset()
    serial = []

    def record(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        nodes = [node for node in graph.graph.nodes if "bottleneck_adapter" in str(node.target)]
        serial.extend((node.args[5], node.args[6]) for node in nodes)
        return graph.forward

    case = Case(dtype=torch.bfloat16)
    given = arguments(case, make(case, CPU))
    with torch.autocast("cpu", torch.bfloat16):
        torch.compile(lambda: pk.bottleneck_adapter(**given), fullgraph=True, backend=record)()
    assert serial == [(None, True)]


def test_scale_value_does_not_recompile() -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    x, down, up = torch.randn(4, 8), torch.randn(2, 8), torch.randn(8, 2)

    def call(scale: Tensor) -> Tensor:
        return pk.bottleneck_adapter(x, down, up, residual=x, scale=scale)

    compiled = torch.compile(call, fullgraph=True, backend=counter)
    for value in (0.5, 2.0, 3.0):
        torch.testing.assert_close(compiled(torch.tensor(value)), call(torch.tensor(value)))
    assert counter.frame_count == 1


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("residual", ["x", "tensor"])
def test_checkpointing(use_reentrant: bool, residual: str) -> None:
    case = Case(residual=residual, activation="silu")
    leaves = _leaves(case)

    def call(*given: Tensor | None) -> Tensor:
        return pk.bottleneck_adapter(**arguments(case, Tensors(*given)))

    y = call(*leaves)
    expected = torch.autograd.grad(y.square().sum(), _some(leaves))
    again = checkpoint(call, *leaves, use_reentrant=use_reentrant)
    compare.assert_bitwise_equal("y", again.detach(), y.detach())
    again.square().sum().backward()  # reentrant checkpointing knows no autograd.grad
    for tensor, gradient in zip(_some(leaves), expected, strict=True):
        compare.assert_bitwise_equal("gradient", tensor.grad, gradient)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("residual", RESIDUALS)
def test_autocast_is_a_sequential_s(dtype: torch.dtype, x_dtype: torch.dtype, residual: str) -> None:
    """Dtypes of the result and of every gradient are those of linear, activation, linear and a sum; so is the error."""
    case = Case(dtype=x_dtype, residual=residual, activation="gelu", adapter_dtype=torch.float32, m=60)
    leaves = _leaves(case)
    given = arguments(case, leaves)

    def sequential() -> Tensor:
        hidden = F.gelu(F.linear(leaves.x, leaves.down_weight, leaves.down_bias))
        branch = F.linear(hidden, leaves.up_weight, leaves.up_bias) * case.scale
        return branch if given["residual"] is None else given["residual"] + branch

    with torch.autocast("cpu", dtype):
        expected, got = sequential(), pk.bottleneck_adapter(**given)
    assert got.dtype == expected.dtype
    dy = torch.randn(got.shape).to(got.dtype)
    double = Tensors(*(None if leaf is None else leaf.detach().double().requires_grad_() for leaf in leaves))
    exact, _ = oracle.forward(**arguments(case, double))
    compare.assert_close("y", got, expected, exact)
    runs = zip(
        *(
            torch.autograd.grad(y, _some(of), dy.to(y.dtype))
            for y, of in ((got, leaves), (expected, leaves), (exact, double))
        ),
        strict=True,
    )
    for ours, theirs, truth in runs:
        assert ours.dtype == theirs.dtype
        # Both are rounded to the lower dtype on their way to float32, where the budget has no room for a rounding.
        assert compare.relative_error(ours, truth) <= 2 * compare.relative_error(theirs, truth)


@contextlib.contextmanager
def _saved(known: list[Tensor]):
    """Bytes by storage of what autograd saves inside beside tensors that exist anyway, and which of those it saves."""
    pointers = {tensor.untyped_storage().data_ptr(): index for index, tensor in enumerate(known)}
    added: dict[int, int] = {}
    kept: set[int] = set()

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() in pointers:
            kept.add(pointers[storage.data_ptr()])
        else:
            added[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield added, kept


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("residual", RESIDUALS)
def test_saved_bytes_are_x_and_z(activation: str, residual: str) -> None:
    """Besides x and weights a call keeps z (M, r) in float32: no h, no cast, no residual, nothing as large as x."""
    case = Case(m=256, n=128, k=128, r=4, dtype=torch.bfloat16, residual=residual, activation=activation)
    leaves = _leaves(case)
    with _saved(list(_some(leaves))) as (added, kept):
        pk.bottleneck_adapter(**arguments(case, leaves))
    assert sum(added.values()) == case.m * case.r * 4
    assert kept == {0, 1, 2}


@pytest.mark.parametrize(
    ("needs", "keeps", "z"),
    [
        ({"x"}, {"down_weight", "up_weight"}, True),
        ({"down_weight"}, {"x", "up_weight"}, True),
        ({"up_weight", "up_bias"}, set(), True),
        ({"residual"}, set(), False),
        (set(), set(), False),
    ],
)
def test_saves_only_what_a_gradient_needs(needs: set[str], keeps: set[str], z: bool) -> None:
    case = Case(m=64, residual="tensor")
    tensors = make(case, CPU)
    leaves = tensors._make(tensor.requires_grad_(name in needs) for name, tensor in tensors._asdict().items())
    with _saved(list(leaves)) as (added, kept):
        y = pk.bottleneck_adapter(**arguments(case, leaves))
    assert {leaves._fields[index] for index in kept} == keeps
    assert sum(added.values()) == (case.m * case.r * 4 if z else 0)
    assert (y.grad_fn is None) == (not needs)


def test_residual_s_gradient_is_not_copied() -> None:
    case = Case(residual="tensor")
    leaves, dy = _leaves(case), output_gradient(case, CPU)
    y = pk.bottleneck_adapter(**arguments(case, leaves))
    (gradient,) = torch.autograd.grad(y, leaves.residual, dy)
    assert gradient.data_ptr() == dy.data_ptr()


def test_equal_but_other_tensor_is_a_parallel_residual() -> None:
    """Identity decides how the residual is read, not values: the gradients are apart."""
    x, down, up = torch.randn(5, 8, requires_grad=True), torch.randn(2, 8), torch.randn(8, 2)
    view = x.view(5, 8)
    y = pk.bottleneck_adapter(x, down, up, residual=view, activation="tanh")
    compare.assert_bitwise_equal("y", y, pk.bottleneck_adapter(x, down, up, residual=x, activation="tanh"))
    dy = torch.randn(5, 8)
    whole, branch, beside = torch.autograd.grad(y, (x, view), dy)[0], None, None
    branch = torch.autograd.grad(pk.bottleneck_adapter(x, down, up, activation="tanh"), x, dy)[0]
    beside = torch.autograd.grad(pk.bottleneck_adapter(x.detach(), down, up, residual=view), view, dy)[0]
    torch.testing.assert_close(whole, branch + dy)
    assert torch.equal(beside, dy)


def _arguments(**changes: object) -> dict[str, object]:
    given: dict[str, object] = {
        "x": torch.randn(3, 8),
        "down_weight": torch.randn(2, 8),
        "up_weight": torch.randn(6, 2),
    }
    return {**given, **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.randn(3, 7)}, r"x must be \(\.\.\., K\) with K = 8"),
        ({"x": torch.tensor(1.0)}, r"x must be \(\.\.\., K\), got a 0-d"),
        ({"x": [1.0]}, "x must be a torch.Tensor, got list"),
        ({"x": torch.ones(3, 8, dtype=torch.int64)}, "x must have one of the dtypes .*got torch.int64"),
        ({"down_weight": torch.randn(8)}, r"down_weight must be \(r, K\)"),
        ({"down_weight": torch.randn(2, 8).bfloat16()}, "down_weight must have the dtype of x, or float32"),
        (
            {"down_weight": torch.randn(0, 8), "up_weight": torch.randn(6, 0)},
            r"down_weight must be \(r, K\) with a bottleneck r >= 1, got r = 0",
        ),
        ({"up_weight": torch.randn(6, 3)}, r"up_weight must be \(N, r\) = \(6, 2\), got \(6, 3\)"),
        ({"up_weight": torch.randn(6, 2).double()}, "up_weight must have the dtype of down_weight"),
        ({"down_bias": torch.randn(3)}, r"down_bias must be \(r,\) = \(2,\), got \(3,\)"),
        ({"down_bias": torch.randn(2).double()}, "down_bias must have the dtype of down_weight"),
        ({"up_bias": torch.randn(5)}, r"up_bias must be \(N,\) = \(6,\), got \(5,\)"),
        ({"up_bias": 1.0}, "up_bias must be a torch.Tensor, got float"),
        ({"residual": torch.randn(3, 8)}, r"residual must be \(\.\.\., N\).* = \(3, 6\), got \(3, 8\)"),
        ({"residual": torch.randn(6)}, r"residual must be \(\.\.\., N\).* = \(3, 6\), got \(6,\)"),
        ({"residual": torch.randn(3, 6).bfloat16()}, "residual must have the dtype of x, or float32"),
        ({"residual": torch.randn(3, 6, device="meta")}, r"residual must be on the device of x \(cpu\), got meta"),
        ({"residual": "x"}, "residual must be a torch.Tensor, got str"),
        ({"up_weight": torch.randn(6, 2, device="meta")}, r"up_weight must be on the device of x \(cpu\), got meta"),
        ({"activation": "swish"}, "activation must be one of relu, gelu, .*, got 'swish'"),
        ({"scale": torch.ones(2)}, "scale must be a float or a 0-d floating tensor"),
        ({"scale": "1"}, "scale must be a float or a 0-d floating tensor, got str"),
        ({"backend": "cudnn"}, "backend must be one of 'auto', 'torch', 'triton', 'cuda', got 'cudnn'"),
    ],
)
def test_wrong_input_is_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"{'' if 'backend' in changes else 'bottleneck_adapter: '}{message}"):
        pk.bottleneck_adapter(**_arguments(**changes))


def test_serial_adapter_needs_one_width() -> None:
    x = torch.randn(3, 8)
    with pytest.raises(ValueError, match=r"residual must be .* = \(3, 6\), got \(3, 8\)"):
        pk.bottleneck_adapter(**_arguments(x=x, residual=x))


@pytest.mark.parametrize(
    ("backend", "dtype", "message"),
    [
        ("cuda", torch.float32, "backend 'cuda' cannot run this problem: "),
        ("triton", torch.float64, "backend 'triton' cannot run this problem: .*float64"),
    ],
)
def test_forced_backend_never_falls_back(backend: str, dtype: torch.dtype, message: str) -> None:
    given = {name: tensor.to(dtype) for name, tensor in _arguments().items()}
    with pytest.raises(pk.UnsupportedError, match=message):
        pk.bottleneck_adapter(**given, backend=backend)
    with pk.use_backend(backend), pytest.raises(pk.UnsupportedError, match=message):
        pk.bottleneck_adapter(**given)


def test_cpu_runs_on_torch_without_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pk.bottleneck_adapter(**_arguments())


@pytest.mark.parametrize("name", ["op", "module", "insertion"])
def test_examples_run(name: str) -> None:
    module = importlib.import_module(f"peft_kernels.adapter.{name}")
    assert doctest.testmod(module).failed == 0
