"""TRL's SFTTrainer with ApplyCallback: the losses of the plain model, and the report is seen."""

from __future__ import annotations

from pathlib import Path

import pytest

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")
trl = pytest.importorskip("trl")
tokenizers = pytest.importorskip("tokenizers")

import torch

from peft_kernels.integrations.transformers import ApplyCallback
from tests.integrations.models import ARCHITECTURES

pytestmark = pytest.mark.slow

WORDS = ["<pad>", "</s>", "<unk>", *"abcdefgh"]


def _losses(folder: Path, callbacks: list[ApplyCallback], dropout: float) -> list[float]:
    torch.manual_seed(0)
    split = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    split.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    trainer = trl.SFTTrainer(
        ARCHITECTURES["llama"][0](),
        args=trl.SFTConfig(
            str(folder), max_steps=4, logging_steps=1, per_device_train_batch_size=2, max_length=16, learning_rate=1e-2,
            report_to="none", save_strategy="no", use_cpu=True, disable_tqdm=True,
        ),
        train_dataset=datasets.Dataset.from_list([{"prompt": f"a b {word}", "completion": " d e"} for word in "cfgh"]),
        processing_class=transformers.PreTrainedTokenizerFast(
            tokenizer_object=split, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
        ),
        peft_config=peft.LoraConfig(
            task_type="CAUSAL_LM", r=4, target_modules="all-linear", lora_dropout=dropout, init_lora_weights=False
        ),
        callbacks=callbacks,
    )  # fmt: skip
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def test_losses_are_those_of_the_plain_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    callback = ApplyCallback(strict=True)
    expected, losses = _losses(tmp_path, [], 0.0), _losses(tmp_path, [callback], 0.0)
    assert len(set(expected)) == 4
    # The trainer's own rounding of what it logs, and float32 sums in another order.
    assert losses == pytest.approx(expected, rel=1e-3)
    assert "peft_kernels: 14 modules fused, 0 not\n" in capsys.readouterr().err
    assert not callback.report.fallback_calls


def test_dropout_is_fused_too(tmp_path: Path) -> None:
    callback = ApplyCallback(strict=True)
    assert all(0 < loss < 10 for loss in _losses(tmp_path, [callback], 0.3))
    assert not callback.report.fallback_calls
