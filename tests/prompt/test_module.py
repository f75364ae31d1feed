"""PromptEmbedding and PromptEnsemble: initial values, the joined batch, votes, what modules must survive, wrong use."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from peft_kernels.prompt import PromptEmbedding, PromptEnsemble

P, D = 3, 8


def _ensemble(n: int = 3) -> PromptEnsemble:
    torch.manual_seed(0)
    return PromptEnsemble([PromptEmbedding(P, D) for _ in range(n)])


def test_prompt_stands_in_front() -> None:
    prompt, tokens = PromptEmbedding(P, D), torch.randn(2, 5, D)
    y = prompt(tokens)
    assert torch.equal(y[:, :P], prompt.weight.expand(2, -1, -1))
    assert torch.equal(y[:, P:], tokens)
    y.sum().backward()
    assert torch.equal(prompt.weight.grad, torch.full((P, D), 2.0))


def test_float32_prompt_on_half_precision_tokens() -> None:
    prompt = PromptEmbedding(P, D)
    y = prompt(torch.randn(2, 5, D, dtype=torch.bfloat16))
    y.sum().backward()
    assert y.dtype == torch.bfloat16 and prompt.weight.grad.dtype == torch.float32


def test_initial_values() -> None:
    rows = torch.randn(P, D, dtype=torch.float64)
    copied = PromptEmbedding(P, D, rows)
    assert copied.weight.dtype == torch.float64 and torch.equal(copied.weight, rows)
    copied.weight.data.zero_()
    assert rows.all()
    vocabulary = nn.Embedding(11, D)
    drawn = PromptEmbedding(P, D, vocabulary, dtype=torch.bfloat16).weight
    assert drawn.dtype == torch.bfloat16
    for row in drawn:
        assert (vocabulary.weight.bfloat16() == row).all(1).any()


def test_ensemble_is_each_prompt_alone() -> None:
    ensemble, tokens = _ensemble(), torch.randn(2, 5, D)
    y = ensemble(tokens)
    assert torch.equal(y, torch.cat([prompt(tokens) for prompt in ensemble.prompts]))
    (y.unflatten(0, (3, 2)) * torch.arange(3.0)[:, None, None, None]).sum().backward()
    for n, prompt in enumerate(ensemble.prompts):
        assert torch.equal(prompt.weight.grad, torch.full((P, D), 2.0 * n))


@pytest.mark.parametrize(
    ("probabilities", "expected"),
    [
        ([[0.9, 0.1, 0.0], [0.4, 0.6, 0.0], [0.4, 0.6, 0.0]], 1),  # the majority, against the higher mean
        ([[0.5, 0.3, 0.2], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4]], 1),  # one vote each: the highest mean
        ([[0.34, 0.33, 0.33], [0.33, 0.34, 0.33], [0.1, 0.1, 0.8]], 2),
        ([[0.6, 0.4, 0.0], [0.4, 0.6, 0.0], [0.5, 0.4, 0.1]], 0),
    ],
)
def test_vote(probabilities: list[list[float]], expected: int) -> None:
    logits = torch.tensor(probabilities).clamp_min(1e-6).log()
    assert _ensemble().vote(logits).tolist() == [expected]


def test_tie_ignores_classes_without_most_votes() -> None:
    """The class with the highest mean has one vote, two others two each: the better of those two wins."""
    best_mean = [0.0, 0.0, 1.0]
    voters = [[0.50, 0.01, 0.49], [0.50, 0.01, 0.49], [0.01, 0.51, 0.48], [0.01, 0.52, 0.47]]
    logits = torch.tensor([best_mean, *voters]).clamp_min(1e-6).log()
    assert logits.softmax(-1).mean(0).argmax() == 2
    assert _ensemble(5).vote(logits).tolist() == [1]


def test_vote_is_by_row_of_the_batch() -> None:
    ensemble = _ensemble()
    torch.manual_seed(1)
    logits = torch.randn(3 * 7, 4)
    apart = torch.stack([ensemble.vote(logits[b::7])[0] for b in range(7)])
    assert torch.equal(ensemble.vote(logits), apart)
    assert ensemble.vote(torch.empty(0, 4)).shape == (0,)


def test_modules_survive_copies_and_files() -> None:
    ensemble, tokens = _ensemble(), torch.randn(2, 5, D)
    for other in (copy.deepcopy(ensemble), pickle.loads(pickle.dumps(ensemble))):
        assert torch.equal(other(tokens), ensemble(tokens))
    loaded = _ensemble()
    loaded.load_state_dict(ensemble.state_dict())
    assert list(ensemble.state_dict()) == [f"prompts.{n}.weight" for n in range(3)]
    assert torch.equal(loaded(tokens), ensemble(tokens))
    assert "num_tokens=3, embedding_dim=8" in repr(ensemble)


@pytest.mark.parametrize("init_from", [None, nn.Embedding(5, D)])
def test_meta_construction(init_from: nn.Embedding | None) -> None:
    prompt = PromptEmbedding(P, D, init_from, device="meta").to_empty(device="cpu")
    torch.nn.init.constant_(prompt.weight, torch.nan)
    prompt.reset_parameters()
    assert prompt.weight.isfinite().all() and prompt.weight.std() > 0


def test_default_device_plays_no_part() -> None:
    table, ensemble, tokens = nn.Embedding(5, D), _ensemble(), torch.randn(2, 5, D)
    want = ensemble.vote(ensemble(tokens)[:, 0])
    with torch.device("meta"):
        assert PromptEmbedding(P, D, table).weight.device.type == "cpu"
        assert torch.equal(ensemble.vote(ensemble(tokens)[:, 0]), want)


def test_compile_without_graph_break() -> None:
    torch._dynamo.reset()
    ensemble, tokens = _ensemble(), torch.randn(2, 5, D)

    def call(tokens: Tensor) -> Tensor:
        return ensemble.vote(ensemble(tokens)[:, 0])

    assert torch.equal(torch.compile(call, fullgraph=True, backend="aot_eager")(tokens), call(tokens))


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (lambda: PromptEmbedding(0, D), "num_tokens must be an int of at least 1, got 0"),
        (lambda: PromptEmbedding(P, 1.5), "embedding_dim must be an int of at least 1, got 1.5"),
        (lambda: PromptEmbedding(P, D, torch.ones(P, 2)), "init_from must be"),
        (lambda: PromptEmbedding(P, D, nn.Embedding(5, 2)), "init_from must be"),
        (lambda: PromptEmbedding(P, D, "text"), "got str"),
        (lambda: PromptEnsemble([]), "at least one"),
        (lambda: PromptEnsemble([nn.Linear(1, 1)]), "must be PromptEmbeddings"),
        (
            lambda: PromptEnsemble([PromptEmbedding(P, D), PromptEmbedding(P + 1, D)]),
            "one length, dimension, dtype and device",
        ),
        (lambda: _ensemble().vote(torch.ones(4, 2)), "with N = 3, got"),
        (lambda: _ensemble().vote(torch.ones(3)), "with N = 3, got"),
        (lambda: PromptEmbedding(P, "8"), "embedding_dim must be an int of at least 1, got '8'"),
        (lambda: PromptEmbedding(P, D, dtype=torch.int8), "dtype must be one of torch.float32, .*, got torch.int8"),
        (
            lambda: PromptEmbedding(P, D, torch.ones(P, D, dtype=torch.long)),
            "init_from must be floating, got torch.int64",
        ),
        (lambda: PromptEmbedding(P, D, nn.Embedding(0, D)), "init_from must have rows to draw from"),
        (lambda: PromptEmbedding(P, D)(torch.ones(2, 3, dtype=torch.long)), "token_embeddings must be"),
        (
            lambda: PromptEmbedding(P, D)(torch.ones(2, 3, D, dtype=torch.long)),
            "token_embeddings must have one of the dtypes",
        ),
        (lambda: PromptEnsemble(5), "must be PromptEmbeddings"),
        (
            lambda: PromptEnsemble([PromptEmbedding(P, D), PromptEmbedding(P, D, device="meta")]),
            "dtype and device, got",
        ),
        (lambda: _ensemble().vote(torch.ones(3, 2, dtype=torch.long)), "logits must be a floating .*got torch.int64"),
        (lambda: _ensemble().vote([[1.0]]), "logits must be a floating torch.Tensor, got list"),
    ],
)
def test_wrong_use_is_named(action, message) -> None:
    with pytest.raises(ValueError, match=message):
        action()
