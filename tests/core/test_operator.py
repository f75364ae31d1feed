"""One declaration makes an operator: schema, fake, autograd, eager and compiled route, with tuples of tensors too."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from peft_kernels._core import checks, dispatch, registration
from peft_kernels._core.errors import UnsupportedError
from peft_kernels._core.operator import Operator


class Inputs(NamedTuple):
    """y_j = scale (x W_j^T + bias_j), for several weights."""

    x: Tensor
    weights: tuple[Tensor, ...]
    biases: tuple[Tensor | None, ...]
    scale: float | Tensor
    negate: bool


class Needs(NamedTuple):
    x: bool
    weights: tuple[bool, ...]
    biases: tuple[bool, ...]


class Problem(NamedTuple):
    m: int
    device: torch.device
    is_empty: bool


def _forward(problem: Problem, call: Inputs, implementation: Any) -> tuple[Tensor, ...]:
    factor = -call.scale if call.negate else call.scale
    products = [torch.nn.functional.linear(call.x, w, b) for w, b in zip(call.weights, call.biases, strict=True)]
    return *(product * factor for product in products), call.x.sum(0)


def _backward(problem: Problem, call: Inputs, kept: Any, dy: Any, needs: Needs, implementation: Any) -> tuple[Any, ...]:
    assert (call.x is None) != any(needs.weights) or problem.m > 0
    factor = -call.scale if call.negate else call.scale
    terms = [(each * factor, w) for each, w in zip(dy, call.weights, strict=True) if each is not None]
    dx = sum(each @ w for each, w in terms) if needs.x else None
    dw = tuple(
        (torch.zeros_like(w) if each is None else (each * factor).t() @ call.x) if need else None
        for need, each, w in zip(needs.weights, dy, call.weights, strict=True)
    )
    db = tuple(
        (b.new_zeros(b.shape) if each is None else (each * factor).sum(0)) if need else None
        for need, each, b in zip(needs.biases, dy, call.biases, strict=True)
    )
    return dx, dw, db


def _results(problem: Problem, call: Inputs, implementation: Any) -> tuple[Tensor, ...]:
    m, k = call.x.shape
    return *(call.x.new_empty(m, w.shape[0]) for w in call.weights), call.x.new_empty(k)


def _composite(problem: Problem, call: Inputs) -> tuple[Tensor, ...]:
    return _forward(problem, call, None)[:-1]


OPERATOR = Operator(
    name="several_linears",
    call=Inputs,
    needs=Needs,
    implementations=(dispatch.Implementation("torch", _forward, _backward),),
    make_problem=lambda call: Problem(call.x.shape[0], call.x.device, call.x.shape[0] == 0),
    forward=_forward,
    backward=_backward,
    results=_results,
    composite=_composite,
    reads=lambda needs: ("weights", "biases", *(("x",) if any(needs.weights) else ())),
    kept=("total",),
    activations=("x",),
    several=True,
)


def _leaves(**kwargs: Any) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((5, 3), (4, 3), (2, 3), (2,))
    return [torch.randn(*s, generator=generator, dtype=torch.float64, **kwargs).requires_grad_() for s in shapes]


def _call(x: Tensor, w0: Tensor, w1: Tensor, b1: Tensor, scale: Any = 0.5) -> tuple[Tensor, ...]:
    return OPERATOR(Inputs(x, (w0, w1), (None, b1), scale, True), None)


def test_gradcheck() -> None:
    assert torch.autograd.gradcheck(_call, _leaves())


@pytest.mark.parametrize("tensor_scale", [False, True])
def test_opcheck(tensor_scale: bool) -> None:
    x, w0, w1, b1 = _leaves()
    scale = torch.tensor(0.5, dtype=torch.float64) if tensor_scale else 0.5
    flat = OPERATOR.signature.flat(Inputs(x, (w0, w1), (None, b1), scale, True))
    torch.library.opcheck(torch.ops.peft_kernels.several_linears.default, (*flat, "torch", 0))
    x, w0, w1, b1 = (leaf.detach() for leaf in (x, w0, w1, b1))
    dy = [torch.randn(5, 4, dtype=torch.float64), None]
    facts, kept = ([5, 3], torch.float64), None
    for given, needs in ((x, [True, True, False, False, True]), (None, [True, False, False, False, False])):
        flat = OPERATOR.signature.flat(Inputs(given, (w0, w1), (None, b1), scale, True))
        torch.library.opcheck(
            torch.ops.peft_kernels.several_linears_backward.default, (dy, *flat, *facts, kept, needs, "torch", 0)
        )


@pytest.mark.parametrize("frozen", [(), (0,), (1, 2), (0, 1, 2), (1, 2, 3)])
@pytest.mark.parametrize("unused", [False, True])
def test_compiled_equals_eager(frozen: tuple[int, ...], unused: bool) -> None:
    torch._dynamo.reset()
    leaves = [leaf.requires_grad_(index not in frozen) for index, leaf in enumerate(_leaves())]
    wanted = [leaf for leaf in leaves if leaf.requires_grad]

    def call(*leaves: Tensor) -> Tensor:
        first, second = _call(leaves[0] * 2, *leaves[1:])
        return second.sum() if unused else (first.sum() + second.square().sum())

    eager, compiled = call(*leaves), torch.compile(call, fullgraph=True, backend="aot_eager")(*leaves)
    assert torch.equal(eager, compiled)
    expected = torch.autograd.grad(eager, wanted, allow_unused=True)
    for gradient, other in zip(torch.autograd.grad(compiled, wanted, allow_unused=True), expected, strict=True):
        assert (gradient is None or not gradient.any()) if other is None else torch.equal(gradient, other)


@pytest.mark.slow
def test_another_state_of_the_sources_is_compiled_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Torch's cache on disk knows nothing of an operator but its name and arguments."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    is_found = []
    for revision in (1, 1, 2):
        monkeypatch.setattr(registration, "_hash_of_sources", lambda revision=revision: revision)
        torch._dynamo.reset()
        counters.clear()
        torch.compile(_call, fullgraph=True)(*_leaves())
        is_found.append(
            bool(counters["aot_autograd"]["autograd_cache_hit"] or counters["inductor"]["fxgraph_cache_hit"])
        )
    assert is_found == [False, True, False]


@pytest.mark.parametrize("compiled", [False, True])
def test_only_what_is_read_is_saved(compiled: bool) -> None:
    torch._dynamo.reset()
    x, w0, w1, b1 = _leaves()
    hidden = x * 2
    storages: set[int] = set()

    def pack(tensor: Tensor) -> Tensor:
        storages.add(tensor.untyped_storage().data_ptr())
        return tensor

    call = torch.compile(_call, fullgraph=True, backend="aot_eager") if compiled else _call
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = call(hidden, w0.detach(), w1.detach(), b1)
    assert hidden.untyped_storage().data_ptr() not in storages
    (dx,) = torch.autograd.grad(y[0].sum() + y[1].sum(), x)
    assert torch.isfinite(dx).all()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(use_reentrant: bool) -> None:
    leaves = _leaves()
    expected = torch.autograd.grad(sum(y.square().sum() for y in _call(*leaves)), leaves)
    sum(y.square().sum() for y in checkpoint(_call, *leaves, use_reentrant=use_reentrant)).backward()
    for leaf, gradient in zip(leaves, expected, strict=True):
        assert torch.equal(leaf.grad, gradient)


def test_transforms_and_batched_gradients() -> None:
    leaves = _leaves()
    assert torch.autograd.gradcheck(_call, leaves, check_forward_ad=True, check_batched_grad=True)
    rows = torch.func.vmap(_call, in_dims=(0, None, None, None))(leaves[0][:, None], *leaves[1:])
    for got, expected in zip(rows, _call(*leaves), strict=True):
        torch.testing.assert_close(got[:, 0], expected)


TABLE = checks.Table(
    "op",
    "x",
    (
        checks.Row("weights", "N K", dtype_of="x"),
        checks.Row("x", "... K", meanings={"K": "weight's in-features"}),
        checks.Row("biases", "H P | B H P", optional=True),
    ),
)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.ones(2, 5)}, r"op: x must be \(\.\.\., K\) with K = 3, weight's in-features, got \(2, 5\)"),
        ({"x": torch.tensor(1.0)}, r"op: x must be \(\.\.\., K\), got a 0-d tensor"),
        ({"x": torch.ones(2, 3).long()}, "op: x must have one of the dtypes .*, got torch.int64"),
        ({"weights": torch.ones(2)}, r"op: weights must be \(N, K\), got a tensor of shape \(2,\)"),
        (
            {"weights": torch.ones(2, 3).half()},
            r"weights must have the dtype of x \(torch.float32\)",
        ),
        ({"biases": torch.ones(2)}, r"biases must be \(H, P\) or \(B, H, P\), got a tensor of shape \(2,\)"),
        ({"biases": 1}, "biases must be a torch.Tensor, got int"),
        ({"x": torch.ones(2, 3).to_sparse()}, "x must be a dense tensor, got a torch.sparse_coo one"),
    ],
)
def test_table_names_what_is_wrong(changes: dict[str, object], message: str) -> None:
    call = Inputs(torch.ones(4, 2, 3), torch.ones(5, 3), None, 1.0, False)  # type: ignore[arg-type]
    assert TABLE.check(call) == {"N": 5, "K": 3, "...": (4, 2)}
    with pytest.raises(ValueError, match=message):
        TABLE.check(call._replace(**changes))


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_table_refuses_nested_tensors_with_a_way_out(layout: torch.layout) -> None:
    nested = torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(1, 3)], layout=layout)
    with pytest.raises(UnsupportedError, match=r"op: x must be a dense tensor, got a nested one; .*to_padded_tensor"):
        TABLE.check(Inputs(nested, torch.ones(5, 3), None, 1.0, False))  # type: ignore[arg-type]
