"""Older releases of other libraries: one sentence with the release that is needed, and what needs none runs."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

import peft_kernels as pk
from peft_kernels.integrations import versions

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

OURS = ("peft_kernels.integrations.peft", "peft_kernels.integrations.transformers")


@pytest.fixture
def lacks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], None]]:
    """How to take a name out of a library, before the integrations are imported."""
    before = {name: sys.modules.pop(name) for name in list(sys.modules) if name.startswith(OURS)}
    for name in OURS:
        monkeypatch.delattr(name, raising=False)
    yield lambda module, name: monkeypatch.delattr(importlib.import_module(module), name)
    for name in [name for name in sys.modules if name.startswith(OURS)]:
        del sys.modules[name]
    sys.modules.update(before)


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.q(x)


def _llama() -> nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=16, **sizes))


def test_old_peft(lacks: Callable[[str, str], None]) -> None:
    lacks("peft.tuners.lora.layer", "VARIANT_KWARG_KEYS")
    model = peft.get_peft_model(_Net(), peft.LoraConfig(r=2, target_modules=["q"]))
    with pytest.raises(ImportError, match=rf"apply: peft 0\.18 or newer is needed, {peft.__version__} is installed"):
        pk.apply(model)


def test_old_transformers(lacks: Callable[[str, str], None]) -> None:
    """LoRA and prompts do not need what prefixes need."""
    lacks("transformers.masking_utils", "bidirectional_mask_function")
    report = pk.apply(peft.get_peft_model(_Net(), peft.LoraConfig(r=2, target_modules=["q"])))
    assert len(report.fused) == 1
    sentence = rf"transformers 5\.4 or newer and older than 6\.0 is needed, {transformers.__version__} is installed"
    prefixes = peft.get_peft_model(_llama(), peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.warns(UserWarning, match=sentence):
        assert not pk.apply(prefixes).fused
    from peft_kernels.integrations import transformers as integration

    model = _llama()
    with pytest.raises(ImportError, match=f"prefix_encoder: {sentence}"):
        integration.prefix_encoder(model, 2)
    with pytest.raises(ImportError, match=f"add_prefix: {sentence}"):
        integration.add_prefix(model, pk.PrefixEncoder(1, 2, 8, 2))
    integration.add_prompt(model, pk.PromptEmbedding(2, 16))
    assert integration.ApplyCallback


def test_older_transformers(lacks: Callable[[str, str], None]) -> None:
    lacks("transformers.masking_utils", "find_packed_sequence_indices")
    from peft_kernels.integrations import transformers as integration

    assert integration.ApplyCallback
    with pytest.raises(ImportError, match="add_prompt: transformers"):
        integration.add_prompt  # noqa: B018 (its reading is the import)
    with pytest.raises(AttributeError, match="no attribute 'add_prompts'"):
        integration.add_prompts  # noqa: B018


@pytest.mark.parametrize("version", ["5.3.9", "5.0.0rc1", "4.57.6", "6.0.0"])
def test_transformers_in_which_all_names_are_there_and_mean_something_else(
    version: str, lacks: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Masks are asked for with other arguments there: the first call would fail, or attend to something else."""
    monkeypatch.setattr(transformers, "__version__", version)
    from peft_kernels.integrations import transformers as integration

    sentence = rf"transformers 5\.4 or newer and older than 6\.0 is needed, {version} is installed"
    with pytest.raises(ImportError, match=f"add_prompt: {sentence}"):
        integration.add_prompt  # noqa: B018 (its reading is the import)
    with pytest.raises(ImportError, match=f"add_prefix: {sentence}"):
        integration.add_prefix(_llama(), pk.PrefixEncoder(1, 2, 8, 2))
    assert integration.ApplyCallback


@pytest.mark.parametrize("version", ["5.4.0", "5.4.0.dev0", "5.10", "5.24.0", "5.99"])
def test_what_is_new_enough(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers, "__version__", version)
    versions.require("transformers")
