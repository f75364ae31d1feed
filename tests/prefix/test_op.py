"""The operator: autograd, torch.library, compile, checkpointing, autocast, saved memory, wrong input."""

from __future__ import annotations

import warnings
from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import peft_kernels as pk
from benchmarks.memory import peak_bytes
from peft_kernels.prefix import op, triton_impl
from peft_kernels.prefix.problem import describe
from python_ref import compare
from tests.prefix.cases import Case, make, output_gradient, variant

CPU = torch.device("cpu")


def _leaves(case: Case) -> tuple[list[Tensor], Tensor | None]:
    tensors = make(case, CPU)
    return [tensor.requires_grad_() for tensor in tensors[:5]], tensors.mask


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("causal", "p"), [(False, 2), (True, 2), (True, 0)])
def test_gradcheck(causal: bool, p: int, shared: bool) -> None:
    """With more queries than keys, so that without a prefix some queries attend to nothing."""
    case = Case(s=4, l=3, p=p, d=2, dtype=torch.float64, shared=shared, padding="random")
    leaves, mask = _leaves(case)

    def call(*tensors: Tensor) -> Tensor:
        return pk.prefix_attention(*tensors, causal=causal, scale=0.6, key_padding_mask=mask)

    assert torch.autograd.gradcheck(call, leaves)


