"""PrefixEncoder: layout, reparametrization, folding, what modules must survive, and wrong use."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import peft_kernels as pk
from peft_kernels import PrefixEncoder
from python_ref import compare

LAYERS, HEADS, D, P = 3, 2, 4, 5


def _encoder(reparam: int | None = None, seed: int = 0, **options: object) -> PrefixEncoder:
    torch.manual_seed(seed)
    return PrefixEncoder(LAYERS, HEADS, D, P, reparam, **options)


def _flat(encoder: PrefixEncoder) -> list[Tensor]:
    return [tensor.detach() for pair in encoder() for tensor in pair]


@pytest.mark.parametrize("reparam", [None, 7])
def test_forward_gives_each_layer_its_keys_and_values(reparam: int | None) -> None:
    encoder = _encoder(reparam)
    pairs = encoder()
    assert len(pairs) == LAYERS
    rows = encoder.embedding
    if reparam is not None:
        first, _, second = encoder.mlp
        rows = second(torch.tanh(first(rows)))
    table = rows.view(P, LAYERS, 2, HEADS, D)
    for layer, pair in enumerate(pairs):
        for which, tensor in enumerate(pair):
            assert tensor.shape == (HEADS, P, D)
            assert torch.equal(tensor, table[:, layer, which].transpose(0, 1))


def test_layout_is_peft_s() -> None:
    """PEFT's table is viewed (P, 2 * layers, heads, D) and layer i takes 2 i as keys and 2 i + 1 as values."""
    peft = pytest.importorskip("peft")
    config = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=P, token_dim=HEADS * D, num_layers=LAYERS, num_attention_heads=HEADS
    )
    theirs = peft.PrefixEncoder(config)
    ours = _encoder()
    with torch.no_grad():
        ours.embedding.copy_(theirs.embedding.weight)
    past = theirs(torch.arange(P)[None]).view(1, P, 2 * LAYERS, HEADS, D).permute(2, 0, 3, 1, 4)
    for layer, (prefix_k, prefix_v) in enumerate(ours()):
        assert torch.equal(prefix_k, past[2 * layer, 0])
        assert torch.equal(prefix_v, past[2 * layer + 1, 0])


@pytest.mark.parametrize("reparam", [None, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_folded_prefixes_have_the_same_bits(dtype: torch.dtype, reparam: int | None) -> None:
    encoder = _encoder(reparam, dtype=dtype).eval()
    folded = encoder.fold()
    assert folded.mlp is None and folded.reparam_hidden is None and not folded.training
    assert [name for name, _ in folded.named_parameters()] == ["embedding"]
    for before, after in zip(_flat(encoder), _flat(folded), strict=True):
        compare.assert_bitwise_equal("prefix", after, before)
    with torch.no_grad():
        folded.embedding.zero_()
    assert any(tensor.any() for tensor in _flat(encoder)), "folding copies"


def test_every_parameter_is_trained_through_the_attention() -> None:
    encoder = _encoder(7)
    torch.manual_seed(1)
    q, k, v = torch.randn(2, 4, 6, D), torch.randn(2, HEADS, 6, D), torch.randn(2, HEADS, 6, D)
    loss = sum(pk.prefix_attention(q, k, v, *pair, causal=True).square().sum() for pair in encoder())
    loss.backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


def test_training_fits_a_target() -> None:
    """A few steps of Adam lower the loss by half: gradients point where they should."""
    encoder = _encoder(7)
    torch.manual_seed(1)
    q, k, v = torch.randn(2, 4, 6, D), torch.randn(2, HEADS, 6, D), torch.randn(2, HEADS, 6, D)
    target = torch.randn(2, 4, 6, D) * 0.5
    optimizer = torch.optim.Adam(encoder.parameters(), lr=0.05)
    losses = []
    for _ in range(40):
        loss = (pk.prefix_attention(q, k, v, *encoder()[0], causal=True) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("reparam", [None, 7])
def test_copies_and_files(reparam: int | None) -> None:
    encoder = _encoder(reparam)
    file = io.BytesIO()
    torch.save(encoder.state_dict(), file)
    file.seek(0)
    loaded = _encoder(reparam, seed=1)
    loaded.load_state_dict(torch.load(file))
    for other in (copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder)), loaded):
        for before, after in zip(_flat(encoder), _flat(other), strict=True):
            compare.assert_bitwise_equal("prefix", after, before)


def test_to_moves_the_dtype() -> None:
    assert {tensor.dtype for tensor in _flat(_encoder(7).to(torch.bfloat16))} == {torch.bfloat16}


def test_no_prefix() -> None:
    encoder = PrefixEncoder(LAYERS, HEADS, D, 0)
    q = k = torch.randn(1, HEADS, 3, D)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, k)
    torch.testing.assert_close(pk.prefix_attention(q, k, k, *encoder()[0]), expected)


