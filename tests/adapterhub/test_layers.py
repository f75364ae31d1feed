"""AdapterHub's models after apply: logits and gradients equal AdapterHub's, and all of it is fused."""

from __future__ import annotations

import pytest

pytest.importorskip("adapters", reason="AdapterHub needs an older transformers; `make test-adapterhub` runs these")

import copy
from collections.abc import Callable

import adapters
import torch
from adapters.composition import Average, BatchSplit, Fuse, Parallel, Split, Stack
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd

import peft_kernels as pk
from peft_kernels.integrations.adapterhub import layers
from peft_kernels.integrations.adapterhub.activations import ACTIVATIONS
from peft_kernels.integrations.adapterhub.layers import FusedAdapter, FusedParallelAdapter
from python_ref import compare
from tests.adapterhub.models import ARCHITECTURES, HIDDEN, KINDS, activate, build, randomize, run, tokens
from tests.adapterhub.parity import adapters_of, assert_close, assert_same, pair

_DRAWS = 12


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_architectures(architecture: str, kind: str) -> None:
    fused, plain, report = pair(architecture, kind)
    assert len(report.fused) == (4 if kind == "double" else 2) and not report.fallbacks
    assert {type(module) for module in adapters_of(fused)} == {
        FusedParallelAdapter if kind == "parallel" else FusedAdapter
    }
    assert_same(fused, plain)
    assert not report.fallback_calls


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name: str) -> None:
    fused, plain, report = pair("bert", "double", non_linearity=name)
    assert not report.fallbacks
    assert {layers.activation_of(adapter) for adapter in adapters_of(fused)} == {ACTIVATIONS[name]}
    assert_same(fused, plain)
    assert not report.fallback_calls


@pytest.mark.parametrize(
    "options",
    [
        {"scaling": 0.5},
        {"scaling": 4.0, "kind": "double"},
        {"scaling": 0.25, "kind": "parallel"},
        {"reduction_factor": 0.5},
        {"reduction_factor": 1000},
        {"reduction_factor": {"1": 2, "default": 8}, "kind": "parallel"},
        {"original_ln_before": False},
        {"original_ln_after": False, "residual_before_ln": False},
        {"original_ln_after": False, "kind": "parallel"},
        {"residual_before_ln": False},
        {"residual_before_ln": "post_add"},
        {"adapter_residual_before_ln": True},
        {"init_weights": "mam_adapter"},
        {"init_weights": "houlsby"},
        {"mh_adapter": True, "output_adapter": False, "kind": "parallel"},
        {"leave_out": [0]},
        {"dropout": 0.5},
    ],
    ids=str,
)
def test_options(options: dict[str, object]) -> None:
    fused, plain, report = pair(**options)
    assert report.fused and not report.fallbacks
    assert_same(fused, plain)
    assert not report.fallback_calls


SETUPS = {
    "stack": Stack("a", "b"),
    "parallel": Parallel("a", "b"),
    "batch": BatchSplit("a", "b", batch_sizes=[1, 3]),
    "average": Average("a", "b", weights=[0.3, 0.7]),
    "split": Split("a", "b", splits=[3, 4]),
    "fuse": Fuse("a", "b"),
    "fuse in a stack": Stack("c", Fuse("a", "b")),
    "stacks in a fuse": Fuse(Stack("c", "a"), "b"),
    "stack in parallel": Parallel(Stack("a", "c"), "b"),
    "stack in a batch": BatchSplit(Stack("a", "c"), "b", batch_sizes=[3, 1]),
}


def _recorded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor | None]]:
    """x and residual of every call of the operation from here on."""
    calls = []
    operation = layers.bottleneck_adapter

    def record(x: Tensor, *args: object, **kwargs: object) -> Tensor:
        calls.append((x, kwargs["residual"]))
        return operation(x, *args, **kwargs)

    monkeypatch.setattr(layers, "bottleneck_adapter", record)
    return calls


