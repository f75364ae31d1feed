"""Applied and prefixed models under DDP and FSDP2: two processes with half a batch each give the gradients of one."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests import two_processes

pytest.importorskip("peft")
pytest.importorskip("transformers")

from transformers.models.llama.modeling_llama import LlamaDecoderLayer

pytestmark = [*two_processes.MARKS, pytest.mark.slow]

ROWS = 4
MODELS = ("peft lora", "peft prefix", "peft prompt", "prefix", "prefix checkpointed", "prompt", "ensemble")
# 14 LoRA layers of two factors; one table each; a table and an MLP, twice; a prompt; three prompts.
PARAMETERS = 28 + 1 + 1 + 5 + 5 + 1 + 3


def _model(name: str) -> nn.Module:
    import peft_kernels as pk
    from peft_kernels.integrations import transformers as integration
    from tests.integrations import models, peft_prompts, prefixes

    if name == "peft lora":
        model = models.build("llama")
    elif name.startswith("peft"):
        model = peft_prompts.build(name.removeprefix("peft "), "llama")
    else:
        model = prefixes.base("llama")
        torch.manual_seed(3)
        prompts = [pk.PromptEmbedding(2, models.HIDDEN) for _ in range(3)]
        if name.startswith("prefix"):
            integration.add_prefix(model.train(), integration.prefix_encoder(model, 4, 6))
        else:
            integration.add_prompt(model, prompts[0] if name == "prompt" else pk.PromptEnsemble(prompts))
    if name == "prefix checkpointed":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def _check_all(rank: int) -> int:
    return sum(_check(*case, rank) for case in itertools.product(two_processes.HOW, MODELS))


def _check(how: str, name: str, rank: int) -> int:
    import peft_kernels as pk
    from tests.integrations.models import tokens

    whole = _model(name)
    model, copies = copy.deepcopy(whole), 3 if name == "ensemble" else 1
    report = pk.apply(model, strict=True) if name.startswith("peft") else None

    def loss(model: nn.Module, rank: int | None) -> Tensor:
        logits = model(input_ids=two_processes.share(tokens(ROWS), rank)).logits.unflatten(0, (copies, -1))
        generator = torch.Generator().manual_seed(1)
        weights = torch.randn(copies, ROWS, *logits.shape[2:], generator=generator)
        return (logits * two_processes.share(weights.transpose(0, 1), rank).transpose(0, 1)).mean()

    layers = [module for module in model.modules() if isinstance(module, LlamaDecoderLayer)]
    # The unwrapped model is PEFT's own where there is one.
    checked = two_processes.compare(rank, how, name, model, whole, layers, loss)
    assert report is None or not report.fallback_calls
    return checked


def test_two_processes(tmp_path: Path) -> None:
    assert two_processes.run(_check_all, tmp_path) == [2 * PARAMETERS] * two_processes.WORLD
