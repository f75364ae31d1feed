"""transformers' Trainer, with apply in a callback and with prefixes and prompts of this package."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("peft")
pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import transformers

import peft_kernels as pk
from peft_kernels.integrations import transformers as integration
from tests.integrations import models, peft_prompts, prefixes

pytestmark = pytest.mark.slow


def _losses(
    model: nn.Module, folder: Path, callbacks: list, steps: int, resume: bool = False, **options: object
) -> list[float]:
    rows = [{"input_ids": row, "labels": row} for row in models.tokens(24, 7)]
    arguments = transformers.TrainingArguments(
        str(folder), max_steps=steps, save_steps=3, logging_steps=1, per_device_train_batch_size=4, report_to=[],
        use_cpu=True, disable_tqdm=True, learning_rate=1e-2, lr_scheduler_type="constant", **options,
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=rows, callbacks=callbacks)
    trainer.train(resume_from_checkpoint=resume or None)
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def test_lora_with_callback_and_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Losses equal those of the unpatched model, also from a checkpoint on; the report is seen."""
    callback = integration.ApplyCallback(strict=True)
    expected = _losses(models.build(), tmp_path / "plain", [], 6)
    _losses(models.build(), tmp_path / "fused", [callback], 3)
    assert "peft_kernels: 14 modules fused, 0 not\n" in capsys.readouterr().err
    resumed = _losses(models.build(), tmp_path / "fused", [integration.ApplyCallback()], 6, True)
    assert len(callback.report.fused) == 14
    assert resumed == pytest.approx(expected, rel=1e-4)


def test_fallbacks_are_warnings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Of modules when training begins; of calls when it ends, with their number."""
    model = models.build(target_modules=["q_proj", "embed_tokens"])
    layer = next(module for module in model.modules() if isinstance(module, peft.tuners.lora.Linear))
    handle = layer.register_forward_pre_hook(lambda module, inputs: module.disable_adapters)
    callback = integration.ApplyCallback()
    _losses(model, tmp_path, [callback], 1)
    handle.remove()
    assert len(callback.report.fallbacks) == 1
    (begin,) = caplog.records
    assert begin.levelname == "WARNING" and "1 not fused: it is PEFT's" in begin.getMessage()
    assert "modules fused" not in capsys.readouterr().err


@pytest.mark.parametrize("kind", peft_prompts.CONFIGS)
def test_prompt_learning_with_callback(kind: str, tmp_path: Path) -> None:
    callback = integration.ApplyCallback(strict=True)
    expected = _losses(peft_prompts.build(kind), tmp_path / "plain", [], 3)
    losses = _losses(peft_prompts.build(kind), tmp_path / "fused", [callback], 3)
    assert losses == pytest.approx(expected, rel=1e-4)
    assert callback.report.fused and not callback.report.fallback_calls


def _with_prefix() -> nn.Module:
    return prefixes.with_prefix("llama", 6)[0]


def _with_prompt() -> nn.Module:
    model = prefixes.base("llama")
    torch.manual_seed(2)
    integration.add_prompt(model, pk.PromptEmbedding(4, models.HIDDEN))
    return model


@pytest.mark.parametrize("build", [_with_prefix, _with_prompt])
def test_resume_and_checkpointing(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    """A checkpoint holds the prefixes or the prompt; activation checkpointing changes nothing."""
    expected = _losses(build(), tmp_path / "whole", [], 6)
    assert len(set(expected)) == 6
    checkpointing = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    _losses(build(), tmp_path / "parts", [], 3, **checkpointing)
    assert _losses(build(), tmp_path / "parts", [], 6, True) == pytest.approx(expected, rel=1e-4)