class TestComposition:
    @pytest.mark.parametrize("setup", SETUPS.values(), ids=SETUPS)
    @pytest.mark.parametrize(("architecture", "kind"), [("bert", "seq"), ("bert", "double"), ("llama", "double")])
    def test_blocks(self, architecture: str, kind: str, setup: object) -> None:
        fused, plain, report = pair(architecture, kind, "abc", scaling=0.5)
        assert len(report.fused) == 3 * (4 if kind == "double" else 2)
        for model in (fused, plain):
            activate(model, setup)
        assert_same(fused, plain)
        assert not report.fallback_calls

    @pytest.mark.parametrize("name", [name for name, setup in SETUPS.items() if type(setup) is not Parallel])
    def test_blocks_of_parallel_adapters(self, name: str) -> None:
        fused, plain, report = pair("bert", "parallel", "abc")
        for model in (fused, plain):
            activate(model, SETUPS[name])
        assert_same(fused, plain)
        assert not report.fallback_calls

    @pytest.mark.parametrize(("setup", "calls"), [("parallel", 4), ("batch", 4), ("average", 4), ("fuse", 8)])
    def test_up_is_made_for_fuse_alone(self, setup: str, calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
        fused, _, _ = pair("bert", "seq", "ab")
        activate(fused, SETUPS[setup])
        made = []
        operation = layers.bottleneck_adapter
        monkeypatch.setattr(
            layers,
            "bottleneck_adapter",
            lambda *args, **kwargs: made.append(1) or operation(*args, **kwargs),
        )
        run(fused)
        assert len(made) == calls

    @pytest.mark.parametrize("names", ["ab", "ba"])
    @pytest.mark.parametrize("block", [Parallel, lambda *n: BatchSplit(*n, batch_sizes=[2, 2]), Fuse, Average])
    def test_one_of_two_falls_back(self, block: Callable[..., object], names: str) -> None:
        plain = build("bert", "double", "a")
        plain.add_adapter("b", config=adapters.DoubleSeqBnConfig(reduction_factor=8, ln_after=True))
        randomize(plain)
        activate(plain, block(*names))
        fused = copy.deepcopy(plain)
        report = pk.apply(fused)
        assert len(report.fused) == len(report.fallbacks) == 4
        assert_same(fused, plain)

    @pytest.mark.parametrize("kind", ["seq", "parallel"])
    def test_fusion_attentions(self, kind: str) -> None:
        fused, plain, _ = pair("bert", kind, "ab")
        for model in (fused, plain):
            activate(model, Fuse("a", "b"))
        got, expected = (
            model(tokens(), output_adapter_fusion_attentions=True).adapter_fusion_attentions["a,b"]
            for model in (fused, plain)
        )
        for layer in expected:
            assert_close("attentions", *(torch.from_numpy(a[layer]["output_adapter"]) for a in (got, expected)))

    def test_what_adapterhub_refuses_is_refused(self) -> None:
        """Its parallel adapter in its Parallel block: batches of two sizes."""
        for model in pair("bert", "parallel", "ab")[:2]:
            activate(model, Parallel("a", "b"))
            with pytest.raises(RuntimeError, match="must match the size of tensor b"):
                run(model)


@pytest.mark.parametrize(("kind", "residual"), [("double", "x"), ("seq", "other"), ("parallel", "none")])
def test_residual_of_the_operation(kind: str, residual: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where x is the residual it is handed over as such, to be read once."""
    fused, _, _ = pair("bert", kind)
    made = _recorded(monkeypatch)
    run(fused)
    assert {"none" if r is None else "x" if r is x else "other" for x, r in made} == {residual}


@pytest.mark.parametrize("kind", KINDS)
def test_direct_call(kind: str) -> None:
    """All three results, down and up read after the call, with their gradients."""
    fused, plain, report = pair("bert", kind, scaling=0.5)
    results = []
    for model in (fused, plain):
        adapter, generator = adapters_of(model)[0], torch.Generator().manual_seed(0)
        x, residual = (torch.randn(2, 3, HIDDEN, generator=generator).requires_grad_() for _ in range(2))
        outputs = adapter(x, residual)
        assert len(outputs) == 3
        sum((output * output).sum() for output in outputs).backward()
        results.append([*(1.0 * output for output in outputs), x.grad, adapter.adapter_up.weight.grad])
    for index, (got, expected) in enumerate(zip(*results, strict=True)):
        assert_close(str(index), got, expected)
    assert not report.fallback_calls


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision(kind: str, dtype: torch.dtype) -> None:
    """As close to a float64 run as AdapterHub is, by the error budget; errors of a model scatter, so several."""
    draws = []
    for seed in range(_DRAWS):
        plain = build("bert", kind, seed=seed).to(dtype)
        exact, fused = copy.deepcopy(plain).double(), copy.deepcopy(plain)
        report = pk.apply(fused)
        draws.append([run(model)[0] for model in (fused, plain, exact)])
        assert not report.fallback_calls
    compare.assert_close("logits", *(torch.stack(logits) for logits in zip(*draws, strict=True)))


@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind: str) -> None:
    draws = []
    for seed in range(_DRAWS):
        fused, plain, report = pair("bert", kind, seed=seed)
        exact = run(copy.deepcopy(plain).double())[0]
        with torch.autocast("cpu", torch.bfloat16):
            (ours, gradients), (theirs, expected) = run(fused), run(plain)
        assert {name: g.dtype for name, g in gradients.items()} == {name: g.dtype for name, g in expected.items()}
        assert not report.fallback_calls
        draws.append([ours, theirs, exact])
    compare.assert_close("logits", *(torch.stack(logits) for logits in zip(*draws, strict=True)))


@pytest.mark.parametrize("kind", KINDS)
def test_compiled(kind: str) -> None:
    fused, plain, _ = pair("bert", kind)
    x = torch.randn(2, 3, HIDDEN)
    compiled = torch.compile(adapters_of(fused)[0], backend="aot_eager", fullgraph=True)
    for got, expected in zip(compiled(x, x), adapters_of(plain)[0](x, x), strict=True):
        assert isinstance(got, Tensor)
        assert_close("output", got, expected)


@pytest.mark.parametrize(("setup", "count"), [("a", 2), (Fuse("a", "b"), 4)], ids=str)
def test_compiled_model(setup: object, count: int) -> None:
    """One graph, from which the compiler drops the results that nobody reads."""
    fused, plain, _ = pair("bert", "seq", "ab")
    for model in (fused, plain):
        activate(model, setup)
    operations: list[int] = []

    def compiler(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        targets = [node.target for node in graph.graph.nodes]
        operations.append(targets.count(torch.ops.peft_kernels.bottleneck_adapter.default))
        return make_boxed_func(graph.forward)

    compiled = torch.compile(fused, backend=aot_autograd(fw_compiler=compiler), fullgraph=True)
    assert_close("logits", compiled(input_ids=tokens()).logits, plain(input_ids=tokens()).logits)
    assert operations == [count]
