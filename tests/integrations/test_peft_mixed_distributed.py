"""Mixed batches under DDP, FSDP2 and Trainer: gradients of one process with the whole batch, by PEFT."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests import two_processes

pytest.importorskip("peft")
pytest.importorskip("transformers")

pytestmark = pytest.mark.slow

# 14 layers of two adapters and 4 of a third, two factors each.
PARAMETERS = 2 * (2 * 14 + 4)


def _check_all(rank: int) -> int:
    return sum(_check(*case, rank) for case in itertools.product(two_processes.HOW, (False, True)))


def _check(how: str, is_checkpointed: bool, rank: int) -> int:
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    import peft_kernels as pk
    from tests.integrations import mixed

    whole = mixed.build()
    whole.set_requires_grad(list(mixed.ADAPTERS))
    model = copy.deepcopy(whole).train()
    report = pk.apply(model, strict=True)
    if is_checkpointed:
        model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})

    def loss(model: nn.Module, rank: int | None) -> Tensor:
        ids, half = two_processes.share(mixed.tokens(), rank), len(mixed.NAMES) // 2
        if rank is None:
            logits = model(ids, adapter_names=mixed.NAMES).logits
        else:
            with pk.mixed_batch(model, mixed.NAMES[rank * half :][:half]):
                logits = model(ids).logits
        weights = torch.randn(mixed.ROWS, *logits.shape[1:], generator=torch.Generator().manual_seed(1))
        return (logits * two_processes.share(weights, rank)).mean()

    layers: list[nn.Module] = [module for module in model.modules() if isinstance(module, LlamaDecoderLayer)]
    checked = two_processes.compare(rank, how, f"checkpointed: {is_checkpointed}", model, whole, layers, loss)
    assert not report.fallback_calls
    return checked


class TestProcesses:
    pytestmark = two_processes.MARKS

    def test_two(self, tmp_path: Path) -> None:
        assert two_processes.run(_check_all, tmp_path) == [2 * 2 * PARAMETERS] * two_processes.WORLD


class TestTrainer:
    """The recipe of docs/integrations.md: names are a column of the data set."""

    @staticmethod
    def _losses(model: Any, folder: Path, is_mixed: bool) -> tuple[list[float], dict[str, Tensor]]:
        import transformers

        import peft_kernels as pk
        from tests.integrations import mixed

        class Trainer(transformers.Trainer):
            def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
                names = inputs.pop("adapter")
                if not is_mixed:
                    inputs["adapter_names"] = names
                    model.eval()  # PEFT takes them there alone
                    return super().compute_loss(model, inputs, *args, **kwargs)
                with pk.mixed_batch(model, names):
                    return super().compute_loss(model, inputs, *args, **kwargs)

        def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
            return {**transformers.default_data_collator(rows), "adapter": [row["adapter"] for row in rows]}

        data = [
            {"input_ids": row, "labels": row, "adapter": mixed.NAMES[index % 8]}
            for index, row in enumerate(mixed.tokens(24))
        ]
        arguments = transformers.TrainingArguments(
            str(folder), max_steps=4, logging_steps=1, per_device_train_batch_size=6, report_to=[], use_cpu=True,
            disable_tqdm=True, learning_rate=1e-2, lr_scheduler_type="constant", remove_unused_columns=False,
            save_strategy="no", gradient_checkpointing=is_mixed, gradient_checkpointing_kwargs={"use_reentrant": False},
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=data, data_collator=collate)
        trainer.train()
        trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
        return [line["loss"] for line in trainer.state.log_history if "loss" in line], trained

    def test_losses_and_adapters_are_peft_s(self, tmp_path: Path) -> None:
        pytest.importorskip("accelerate")
        import peft_kernels as pk
        from tests.integrations import mixed

        plain = mixed.build()
        plain.set_requires_grad(list(mixed.ADAPTERS))
        fused = copy.deepcopy(plain)
        report = pk.apply(fused, strict=True)
        losses, trained = self._losses(fused, tmp_path / "fused", True)
        expected, theirs = self._losses(plain, tmp_path / "plain", False)
        assert losses == pytest.approx(expected, rel=1e-6) and not report.fallback_calls
        for name, parameter in trained.items():
            # Adam divides by the root of a gradient's square: a gradient near zero may lose all digits but its sign.
            torch.testing.assert_close(parameter, theirs[name], rtol=1e-6, atol=1e-8)
