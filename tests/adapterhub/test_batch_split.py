"""BatchSplit after apply: one operation for all adapters of a block, with AdapterHub's states, logits and gradients."""

from __future__ import annotations

import pytest

pytest.importorskip("adapters", reason="AdapterHub needs an older transformers; `make test-adapterhub` runs these")

import copy
import pickle
from collections.abc import Callable, Iterator

import adapters
import torch
from adapters.composition import Average, BatchSplit, Parallel, Split, Stack
from adapters.methods.bottleneck import BottleneckLayer, BottleneckState
from torch import Tensor, nn

import peft_kernels as pk
from peft_kernels.integrations.adapterhub import batch_split
from tests.adapterhub.models import HIDDEN, KINDS, activate, build, randomize, run, tokens
from tests.adapterhub.parity import adapters_of, assert_close, assert_same, pair

# Two orders of the same float64 sums through two layers, in parts of a tensor's largest value.
CLOSE = 1e-12


def _assert_near(name: str, got: Tensor, expected: Tensor) -> None:
    largest = float(expected.detach().abs().max())
    torch.testing.assert_close(got, expected, rtol=0, atol=CLOSE * largest, msg=lambda text: f"{name}: {text}")


def _layers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, BottleneckLayer) and module.adapters]


@pytest.fixture(autouse=True)
def forced() -> Iterator[None]:
    """On a CPU the operation runs where a backend is forced."""
    with pk.use_backend("torch"):
        yield


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The ranks of each call of the operation."""
    calls: list[tuple[int, ...]] = []
    operation = batch_split.bottleneck_adapter

    def record(*args: object, **kwargs: object) -> Tensor:
        calls.append(kwargs["ranks"])
        return operation(*args, **kwargs)

    monkeypatch.setattr(batch_split, "bottleneck_adapter", record)
    return calls


@pytest.mark.parametrize("sizes", [[1, 2, 1], [2, 0, 2], [0, 4, 0]], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_parity(architecture: str, kind: str, sizes: list[int], made: list[tuple[int, ...]]) -> None:
    """In float64, gradients too: an adapter without rows has zeros, as AdapterHub's."""
    fused, plain, report = pair(architecture, kind, "abc", scaling=0.5)
    for model in (fused, plain):
        activate(model.double(), BatchSplit("a", "b", "c", batch_sizes=sizes))
    assert_same(fused, plain, _assert_near)
    assert made == [(8, 5, 3)] * (4 if kind == "double" else 2)
    assert not report.fallback_calls


@pytest.mark.parametrize(
    "options",
    [
        {"original_ln_before": False},
        {"original_ln_after": False, "residual_before_ln": False},
        {"residual_before_ln": "post_add"},
        {"adapter_residual_before_ln": True},
        {"non_linearity": "gelu"},
        {"scaling": 4.0},
    ],
    ids=str,
)
def test_options(options: dict[str, object], made: list[tuple[int, ...]]) -> None:
    fused, plain, report = pair("bert", "seq", "ab", **options)
    for model in (fused, plain):
        activate(model.double(), BatchSplit("a", "b", batch_sizes=[3, 1]))
    assert_same(fused, plain, _assert_near)
    assert len(made) == 2 and not report.fallback_calls


