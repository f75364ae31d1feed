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


class TestWhatTheCallbackSays:
    """To whoever configured no logging: a warning is seen then, and what is no warning is printed."""

    def test_modules_that_fall_back_are_a_warning(
        self, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
    ) -> None:
        callback = integration.ApplyCallback()
        callback.on_train_begin(None, None, None, model=models.build(target_modules=["q_proj", "embed_tokens"]))
        (record,) = caplog.records
        assert record.levelname == "WARNING" and "1 not fused: it is PEFT's" in record.getMessage()
        assert not capsys.readouterr().err

    def test_calls_that_fell_back_are_a_warning_at_the_end(
        self, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
    ) -> None:
        callback, model = integration.ApplyCallback(), models.build()
        callback.on_train_begin(None, None, None, model=model)
        assert capsys.readouterr().err == "peft_kernels: 14 modules fused, 0 not\n"
        callback.on_train_end(None, None, None)
        assert not caplog.records
        with model.disable_adapter():
            model(models.tokens(2, 7))
        callback.on_train_end(None, None, None)
        (record,) = caplog.records
        assert record.levelname == "WARNING" and "14 calls fell back: adapters are disabled" in record.getMessage()

    def test_other_processes_print_nothing(self, capsys: pytest.CaptureFixture[str]) -> None:
        state = transformers.TrainerState(is_world_process_zero=False)
        integration.ApplyCallback().on_train_begin(None, state, None, model=models.build())
        assert not capsys.readouterr().err


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
