"""Models with adapters of PEFT's that differ by layer, their folders, and banks with these."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")


import peft_kernels as pk
from tests.integrations.models import ARCHITECTURES, randomize

BASE = "__base__"
# Ranks and alphas that differ by layer, and adapters that have nothing for some.
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 8},
    "pattern": {"r": 3, "rank_pattern": {"v_proj": 7}, "alpha_pattern": {"q_proj": 2}, "use_rslora": True},
    "few": {"r": 5, "lora_dropout": 0.5, "target_modules": ["q_proj", "v_proj"]},
    "pattern of names": {"r": 2, "target_modules": r".*layers\.1\..*_proj"},
}
LLAMA = ARCHITECTURES["llama"][1]


def base(architecture: str = "llama", dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    model = ARCHITECTURES[architecture][0]().eval().to(dtype)
    for name, parameter in model.named_parameters():
        # They begin as zeros, and nobody would see one that is left out.
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return model


def peft_model(architecture: str = "llama", dtype: torch.dtype = torch.float64, **options: dict[str, Any]) -> nn.Module:
    """One with all adapters of ``OPTIONS``, or with the given ones, under their names."""
    model = base(architecture, dtype)
    for name, given in (options or OPTIONS).items():
        config = peft.LoraConfig(
            **{"target_modules": ARCHITECTURES[architecture][1], "fan_in_fan_out": architecture == "gpt2", **given}
        )
        if isinstance(model, peft.PeftModel):
            model.add_adapter(name, config)
        else:
            model = peft.get_peft_model(model, config, adapter_name=name)
    randomize(model)
    return model.eval()


def filled(model: nn.Module, folders: dict[str, Path], **options: Any) -> pk.AdapterBank:
    bank = pk.AdapterBank(model, **{"slots": 4, "max_rank": 8, **options})
    for name, folder in folders.items():
        bank.add(name, folder)
    return bank


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor, **extra: Any) -> Tensor:
    return model(input_ids=ids, **extra).logits


def bits(bank: pk.AdapterBank) -> list[Any]:
    store = bank._store
    tensors = [store.tables, store.host_tables, store.scales]
    tensors += [tensor for layer in store.layers for tensor in (layer.lora_a, layer.lora_b)]
    tensors += [f for each in store._hosted.values() for both in each.factors.values() for f in both[:2]]
    return [
        bank.names,
        bank.resident,
        dict(store._slot_of),
        list(store._free),
        store.in_use,
        *(tensor.numpy().tobytes() for tensor in tensors),
    ]