@pytest.mark.parametrize("is_serial", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_state(kind: str, is_serial: bool) -> None:
    """All that a block hands on: joined states, inputs as they were, the last adapter's name; up when it is read."""
    setup, states = BatchSplit("a", "b", batch_sizes=[1, 2]), []
    for model in pair("bert", kind, "ab", scaling=0.5)[:2]:
        layer, generator = _layers(model.double())[-1], torch.Generator().manual_seed(0)
        x, beside = (torch.randn(3, 5, HIDDEN, generator=generator, dtype=torch.float64) for _ in range(2))
        beside = x if is_serial else beside
        layer_norm = model.bert.encoder.layer[1].output.LayerNorm
        states.append(layer.compose_batch_split(setup, BottleneckState(x, beside, beside, layer_norm)))
    got, expected = states
    assert got.last == expected.last == "b" and got.layer_norm is not None
    for name in ("hidden_states", "input_tensor", "adapter_residual", "bottleneck_up"):
        _assert_near(name, 1.0 * getattr(got, name), 1.0 * getattr(expected, name))


@pytest.mark.parametrize("kind", KINDS)
def test_training(kind: str) -> None:
    """Each adapter on its part of the batch, as each alone."""
    fused, plain, report = pair("bert", kind, "abc", scaling=0.5)
    histories = []
    for model in (fused, plain):
        activate(model, BatchSplit("a", "b", "c", batch_sizes=[1, 2, 1]))
        model.train()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
        losses = []
        for step in range(3):
            ids = tokens(seed=step)
            optimizer.zero_grad()
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        histories.append([torch.stack(losses), *(p.detach() for p in model.parameters())])
    assert histories[0][0][2] < histories[0][0][0]
    for index, (got, expected) in enumerate(zip(*histories, strict=True)):
        assert_close(str(index), got, expected)
    assert not report.fallback_calls


def test_after_inference_mode() -> None:
    """A plan that was first made in it serves a backward pass."""
    fused, plain, _ = pair("bert", "seq", "ab")
    for model in (fused, plain):
        activate(model, BatchSplit("a", "b", batch_sizes=[3, 1]))
    batch_split._plan.cache_clear()
    with torch.inference_mode():
        fused(tokens())
    assert_same(fused, plain)


NESTED = {
    "in a stack": (Stack("c", BatchSplit("a", "b", batch_sizes=[1, 3])), 2),
    "in parallel": (Parallel(BatchSplit("a", "b", batch_sizes=[1, 3]), "c"), 2),
    "in an average": (Average(BatchSplit("a", "b", batch_sizes=[1, 3]), "c"), 2),
    "in a split": (Split(BatchSplit("a", "b", batch_sizes=[1, 3]), "c", splits=[3, 4]), 2),
    "in itself": (BatchSplit(BatchSplit("a", "b", batch_sizes=[1, 1]), "c", batch_sizes=[2, 2]), 2),
}


@pytest.mark.parametrize("name", NESTED)
def test_nested(name: str, made: list[tuple[int, ...]]) -> None:
    setup, calls = NESTED[name]
    fused, plain, _ = pair("bert", "seq", "abc")
    for model in (fused, plain):
        activate(model, setup)
    assert_same(fused, plain)
    assert made == [(8, 5)] * calls


def _other_activation(model: nn.Module) -> None:
    model.add_adapter("b", config=adapters.SeqBnConfig(reduction_factor=8, non_linearity="gelu"))


def _other_placement(model: nn.Module) -> None:
    model.add_adapter("b", config=adapters.SeqBnConfig(reduction_factor=8, ln_after=True))


@pytest.mark.parametrize(
    ("add", "reason", "count"),
    [
        (_other_activation, "BatchSplit's adapters are Adapter of gelu, Adapter of relu, so each runs by itself", 2),
        (_other_placement, "of an adapter of BatchSplit's it has a layer norm of its own, so each adapter runs", 2),
    ],
)
def test_unlike_adapters(
    add: Callable[[nn.Module], None], reason: str, count: int, made: list[tuple[int, ...]]
) -> None:
    plain = build("bert", "seq", "a")
    add(plain)
    randomize(plain)
    activate(plain, BatchSplit("a", "b", batch_sizes=[3, 1]))
    fused = copy.deepcopy(plain)
    report = pk.apply(fused)
    assert_same(fused, plain)
    ((found, times),) = report.fallback_calls.items()
    assert found.startswith(reason) and times == count and len(made) == 2 - count


def test_an_adapter_that_a_layer_does_not_have(made: list[tuple[int, ...]]) -> None:
    """AdapterHub hands its rows on, behind a block that has made up; elsewhere it fails by itself."""
    plain = build("bert", "seq", "ac")
    plain.add_adapter("b", config=adapters.SeqBnConfig(reduction_factor=8, leave_out=[0]))
    randomize(plain)
    activate(plain, Stack("c", BatchSplit("a", "b", batch_sizes=[3, 1])))
    fused = copy.deepcopy(plain)
    report = pk.apply(fused)
    assert_same(fused, plain)
    assert report.fallback_calls == {"the layer has no b of BatchSplit's, so each adapter runs by itself": 1}
    assert len(made) == 1


def test_an_adapter_that_came_later(made: list[tuple[int, ...]]) -> None:
    fused, _, report = pair("bert", "seq", "a")
    fused.add_adapter("b", config=adapters.SeqBnConfig(reduction_factor=8))
    activate(fused, BatchSplit("a", "b", batch_sizes=[3, 1]))
    run(fused)
    assert list(report.fallback_calls) == [
        "of an adapter of BatchSplit's apply has not seen it, so each adapter runs by itself"
    ]
    pk.apply(fused)
    run(fused)
    assert len(made) == 2


def test_dropout_is_each_adapter_s_own_reason(made: list[tuple[int, ...]]) -> None:
    fused, _, report = pair("bert", "seq", "ab", dropout=0.5)
    activate(fused, BatchSplit("a", "b", batch_sizes=[3, 1]))
    run(fused.train())
    assert report.fallback_calls == {"its dropout is active": 4} and not made


@pytest.mark.parametrize("step", ["compose_single", "vslice", "pad_and_concat"])
def test_steps_that_another_tool_replaced(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fused, plain, report = pair("bert", "seq", "ab")
    for model in (fused, plain):
        activate(model, BatchSplit("a", "b", batch_sizes=[3, 1]))
    own = getattr(BottleneckLayer, step)

    def other(*args: object, **kwargs: object) -> BottleneckState:
        state = own(*args, **kwargs)
        return state._replace(hidden_states=2 * state.hidden_states)

    monkeypatch.setattr(BottleneckLayer, step, other)
    assert_same(fused, plain)
    rest = "was replaced, so each adapter of BatchSplit's runs by itself"
    assert report.fallback_calls == {f"{step} {rest}": 2} or set(report.fallback_calls) == {
        f"BottleneckLayer.{step} {rest}"
    }


def test_what_adapterhub_refuses_is_refused() -> None:
    for model in pair("bert", "seq", "ab")[:2]:
        activate(model, BatchSplit("a", "b", batch_sizes=[3, 2]))
        with pytest.raises(IndexError, match="not equal to the sum of batch_sizes"):
            run(model)


def test_layers_are_swapped_and_not_reported() -> None:
    model = build("bert", "seq", "ab")
    classes = [type(layer) for layer in _layers(model)]
    report = pk.apply(model)
    assert all("adapters." in name for name in report.fused) and len(report.fused) == 4
    assert all(isinstance(layer, batch_split.FusedBatchSplit) for layer in _layers(model))
    assert [layer._get_name() for layer in _layers(model)] == [cls.__name__ for cls in classes]
    assert all(isinstance(layer, batch_split.FusedBatchSplit) for layer in _layers(copy.deepcopy(model)))
    assert [type(pickle.loads(pickle.dumps(layer))) for layer in _layers(model)] == classes
    pk.revert(model)
    assert [type(layer) for layer in _layers(model)] == classes


def test_on_a_cpu_each_adapter_runs_by_itself(made: list[tuple[int, ...]]) -> None:
    fused, plain, report = pair("bert", "seq", "ab")
    for model in (fused, plain):
        activate(model, BatchSplit("a", "b", batch_sizes=[3, 1]))
    with pk.use_backend("auto"):
        assert_same(fused, plain)
    assert not made and not report.fallback_calls


def test_compiled() -> None:
    """An operation for each adapter, in one graph."""
    fused, plain, _ = pair("bert", "seq", "ab")
    for model in (fused, plain):
        activate(model, BatchSplit("a", "b", batch_sizes=[3, 1]))
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    assert_close("logits", compiled(input_ids=tokens()).logits, plain(input_ids=tokens()).logits)
    assert len(adapters_of(fused)) == 4
