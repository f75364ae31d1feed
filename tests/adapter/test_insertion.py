"""Adapters in transformer blocks: every placement against the equations, on torch's own block and on a tiny BERT."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import peft_kernels as pk
from peft_kernels.adapter.insertion import SUBLAYERS
from tests.adapter.modules import COPIES, KINDS, H, R, equation, with_random_parameters

# Each of two sublayers may have no adapter, one after it or one beside it.
PLACEMENTS = [pair for pair in itertools.product((None, "serial", "parallel"), repeat=2) if any(pair)]


def _adapters(placement: tuple[str | None, str | None]) -> dict[str, nn.Module]:
    names = zip(("attention", "feed_forward"), placement, strict=True)
    return {name: with_random_parameters(KINDS[kind](H, R, "gelu", scale=0.5)) for name, kind in names if kind}


def _after(adapters: dict[str, nn.Module], name: str, x: Tensor, output: Tensor) -> Tensor:
    """What the equations make of a sublayer's input and output."""
    adapter = adapters.get(name)
    if adapter is None:
        return output
    return equation(adapter, output if isinstance(adapter, pk.SerialAdapter) else x, output)


def _encoder_layer(norm_first: bool, training: bool) -> nn.TransformerEncoderLayer:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(H, 4, 48, dropout=0.3, batch_first=True, norm_first=norm_first)
    return layer.train(training)


def _expected_encoder_layer(
    layer: nn.TransformerEncoderLayer, adapters: dict[str, nn.Module], x: Tensor, mask: Tensor | None
) -> Tensor:
    """The layer's equations without its forward, from its submodules' own; dropout draws in the same order."""

    def attention(x: Tensor) -> Tensor:
        out = layer.self_attn(x, x, x, key_padding_mask=mask, need_weights=False)[0]
        return _after(adapters, "attention", x, layer.dropout1(out))

    def feed_forward(x: Tensor) -> Tensor:
        hidden = layer.dropout(layer.activation(layer.linear1(x)))
        return _after(adapters, "feed_forward", x, layer.dropout2(layer.linear2(hidden)))

    if layer.norm_first:
        x = x + attention(layer.norm1(x))
        return x + feed_forward(layer.norm2(x))
    x = layer.norm1(x + attention(x))
    return layer.norm2(x + feed_forward(x))


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_encoder_layer_is_its_equations(
    placement: tuple[str | None, str | None], norm_first: bool, training: bool, masked: bool
) -> None:
    layer, x = _encoder_layer(norm_first, training), torch.randn(2, 7, H)
    mask = torch.arange(7).expand(2, 7) >= torch.tensor([[7], [4]]) if masked else None
    adapters = _adapters(placement)
    torch.manual_seed(1)
    expected = _expected_encoder_layer(layer, adapters, x, mask)
    pk.insert_adapters(layer, adapters)
    torch.manual_seed(1)
    torch.testing.assert_close(layer(x, src_key_padding_mask=mask), expected)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_encoder_layer_leaves_its_fast_path(placement: tuple[str | None, str | None]) -> None:
    """In evaluation without gradients a layer otherwise runs in one fused call, which knows no adapters."""
    layer, x = _encoder_layer(False, False), torch.randn(2, 7, H)
    adapters = _adapters(placement)
    with torch.no_grad():
        plain = layer(x)
        expected = _expected_encoder_layer(layer, adapters, x, None)
        remove = pk.insert_adapters(layer, adapters)
        torch.testing.assert_close(layer(x), expected)
        assert not torch.allclose(expected, plain)
        remove()
        assert torch.equal(layer(x), plain)
    assert not hasattr(layer, "adapters")


def test_encoder_says_how_to_avoid_nested_tensors() -> None:
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    encoder = nn.TransformerEncoder(_encoder_layer(False, False), 2).eval()
    removes = [pk.insert_adapters(layer, _adapters(("serial", "parallel"))) for layer in encoder.layers]
    x = torch.randn(2, 5, H)
    with torch.no_grad():
        with pytest.raises(ValueError, match="use_nested_tensor = False"):
            encoder(x, src_key_padding_mask=mask)
        encoder.use_nested_tensor = False
        got = encoder(x, src_key_padding_mask=mask)
    expected = x
    # The equations run the layer's hooked submodules, so that the hooks have to go first.
    for layer, remove in zip(encoder.layers, removes, strict=True):
        adapters = dict(layer.adapters)
        remove()
        expected = _expected_encoder_layer(layer, adapters, expected, mask)
    torch.testing.assert_close(got, expected)