def test_second_derivative_is_refused() -> None:
    leaves, _ = _leaves(Case(s=2, l=2, d=4))
    dy = torch.randn(2, 4, 2, 4)
    (dq,) = torch.autograd.grad(pk.prefix_attention(*leaves), leaves[:1], dy.requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dq.sum().backward()


@pytest.mark.parametrize("padding", ["none", "random"])
@pytest.mark.parametrize("shared", [False, True])
def test_opcheck(shared: bool, padding: str) -> None:
    case = Case(s=3, l=4, p=2, d=4, shared=shared, padding=padding)
    leaves, mask = _leaves(case)
    options = (True, 0.5, mask, "torch")
    torch.library.opcheck(torch.ops.peft_kernels.prefix_attention.default, (*leaves, *options))
    detached = [leaf.detach() for leaf in leaves]
    y, stats = torch.ops.peft_kernels.prefix_attention(*detached, *options)
    arguments = (output_gradient(case, CPU), *detached, True, 0.5, mask, y, stats, [True, False, True, True, False])
    torch.library.opcheck(torch.ops.peft_kernels.prefix_attention_backward.default, (*arguments, "torch"))


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("padding", ["none", "random"])
def test_compile_without_graph_break(compiler: str, padding: str) -> None:
    torch._dynamo.reset()
    case = Case(s=6, l=7, p=3, d=8, dtype=torch.bfloat16, prefix_dtype=torch.float32, padding=padding)
    leaves, mask = _leaves(case)
    dy = output_gradient(case, CPU)

    def call(q: Tensor, *rest: Tensor) -> Tensor:
        return pk.prefix_attention(q * 2, *rest, causal=True, key_padding_mask=mask).relu()

    eager = call(*leaves)
    expected = torch.autograd.grad(eager, leaves, dy)
    compiled = torch.compile(call, fullgraph=True, backend=compiler)
    got = compiled(*leaves)
    torch.testing.assert_close(got, eager)
    torch.testing.assert_close(torch.autograd.grad(got, leaves, dy), expected)


def test_one_graph_serves_other_sizes() -> None:
    """Batch, queries and keys are symbols of the compiled graph; what the forward pass keeps follows from them."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()

    def call(*tensors: Tensor) -> Tensor:
        return pk.prefix_attention(*tensors, causal=True)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
    # All sizes of the first call differ, because equal ones become one symbol.
    for b, s, length in ((5, 6, 7), (3, 8, 9), (4, 3, 12)):
        leaves, _ = _leaves(Case(b=b, s=s, l=length, p=3, d=8))
        eager, got = call(*leaves), compiled(*leaves)
        compare.assert_bitwise_equal("y", got, eager)
        expected = torch.autograd.grad(eager.sum(), leaves)
        for gradient, other in zip(torch.autograd.grad(got.sum(), leaves), expected, strict=True):
            compare.assert_bitwise_equal("gradient", gradient, other)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_compiled_fused_passes() -> None:
    """The registered operator runs below autograd, and its fused backward pass needs autograd all the same."""
    torch._dynamo.reset()
    leaves, mask = _leaves(Case(s=6, l=7, p=3, d=8, padding="random"))

    def call(*tensors: Tensor) -> Tensor:
        return pk.prefix_attention(*tensors, causal=True, key_padding_mask=mask)

    with variant("torch-fused"):
        eager = call(*leaves)
        expected = torch.autograd.grad(eager.square().sum(), leaves)
        got = torch.compile(call, fullgraph=True, backend="aot_eager")(*leaves)
        compare.assert_bitwise_equal("y", got, eager)
        for gradient, other in zip(torch.autograd.grad(got.square().sum(), leaves), expected, strict=True):
            compare.assert_bitwise_equal("gradient", gradient, other)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_backward_pass_is_the_forward_pass_s_backend_s(backend: str, compiled: bool) -> None:
    """A context that ends before the backward pass does not change it: what is saved is one backend's."""
    if reason := triton_impl.IMPLEMENTATION.why_not_environment():
        pytest.skip(reason)
    torch._dynamo.reset()
    leaves, _ = _leaves(Case(s=6, l=7, p=3, d=16))
    other = {"torch": "triton", "triton": "torch"}[backend]
    refusal = mock.Mock(side_effect=AssertionError(other))
    refusing = tuple(
        replace(one, forward=refusal, backward=refusal) if one.name == other else one for one in op.IMPLEMENTATIONS
    )

    def call(*tensors: Tensor) -> Tensor:
        return pk.prefix_attention(*tensors, causal=True)

    expected = torch.autograd.grad(call(*leaves).sum(), leaves)
    with mock.patch.object(op, "IMPLEMENTATIONS", refusing):
        with pk.use_backend(backend):
            y = (torch.compile(call, fullgraph=True, backend="aot_eager") if compiled else call)(*leaves)
        with pk.use_backend(other):
            got = torch.autograd.grad(y.sum(), leaves)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(use_reentrant: bool) -> None:
    """PEFT's prefix, a cache that layers append to, cannot be checkpointed; an argument can."""
    leaves, mask = _leaves(Case(s=6, l=6, d=8, padding="left"))

    def call(*tensors: Tensor) -> Tensor:
        return pk.prefix_attention(*tensors, causal=True, key_padding_mask=mask)

    expected = torch.autograd.grad(call(*leaves).square().sum(), leaves)
    checkpoint(call, *leaves, use_reentrant=use_reentrant).square().sum().backward()
    for leaf, gradient in zip(leaves, expected, strict=True):
        compare.assert_bitwise_equal("gradient", leaf.grad, gradient)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gives_attention_s_dtype(dtype: torch.dtype) -> None:
    leaves, _ = _leaves(Case(h=2, s=6, l=6, d=8))
    q, k, v, prefix_k, prefix_v = leaves
    with torch.autocast("cpu", dtype):
        y = pk.prefix_attention(*leaves, causal=True)
        assert y.dtype == F.scaled_dot_product_attention(q, k, v).dtype == dtype
        assert pk.prefix_attention(*(leaf.double() for leaf in leaves)).dtype == torch.float64
        y.float().sum().backward()
    assert {leaf.grad.dtype for leaf in leaves} == {torch.float32}
    half = [tensor.detach().to(dtype) for tensor in (q, k, v)]
    direct = pk.prefix_attention(*half, prefix_k.detach(), prefix_v.detach(), causal=True)
    compare.assert_bitwise_equal("y", y.detach(), direct)


class _Allocations(TorchDispatchMode):
    """Sizes in elements of every tensor that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


@pytest.mark.parametrize("prefix_dtype", [None, torch.float32])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_saved_bytes(backend: str, prefix_dtype: torch.dtype | None) -> None:
    """Besides the arguments Triton keeps y and two numbers a query, torch nothing: no joined or cast keys."""
    if backend == "triton" and (reason := triton_impl.IMPLEMENTATION.why_not_environment()):
        pytest.skip(reason)
    case = Case(b=3, h=4, h_kv=2, s=16, l=16, p=8, d=16, dtype=torch.bfloat16, prefix_dtype=prefix_dtype)
    leaves, _ = _leaves(case)
    device = CPU if not torch.cuda.is_available() or backend == "torch" else torch.device("cuda")
    leaves = [leaf.detach().to(device).requires_grad_() for leaf in leaves]
    known = {leaf.untyped_storage().data_ptr() for leaf in leaves}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = pk.prefix_attention(*leaves, causal=True, backend=backend)
    rows = case.b * case.h * case.s
    assert sum(saved.values()) == (0 if backend == "torch" else y.untyped_storage().nbytes() + 2 * 4 * rows)


def test_nothing_is_as_large_as_the_scores() -> None:
    """Neither pass allocates B H S (P + L) elements, nor a batch row's S (P + L): blocks bound what is alive."""
    case = Case(b=2, h=2, h_kv=1, s=1024, l=1024, p=64, d=16)
    leaves, _ = _leaves(case)
    with _Allocations() as forward:
        y = pk.prefix_attention(*leaves, causal=True, backend="torch")
    with _Allocations() as backward:
        torch.autograd.grad(y, leaves, torch.ones_like(y))
    assert max(forward.largest, backward.largest) <= 1 << 18 < case.s * (case.p + case.l)


@pytest.mark.cpu_only
def test_peak_memory_is_results_and_blocks() -> None:
    """Beyond results and joined keys, what is alive at once is a few blocks of scores, not all 17 MiB of them."""
    case = Case(b=2, h=2, h_kv=1, s=1024, l=1024, p=64, d=16)
    leaves, _ = _leaves(case)
    ones = torch.ones_like(leaves[0])
    q, keys = leaves[0].nbytes, case.b * case.h_kv * (case.p + case.l) * case.d * 4

    def forward() -> Tensor:
        return pk.prefix_attention(*leaves, causal=True, backend="torch")

    held: list[Tensor] = []
    block = 4 << 18
    forward()
    # y; keys and values, joined; the mask of a range as bool and as float32, which is half a block.
    assert peak_bytes(forward, CPU) <= q + 2 * keys + block
    backward = peak_bytes(lambda: torch.autograd.grad(held, leaves, ones), CPU, before=lambda: held.append(forward()))
    # y, dq, dk, dv and the prefix's; of one batch row keys, values and their gradients; p, dz and what makes them.
    assert backward <= 2 * q + 4 * keys + 2 * keys + 4 * block < 4 * case.b * case.h * case.s * (case.p + case.l)


def test_inference_saves_nothing() -> None:
    leaves, _ = _leaves(Case(s=6, l=6, d=8))
    with torch.no_grad():
        y = pk.prefix_attention(*leaves)
    assert y.grad_fn is None


def _arguments(**changes: object) -> dict[str, object]:
    arguments: dict[str, object] = {
        "q": torch.randn(2, 4, 3, 8),
        "k": torch.randn(2, 2, 5, 8),
        "v": torch.randn(2, 2, 5, 8),
        "prefix_k": torch.randn(2, 6, 8),
        "prefix_v": torch.randn(2, 6, 8),
    }
    return {**arguments, **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": [1.0]}, "q must be a torch.Tensor, got list"),
        ({"q": torch.randn(4, 3, 8)}, r"q must be \(B, H, S, D\), got a tensor of shape \(4, 3, 8\)"),
        ({"q": torch.ones(2, 4, 3, 8, dtype=torch.int64)}, "q must have one of the dtypes .*got torch.int64"),
        ({"k": torch.randn(2, 2, 5)}, r"k must be \(B, H_kv, L, D\)"),
        ({"k": torch.randn(2, 2, 5, 7)}, r"k must be \(B, H_kv, L, D\) = \(2, 2, 5, 8\), got \(2, 2, 5, 7\)"),
        ({"k": torch.randn(1, 2, 5, 8)}, r"k must be \(B, H_kv, L, D\) = \(2, 2, 5, 8\), got \(1, 2, 5, 8\)"),
        ({"k": torch.randn(2, 3, 5, 8)}, "v must be"),
        ({"k": torch.randn(2, 3, 5, 8), "v": torch.randn(2, 3, 5, 8)}, "H_kv, k's heads, must divide H = 4.*got 3"),
        ({"k": torch.randn(2, 0, 5, 8), "v": torch.randn(2, 0, 5, 8)}, "must divide H = 4.*got 0"),
        ({"v": torch.randn(2, 2, 4, 8)}, r"v must be \(B, H_kv, L, D\) = \(2, 2, 5, 8\), got \(2, 2, 4, 8\)"),
        ({"v": torch.randn(2, 2, 5, 8).bfloat16()}, r"v must have the dtype of q \(torch.float32\)"),
        ({"k": torch.randn(2, 2, 5, 8, device="meta")}, r"k must be on the device of q \(cpu\), got meta"),
        ({"prefix_k": torch.randn(6, 8)}, r"prefix_k must be \(H_kv, P, D\) or \(B, H_kv, P, D\)"),
        ({"prefix_k": torch.randn(4, 6, 8)}, r"prefix_k must be \(H_kv, P, D\) = \(2, 6, 8\), got \(4, 6, 8\)"),
        ({"prefix_k": torch.randn(1, 2, 6, 8)}, r"prefix_k must be \(B, H_kv, P, D\) = \(2, 2, 6, 8\)"),
        ({"prefix_v": torch.randn(2, 5, 8)}, r"prefix_v must be \(H_kv, P, D\) = \(2, 6, 8\), got \(2, 5, 8\)"),
        ({"prefix_k": torch.randn(2, 6, 8).bfloat16()}, "prefix_k must have the dtype of q, or float32"),
        ({"prefix_v": torch.randn(2, 6, 8).double()}, "prefix_v must have the dtype of prefix_k"),
        (
            {"key_padding_mask": torch.ones(2, 5)},
            "key_padding_mask must be torch.bool, True = attend, got torch.float32",
        ),
        (
            {"key_padding_mask": torch.ones(2, 11, dtype=torch.bool)},
            r"key_padding_mask must be \(B, L\) = \(2, 5\), got \(2, 11\)",
        ),
        ({"key_padding_mask": [True]}, "key_padding_mask must be a torch.Tensor, got list"),
        ({"causal": 1}, "causal must be a bool, got 1"),
        ({"scale": "1"}, "scale must be a float or None, got str"),
        ({"scale": torch.tensor(1.0)}, "scale must be a float or None, got Tensor"),
        ({"backend": "cudnn"}, "backend must be one of 'auto', 'torch', 'triton', 'cuda', got 'cudnn'"),
    ],
)
def test_wrong_input_is_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pk.prefix_attention(**_arguments(**changes))