def test_compile_without_graph_break() -> None:
    torch._dynamo.reset()
    encoder = _encoder(7)
    q = torch.randn(1, HEADS, 3, D)

    def call(q: Tensor) -> Tensor:
        return pk.prefix_attention(q, q, q, *encoder()[1], causal=True)

    torch.testing.assert_close(torch.compile(call, fullgraph=True, backend="aot_eager")(q), call(q))


@pytest.mark.parametrize("reparam", [None, 7])
def test_meta_construction(reparam: int | None) -> None:
    with torch.device("meta"):
        encoder = _encoder(reparam)
    encoder.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.fill_(torch.nan)
    encoder.reset_parameters()
    assert all(parameter.isfinite().all() and parameter.std() > 0 for parameter in encoder.parameters())


def test_default_device_plays_no_part() -> None:
    encoder = _encoder(7)
    with torch.device("meta"):
        folded = encoder.fold()
        assert folded()[0][0].device.type == encoder()[0][0].device.type == "cpu"


def test_repr_names_the_sizes() -> None:
    text = repr(_encoder(7))
    assert "num_layers=3, num_kv_heads=2, head_dim=4, prefix_length=5, reparam_hidden=7" in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 0}, "num_layers must be an int of at least 1, got 0"),
        ({"num_kv_heads": -1}, "num_kv_heads must be an int of at least 1, got -1"),
        ({"head_dim": 1.5}, "head_dim must be an int of at least 1, got 1.5"),
        ({"prefix_length": -1}, "prefix_length must be an int of at least 0, got -1"),
        ({"reparam_hidden": 0}, "reparam_hidden must be an int of at least 1, got 0"),
        ({"prefix_length": True}, "prefix_length must be an int of at least 0, got True"),
        ({"num_layers": "1"}, "num_layers must be an int of at least 1, got '1'"),
        ({"dtype": torch.int8}, "dtype must be one of torch.float32, .*, got torch.int8"),
    ],
)
def test_wrong_use_is_named(changes: dict[str, object], message: str) -> None:
    sizes = {"num_layers": 1, "num_kv_heads": 1, "head_dim": 1, "prefix_length": 1}
    with pytest.raises(ValueError, match=message):
        PrefixEncoder(**{**sizes, **changes})


@pytest.mark.parametrize("reparam_hidden", [None, 6])
@pytest.mark.parametrize("length", [0, 3])
def test_prefixes_may_be_changed_in_place(length: int, reparam_hidden: int | None) -> None:
    encoder = PrefixEncoder(2, 2, 4, length, reparam_hidden)

    def gradient(change: Callable[[Tensor], Tensor]) -> Tensor:
        encoder.zero_grad()
        sum(change(piece).square().sum() for layer in encoder() for piece in layer).backward()
        return encoder.embedding.grad.clone()

    expected = gradient(lambda piece: piece * 3)
    assert torch.equal(gradient(lambda piece: piece.mul_(3)), expected) and (length == 0 or expected.any())