def _bert(**options: object) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=H, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, **options
    )
    return transformers.BertModel(config, add_pooling_layer=False)


def _expected_bert_layer(layer: nn.Module, adapters: dict[str, nn.Module], x: Tensor) -> Tensor:
    out = layer.attention.output
    attended = out.dropout(out.dense(layer.attention.self(x)[0]))
    x = out.LayerNorm(x + _after(adapters, "attention", x, attended))
    made = layer.output.dropout(layer.output.dense(layer.intermediate(x)))
    return layer.output.LayerNorm(x + _after(adapters, "feed_forward", x, made))


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize(("training", "chunk"), [(False, 0), (False, 3), (True, 0)])
def test_bert_is_its_equations(placement: tuple[str | None, str | None], training: bool, chunk: int) -> None:
    """A tiny random BERT from its config; chunks are transformers' own way to walk the feed-forward layer in parts."""
    bert = _bert(chunk_size_feed_forward=chunk).train(training)
    tokens = torch.randint(0, 50, (2, 9))
    adapters = [_adapters(placement) for _ in bert.encoder.layer]
    torch.manual_seed(1)
    expected = bert.embeddings(tokens)
    for layer, ours in zip(bert.encoder.layer, adapters, strict=True):
        expected = _expected_bert_layer(layer, ours, expected)
    names = set(bert.state_dict())
    for layer, ours in zip(bert.encoder.layer, adapters, strict=True):
        pk.insert_adapters(layer, ours)
    torch.manual_seed(1)
    torch.testing.assert_close(bert(tokens).last_hidden_state, expected)
    added = set(bert.state_dict()) - names
    assert names < set(bert.state_dict())
    assert all(name.startswith("encoder.layer.") and ".adapters." in name for name in added)


def test_bert_trains_its_adapters_alone() -> None:
    bert = _bert().train().requires_grad_(False)
    for layer in bert.encoder.layer:
        pk.insert_adapters(layer, {"attention": pk.SerialAdapter(H, R), "feed_forward": pk.ParallelAdapter(H, R)})
    bert.gradient_checkpointing_enable()
    bert(torch.randint(0, 50, (2, 9))).last_hidden_state.square().sum().backward()
    trained = {name for name, parameter in bert.named_parameters() if parameter.grad is not None}
    assert trained == {name for name, _ in bert.named_parameters() if ".adapters." in name}


@pytest.mark.parametrize("copied", COPIES)
def test_copied_block_has_adapters_of_its_own(copied: Callable[[nn.Module], nn.Module]) -> None:
    layer, x = _encoder_layer(False, False), torch.randn(2, 7, H)
    pk.insert_adapters(layer, _adapters(("serial", "parallel")))
    again, expected = copied(layer), layer(x)
    assert torch.equal(again(x), expected)
    for parameter in again.adapters.parameters():
        nn.init.zeros_(parameter)
    assert not torch.allclose(again(x), expected)
    assert torch.equal(layer(x), expected)


def test_compiled_block() -> None:
    torch._dynamo.reset()
    layer, x = _encoder_layer(True, False), torch.randn(2, 7, H)
    pk.insert_adapters(layer, _adapters(("serial", "parallel")))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_block(use_reentrant: bool) -> None:
    layer, x = _encoder_layer(False, True), torch.randn(2, 7, H, requires_grad=True)
    pk.insert_adapters(layer, _adapters(("parallel", "parallel")))
    torch.manual_seed(1)
    layer(x).square().sum().backward()
    leaves = [x, *layer.parameters()]
    expected = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    torch.manual_seed(1)
    checkpoint(layer, x, use_reentrant=use_reentrant).square().sum().backward()
    for leaf, gradient in zip(leaves, expected, strict=True):
        torch.testing.assert_close(leaf.grad, gradient)


