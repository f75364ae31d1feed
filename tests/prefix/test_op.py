"""What the prefix attention operator owes beside the contract: other sizes of one graph, autocast, memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import peft_kernels as pk
from benchmarks.memory import peak_bytes
from peft_kernels._core import operator
from peft_kernels.prefix import triton_impl
from peft_kernels.prefix.problem import Inputs, make_problem
from python_ref import compare
from tests.contract import observe
from tests.contract.operators import CPU
from tests.prefix.cases import OPERATOR, Case, make


def _leaves(case: Case) -> tuple[list[Tensor], Tensor | None]:
    tensors = make(case, CPU)
    return [tensor.requires_grad_() for tensor in tensors[:5]], tensors.mask


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

    with OPERATOR.using("torch-fused"):
        eager = call(*leaves)
        expected = torch.autograd.grad(eager.square().sum(), leaves)
        got = torch.compile(call, fullgraph=True, backend="aot_eager")(*leaves)
        compare.assert_bitwise_equal("y", got, eager)
        for gradient, other in zip(torch.autograd.grad(got.square().sum(), leaves), expected, strict=True):
            compare.assert_bitwise_equal("gradient", gradient, other)


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
    """Besides the arguments, y and two numbers a query and head by Triton, one by torch: no joined or cast keys."""
    if backend == "triton" and (reason := triton_impl.IMPLEMENTATION.why_not_environment()):
        pytest.skip(reason)
    case = Case(b=3, h=4, h_kv=2, s=16, l=16, p=8, d=32, dtype=torch.bfloat16, prefix_dtype=prefix_dtype)
    leaves, _ = _leaves(case)
    device = CPU if not torch.cuda.is_available() or backend == "torch" else torch.device("cuda")
    leaves = [leaf.detach().to(device).requires_grad_() for leaf in leaves]
    with observe.saved(leaves) as (added, _):
        y = pk.prefix_attention(*leaves, causal=True, backend=backend)
    rows = case.b * case.h * case.s
    numbers = 1 if backend == "torch" else 2
    assert sum(added.values()) == y.untyped_storage().nbytes() + numbers * 4 * rows


def test_nothing_is_as_large_as_the_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither pass allocates B H S (P + L) elements, nor a batch row's S (P + L): blocks bound what is alive."""
    case = Case(b=2, h=2, h_kv=1, s=1024, l=1024, p=64, d=16)
    leaves, _ = _leaves(case)
    # A mode is shown other operations than those of a call that nobody watches.
    monkeypatch.setattr(operator, "why_not_opaque", lambda call: None)
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


def test_too_many_rows_are_refused_by_triton() -> None:
    if reason := triton_impl.IMPLEMENTATION.why_not_environment():
        pytest.skip(reason)
    one = torch.empty(1, 1, 1, 8, dtype=torch.bfloat16)
    q, k, prefix = one.expand(1, 8, 2**28, 8), one.expand(1, 1, 4, 8), one[0].expand(1, 2, 8)
    assert "below 2^31" in triton_impl.why_not(make_problem(Inputs(q, k, k, prefix, prefix, True, 1.0, None)))


def test_the_interpreter_is_not_in_auto() -> None:
    problem = make_problem(Inputs(*make(Case(), CPU)[:5], True, 1.0, None))
    assert "for tests" in triton_impl.IMPLEMENTATION.why_not_auto(problem)
