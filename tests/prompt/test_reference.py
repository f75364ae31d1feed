"""The oracle against what it does not share: autograd, indices one by one, PEFT's embedding."""

from __future__ import annotations

import itertools

import pytest
import torch

from python_ref import prompt as oracle
from tests.contract.operators import CPU
from tests.prompt.cases import Case, make


def test_forward_is_the_equation_row_by_row() -> None:
    case = Case()
    tokens, prompts = make(case, CPU)
    y = oracle.forward(prompts, tokens)
    assert y.shape == (case.n * case.b, case.p + case.l, case.d)
    for n, b in itertools.product(range(case.n), range(case.b)):
        row = y[n * case.b + b]
        assert all(torch.equal(row[t], prompts[n, t]) for t in range(case.p))
        assert all(torch.equal(row[case.p + t], tokens[b, t]) for t in range(case.l))


def test_eager_is_the_equation_and_casts() -> None:
    tokens, prompts = make(Case(), CPU)
    assert torch.equal(oracle.eager(prompts, tokens), oracle.forward(prompts, tokens))
    half = tokens.bfloat16()
    assert torch.equal(oracle.eager(prompts, half), oracle.forward(prompts.bfloat16(), half))


def test_peft_s_prompt_is_eager() -> None:
    """PEFT embeds the indices 0 to P - 1 for each row of the batch, and puts the result in front."""
    peft = pytest.importorskip("peft")
    case = Case(n=1)
    tokens, prompts = make(case, CPU)
    config = peft.PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=case.p, token_dim=case.d, num_transformer_submodules=1
    )
    embedding = peft.PromptEmbedding(config, torch.nn.Embedding(2, case.d))
    with torch.no_grad():
        embedding.embedding.weight.copy_(prompts[0])
    joined = torch.cat((embedding(torch.arange(case.p).expand(case.b, -1)), tokens), dim=1)
    assert torch.equal(joined, oracle.eager(prompts, tokens))
