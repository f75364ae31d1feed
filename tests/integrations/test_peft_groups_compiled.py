"""Groups under torch.compile: one operator of the graph, named before it or observed in a call outside of it."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

import peft_kernels as pk
from tests.integrations.siblings import Attention, assert_close, build, given, inner, outcome
from tests.integrations.test_peft_group_dropout import REGIONS, Checkpointed
from tests.integrations.test_peft_groups import assert_like_peft, build_architecture, run

pytestmark = pytest.mark.slow

P = 0.4


class Graphs(Counter[str]):
    """A backend that runs graphs as they are, and counts this package's operators in them."""

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self["graphs"] += 1
        for module in graph.modules():
            if isinstance(module, torch.fx.GraphModule):
                for node in module.graph.nodes:
                    if node.op == "call_function" and "peft_kernels" in str(node.target):
                        self[str(node.target).removeprefix("peft_kernels.")] += 1
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()
    counters.clear()


HOW: dict[str, dict[str, Any]] = {
    "named": {"groups": [("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")]},
    "observed": {"group": True},
}


@pytest.mark.parametrize("how", HOW)
def test_a_model_is_one_graph(how: str) -> None:
    plain, call = build_architecture("Llama")
    fused = copy.deepcopy(plain)
    pk.apply(fused, **HOW[how])
    if how == "observed":
        call(fused)
    graphs, expected = Graphs(), run(plain, call)
    compiled = torch.compile(fused, backend=graphs, fullgraph=True)
    for _ in range(2):
        assert_like_peft(run(fused, lambda _: call(compiled)), expected)
    assert graphs == {"graphs": 1, "lora_group": 4, "lora_linear": 4}
    with torch.no_grad():
        call(compiled)
    assert graphs["lora_group"] == 8


@pytest.mark.thorough
def test_not_observed_is_each_by_itself() -> None:
    plain, call = build_architecture("Llama")
    fused = copy.deepcopy(plain)
    report = pk.apply(fused, group=True)
    graphs = Graphs()
    compiled = torch.compile(fused, backend=graphs, fullgraph=True)
    assert_like_peft(run(fused, lambda _: call(compiled)), run(plain, call))
    assert graphs == {"graphs": 1, "lora_linear": 14} and not report.groups
    call(fused)
    call(compiled)
    assert graphs["lora_group"] == 4  # what was observed since is traced again


@pytest.mark.thorough
def test_inductor() -> None:
    plain = build()
    fused = copy.deepcopy(plain)
    pk.apply(fused, groups=[("q", "k", "v")])
    compiled = torch.compile(fused, fullgraph=True)
    assert_close(outcome(compiled, fused), outcome(plain, plain))


@pytest.mark.parametrize("p", [pytest.param(0.0, marks=pytest.mark.thorough), P])
@pytest.mark.parametrize("region", ["reentrant", "non-reentrant"])
def test_checkpointing(region: str, p: float) -> None:
    """As without groups, torch breaks the graph at a reentrant region and nowhere else."""
    model = build(Checkpointed, lora_dropout=p)
    found = []
    for options in ({"groups": [("q", "k", "v")]}, {}):
        fused = copy.deepcopy(model)
        pk.apply(fused, **options)
        torch.manual_seed(1)
        expected = outcome(fused, fused)
        inner(fused).region = REGIONS[region]
        graphs = Graphs()
        compiled = torch.compile(fused, backend=graphs)
        torch.manual_seed(1)
        assert_close(outcome(compiled, fused), expected)
        found.append(graphs)
    assert found[0]["graphs"] == found[1]["graphs"]
    if region == "non-reentrant":
        assert found[0] == {"graphs": 1, "lora_group": 2, "lora_linear": 2} if not p else {"graphs": 1, "lora_group": 4}


def _written(between: str) -> Callable[[Any, Tensor], Tensor]:
    def forward(attention: Any, x: Tensor) -> Tensor:
        x = x + 1
        q = attention.q(x)
        if between == "x":
            x.mul_(2)
        elif between == "a view of x":
            x.view(-1)[3:].mul_(2)
        elif between == "another x":
            return q + attention.k(x.flip(0)) + attention.v(x)
        return q + attention.k(x) + attention.v(x)

    return forward


@pytest.mark.thorough
@pytest.mark.parametrize("between", ["x", "a view of x", "another x", "nothing"])
def test_x_written_between_members(between: str) -> None:
    """What is parked for an x that was written is not taken; where torch cannot say so, it breaks the graph."""
    model = build()
    plain = copy.deepcopy(inner(model))
    pk.apply(model, groups=[("q", "k", "v")])
    fused, graphs = inner(model), Graphs()
    for whole in (fused, plain):
        for attention in (whole.first, whole.second):
            attention.forward = partial(_written(between), attention)
    compiled = torch.compile(fused, backend=graphs)
    with torch.no_grad():
        for _ in range(2):
            x = given()
            expected, got = plain(x), compiled(x)
            assert float((got - expected).norm() / expected.norm()) <= 1e-12
    assert graphs["lora_group"] == {"nothing": 2, "another x": 2}.get(between, graphs["lora_group"])


def test_dropout_is_the_same_as_in_eager_mode() -> None:
    model = build(lora_dropout=P)
    pk.apply(model, groups=[("q", "k", "v")])
    fused = inner(model)
    torch.manual_seed(1)
    expected, state = outcome(fused, fused), torch.get_rng_state()
    graphs = Graphs()
    compiled = torch.compile(fused, backend=graphs, fullgraph=True)
    torch.manual_seed(1)
    assert_close(outcome(compiled, fused), expected)
    assert torch.equal(torch.get_rng_state(), state) and graphs == {"graphs": 1, "lora_group": 4}


def test_several_adapters_with_dropout() -> None:
    model = build(Attention, adapters=2, lora_dropout=P)
    pk.apply(model)
    fused = inner(model)
    torch.manual_seed(1)
    expected = outcome(fused, fused)
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    torch.manual_seed(1)
    assert_close(outcome(compiled, fused), expected)


@pytest.mark.parametrize("p", [0.0, P])
def test_a_compiled_parent(p: float) -> None:
    """torch runs hooks of a module that is compiled itself outside of the graph: there each layer computes alone."""
    model = build(Checkpointed, lora_dropout=p)
    plain = copy.deepcopy(model)
    pk.apply(model, groups=[("q", "k", "v")])
    graphs = Graphs()
    inner(model).first.compile(backend=graphs, fullgraph=True)
    if not p:
        assert_close(outcome(model, model), outcome(plain, plain))
    whole = outcome(model, model)
    assert graphs == {"graphs": 1, "lora_linear": 4}
    for region in ("reentrant", "non-reentrant"):
        found = []
        for way in (REGIONS[region], lambda attention, x: attention(x)):
            inner(model).region = way
            torch.manual_seed(2)
            found.append(outcome(model, model))
        assert_close(*found)
    assert whole.keys() == found[0].keys()


def test_a_compiled_layer_in_a_parent_that_is_not() -> None:
    """It sees no call of the parent, and computes alone."""
    plain = build(Attention)
    fused = copy.deepcopy(plain)
    pk.apply(fused, groups=[("q", "k", "v")])
    inner(fused).k.compile(backend="aot_eager", fullgraph=True)
    expected = outcome(plain, plain)
    for _ in range(3):
        assert_close(outcome(fused, fused), expected)
