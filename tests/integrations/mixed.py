"""PEFT models in float64 with several adapters that differ in all that they may, as they are and applied."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import peft
import torch
from torch import Tensor, nn

import peft_kernels as pk
from tests.integrations import models

BASE = "__base__"
ROWS, LENGTH = 8, 11
NAMES = ["en", BASE, "de", "ar", "en", "de", "ar", "en"]
ADAPTERS = ("en", "de", "ar")

# Products of the same numbers, which BLAS may sum in another order where it is given another number of rows, through
# two layers: a few units in the last place.
LAST_BITS = 1e-14


def build(architecture: str = "llama", p: float = 0.0, **options: Any) -> Any:
    """Ranks differ by layer, targets by adapter, scalings and dropout by adapter."""
    torch.manual_seed(0)
    make, targets = models.ARCHITECTURES[architecture]
    some = {"llama": ["q_proj", "v_proj"], "t5": ["q", "v"], "gpt2": ["c_attn"]}[architecture]
    shared = {"init_lora_weights": False, "fan_in_fan_out": architecture == "gpt2", **options}
    with warnings.catch_warnings():
        # GPT-2 is of Conv1D alone; PEFT says so of each other layer.
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(
            make(),
            peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=p, target_modules=targets, **shared),
            adapter_name="en",
            autocast_adapter_dtype=False,
        )
        pattern = {some[-1]: 7}
        model.add_adapter("de", peft.LoraConfig(r=3, lora_alpha=16, use_rslora=True, rank_pattern=pattern,
                                                lora_dropout=p / 2, target_modules=targets, **shared))  # fmt: skip
        model.add_adapter("ar", peft.LoraConfig(r=5, lora_alpha=5, target_modules=some, **shared))
    return model.double().eval()


def pair(*args: Any, **options: Any) -> tuple[Any, Any, pk.integrations.Report]:
    """The model applied, the same as it was, and the report."""
    plain = build(*args, **options)
    fused = copy.deepcopy(plain)
    return fused, plain, pk.apply(fused)


def tokens(rows: int = ROWS, length: int = LENGTH, seed: int = 0) -> Tensor:
    return models.tokens(rows, length, seed)


def inputs(model: nn.Module, rows: int = ROWS, length: int = LENGTH, seed: int = 0) -> dict[str, Tensor]:
    ids = tokens(rows, length, seed)
    return {"input_ids": ids} | ({"decoder_input_ids": ids.flip(1)[:, :5]} if model.config.is_encoder_decoder else {})


def layer_of(model: nn.Module, index: int = 0) -> Any:
    return models.lora_layers(model)[index]


def assert_close(got: Tensor, expected: Tensor, bound: float = LAST_BITS, name: str = "") -> None:
    error, size = float((got - expected).detach().norm()), float(expected.detach().norm())
    assert error <= bound * size, f"{name}: {error:.1e} of {size:.1e}"