def test_threads_that_share_a_block() -> None:
    """Each stands between the source's and the target's hook while the other goes through."""
    block = _encoder_layer(False, False)
    pk.insert_adapters(block, _adapters((None, "parallel")))
    inputs = torch.randn(2, 1, 3, H)
    with torch.no_grad():
        expected = [block(x) for x in inputs]
    inside = threading.Barrier(2, timeout=60)
    block.linear2.register_forward_pre_hook(lambda module, args: inside.wait() * 0 or None)
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(torch.no_grad()(lambda x: block(x)), inputs))
    for got, want in zip(results, expected, strict=True):
        assert torch.equal(got, want)


def test_a_lora_layer_stays_off_the_fast_path_without_adapters() -> None:
    block, x = _encoder_layer(False, False), torch.randn(2, 5, H)
    remove = pk.insert_adapters(block, _adapters(("serial", None)))
    block.linear1 = pk.FusedLoRALinear.from_linear(block.linear1, r=R)
    nn.init.normal_(block.linear1.lora_B["default"])
    remove()
    want = block(x)
    with torch.no_grad():
        torch.testing.assert_close(block(x), want)


class _Block(nn.Module):
    """A block that no table knows."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(H, 5), nn.Linear(5, H)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def test_any_block_with_its_paths() -> None:
    block = _Block()
    adapters = {"all": with_random_parameters(pk.ParallelAdapter(H, R))}
    x = torch.randn(3, H)
    expected = equation(adapters["all"], x, block(x))
    pk.insert_adapters(block, adapters, {"all": ("first", "second")})
    torch.testing.assert_close(block(x), expected)


def test_inserted_adapters_take_the_block_s_mode() -> None:
    layer = _encoder_layer(False, False)
    adapters = _adapters(("serial", None))
    pk.insert_adapters(layer, adapters)
    assert not adapters["attention"].training


def test_known_blocks_have_their_paths() -> None:
    for block in (_encoder_layer(False, False), _bert().encoder.layer[0]):
        for sublayer in SUBLAYERS[type(block).__name__].values():
            for path in sublayer:
                block.get_submodule(path)


@pytest.mark.parametrize(
    ("block", "adapters", "sublayers", "message"),
    [
        (nn.Linear(H, H), {}, None, "block must be one of TransformerEncoderLayer, BertLayer unless .*got Linear"),
        (_encoder_layer(False, False), {"mlp": pk.SerialAdapter(H, R)}, None, "must be named after attention, .*'mlp'"),
        (_encoder_layer(False, False), {"attention": nn.Linear(H, H)}, None, "must be a SerialAdapter .*got Linear"),
        (_Block(), {"a": pk.SerialAdapter(H, R)}, {"a": ("first", "last")}, "_Block has no submodules .*'last'"),
        (nn.Sequential(), {}, {}, "block must be a module that calls its submodules by name, got Seq"),
        (None, {}, {}, "block must be a module that calls its submodules by name, got NoneType"),
        (_Block(), {"a": pk.SerialAdapter(H, R)}, {"a": ("first",)}, r"a sublayer must be a tuple .*got \('first',\)"),
        (_Block(), {"a": pk.SerialAdapter(H, R)}, {"a": "first"}, "a sublayer must be a tuple .*got 'first'"),
        *(
            (_Block(), {name: pk.ParallelAdapter(H, R)}, {name: ("first", "second")}, f"name must be .*got '{name}'")
            for name in ("", "a.b", "keys", "train", "training", "_modules")
        ),
    ],
)
def test_wrong_insertion_is_named(block, adapters, sublayers, message) -> None:
    with pytest.raises(ValueError, match=f"insert_adapters: .*{message}"):
        pk.insert_adapters(block, adapters, sublayers)
    if block is None:
        return
    assert not hasattr(block, "adapters")
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in block.modules())


def test_second_insertion_is_refused() -> None:
    layer = _encoder_layer(False, False)
    pk.insert_adapters(layer, _adapters(("serial", None)))
    with pytest.raises(ValueError, match="TransformerEncoderLayer has an attribute 'adapters' already"):
        pk.insert_adapters(layer, _adapters((None, "serial")))


def test_wrong_order_of_paths_is_seen() -> None:
    block = _Block()
    pk.insert_adapters(block, {"a": pk.ParallelAdapter(5, R)}, {"a": ("second", "first")})
    with pytest.raises(RuntimeError, match="target ran before its source"):
        block(torch.randn(3, H))
