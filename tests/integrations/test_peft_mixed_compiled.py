"""Mixed batches under torch.compile: a decoder is one graph, which reads the plan of the block that is open."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("peft")
pytest.importorskip("transformers")

import peft_kernels as pk
from tests.integrations.mixed import BASE, NAMES, ROWS, assert_close, inputs, tokens
from tests.integrations.models import lora_layers
from tests.integrations.test_peft_mixed_batch import alone, assert_same, gradients, mixed, pair, weights

pytestmark = pytest.mark.slow


class Graphs(Counter[str]):
    """A backend that runs graphs as they are, and counts them and this package's operators in them."""

    def __call__(self, graph: Any, example: Any) -> Any:
        self["graphs"] += 1
        for module in graph.modules():
            if isinstance(module, torch.fx.GraphModule):
                for node in module.graph.nodes:
                    if node.op == "call_function" and "peft_kernels" in str(node.target):
                        self[str(node.target).removeprefix("peft_kernels.")] += 1
        return torch._dynamo.lookup_backend("aot_eager")(graph, example)


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


def test_a_decoder_is_one_graph_for_batches_of_the_same_adapters() -> None:
    fused, plain, _ = pair()
    graphs = Graphs()
    compiled = torch.compile(fused, backend=graphs, fullgraph=True)

    def run(names: list[str], seed: int) -> tuple[Tensor, dict[str, Tensor]]:
        with pk.mixed_batch(compiled, names):
            logits = compiled(**inputs(fused, seed=seed)).logits
        (logits * weights(logits)).sum().backward()
        return logits.detach(), gradients(fused)

    for seed, shift in enumerate((0, 3, 5)):
        names = NAMES[shift:] + NAMES[:shift]
        assert_same(run(names, seed), alone(plain, names, seed))
    assert graphs == {"graphs": 1, "lora_rows": len(lora_layers(fused))}
    # Fewer adapters are another graph; without a block it is that of the active ones.
    names = ["de", BASE] * 4
    assert_same(run(names, 0), alone(plain, names))
    assert graphs["graphs"] == 2
    plain.set_adapter("en")
    with torch.no_grad():
        assert_close(compiled(tokens()).logits, plain(tokens()).logits)
        with pk.mixed_batch(compiled, names):
            assert_close(compiled(tokens()).logits, plain.eval()(tokens(), adapter_names=names).logits)


@pytest.mark.thorough
@pytest.mark.parametrize("reentrant", [False, True])
def test_compiled_layers_of_a_checkpointed_model(reentrant: bool) -> None:
    """Layers are compiled, and repeated behind the block and another one."""
    fused, plain, _ = pair()
    fused.enable_input_require_grads()
    fused.base_model.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for layer in fused.base_model.model.model.layers:
        layer.self_attn.compile(backend="aot_eager", fullgraph=True)
        layer.mlp.compile(backend="aot_eager", fullgraph=True)
    others = [*NAMES[3:], *NAMES[:3]]
    found = []
    for seed, names in enumerate((NAMES, others)):
        with pk.mixed_batch(fused, names):
            found.append(fused(**inputs(fused, seed=seed)).logits)
    for seed, (logits, names) in enumerate(zip(found, (NAMES, others), strict=True)):
        with pk.mixed_batch(fused, ["ar"] * ROWS):
            (logits * weights(logits)).sum().backward()
        assert_same((logits.detach(), gradients(fused)), alone(plain, names, seed))


@pytest.mark.thorough
def test_checkpointing_in_a_graph() -> None:
    fused, plain, _ = pair()
    fused.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
    fused.base_model.model.disable_input_require_grads()  # which no graph traces
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    with pk.mixed_batch(fused, NAMES):
        logits = compiled(tokens(), use_cache=False).logits
    (logits * weights(logits)).sum().backward()
    assert_same((logits.detach(), gradients(fused)), alone(plain))


@pytest.mark.thorough
def test_groups() -> None:
    fused, plain, _ = pair()
    pk.apply(fused, groups=[("q_proj", "k_proj", "v_proj")])
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    with pk.mixed_batch(fused, NAMES):
        logits = compiled(tokens()).logits
    (logits * weights(logits)).sum().backward()
    assert_same((logits.detach(), gradients(fused)), alone(plain))


@pytest.mark.thorough
def test_dropout_in_a_graph() -> None:
    """Each adapter's own p: rows of ar, which drops nothing, are those without dropout."""
    fused, _, _ = pair(p=0.5)
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    with torch.no_grad(), pk.mixed_batch(fused, NAMES):
        first, second = compiled(tokens()).logits, compiled(tokens()).logits
    drops = torch.tensor([name in ("en", "de") for name in NAMES])
    assert (first != second).flatten(1).any(1).equal(drops)
    assert_close(first[~drops], mixed(copy.deepcopy(fused).eval())[0][~drops])


def test_names_of_a_compiled_layer() -> None:
    """``adapter_names`` come as constants of the graph."""
    fused, plain, _ = pair()
    layer, theirs = lora_layers(fused)[0], lora_layers(plain)[0]
    x = torch.randn(ROWS, 3, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert_close(compiled(x, adapter_names=NAMES), theirs(x, adapter_names=NAMES))