@pytest.mark.parametrize(
    ("backend", "changes", "message"),
    [
        ("cuda", {}, "there is no 'cuda' implementation"),
        ("triton", {"dtype": torch.float64}, "backend 'triton' cannot run this problem: .*float64"),
        ("triton", {"d": 257}, "at most 256 dimensions, got 257"),
    ],
)
def test_forced_backend_never_falls_back(backend: str, changes: dict[str, object], message: str) -> None:
    if backend == "triton" and (reason := triton_impl.IMPLEMENTATION.why_not_environment()):
        pytest.skip(reason)
    tensors = make(Case(s=2, l=2, **{"d": 8, **changes}), CPU)[:5]
    with pytest.raises(pk.UnsupportedError, match=message):
        pk.prefix_attention(*tensors, backend=backend)
    with pk.use_backend(backend), pytest.raises(pk.UnsupportedError, match=message):
        pk.prefix_attention(*tensors)


def test_too_many_rows_are_refused_by_triton() -> None:
    if reason := triton_impl.IMPLEMENTATION.why_not_environment():
        pytest.skip(reason)
    meta = {"device": "meta", "dtype": torch.bfloat16}
    q, k, prefix = torch.empty(1, 8, 2**28, 8, **meta), torch.empty(1, 1, 4, 8, **meta), torch.empty(1, 2, 8, **meta)
    assert "less than 2^31" in triton_impl.why_not(describe(q, k, k, prefix, prefix, True, None, None))


def test_cpu_runs_on_torch_without_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pk.prefix_attention(**_arguments())


def test_eager_calls_bypass_the_operator() -> None:
    with mock.patch.object(op, "_operator", side_effect=AssertionError("dispatched")):
        pk.prefix_attention(**_arguments())


def test_no_architecture_is_verified_unless_it_was() -> None:
    """`auto` takes Triton only where tests and benchmarks ran; whoever adds an architecture has run them there."""
    problem = describe(*_arguments().values(), True, None, None)
    assert "for tests" in triton_impl.why_not_auto(problem)
