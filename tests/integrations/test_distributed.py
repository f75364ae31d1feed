"""Applied and prefixed models under DDP and FSDP2: two processes with half a batch each give the gradients of one."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests import two_processes
from tests.two_processes import WORLD

pytest.importorskip("peft")
pytest.importorskip("transformers")

pytestmark = [*two_processes.MARKS, pytest.mark.slow]

ROWS = 2
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


def _gradients(model: nn.Module, copies: int, rows: slice) -> dict[str, Tensor]:
    from tests.integrations.models import tokens

    logits = model(input_ids=tokens(WORLD * ROWS)[rows]).logits.unflatten(0, (copies, -1))
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(copies, WORLD * ROWS, *logits.shape[2:], generator=generator)
    (logits * weights[:, rows]).mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def _full(tensor: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _wrapped(model: nn.Module, how: str) -> nn.Module:
    if how == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    from torch.distributed.fsdp import fully_shard
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    for layer in [module for module in model.modules() if isinstance(module, LlamaDecoderLayer)]:
        fully_shard(layer)
    return fully_shard(model)


def _check_all(rank: int) -> int:
    checked = 0
    for case in itertools.product(("ddp", "fsdp2"), MODELS):
        try:
            checked += _check(*case, rank)
        except Exception as error:
            raise AssertionError(case) from error
    return checked


def _check(how: str, name: str, rank: int) -> int:
    import peft_kernels as pk

    whole = _model(name)
    model, copies = copy.deepcopy(whole), 3 if name == "ensemble" else 1
    report = pk.apply(model, strict=True) if name.startswith("peft") else None
    got = _gradients(_wrapped(model, how), copies, slice(rank * ROWS, (rank + 1) * ROWS))
    assert report is None or not report.fallback_calls
    # The unwrapped model is PEFT's own where there is one.
    expected = _gradients(whole, copies, slice(None))
    for key, gradient in expected.items():
        full = _full(got[key if how == "fsdp2" else f"module.{key}"])
        # The same float32 sums in another order.
        torch.testing.assert_close(full, gradient, rtol=1e-4, atol=1e-6)
        assert gradient.any(), key
    return len(expected)


def test_two_processes(tmp_path: Path) -> None:
    assert two_processes.run(_check_all, tmp_path) == [2 * PARAMETERS] * WORLD
