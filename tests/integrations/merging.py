"""PEFT's models of one layer, for tests of merging: nothing is downloaded."""

from __future__ import annotations

from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from python_ref import compare
from tests.integrations.models import lora_layers

N, K = 40, 24
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def model_of(
    dtype: torch.dtype = torch.bfloat16, adapters: int = 1, *, base: nn.Module | None = None, **options: Any
) -> Any:
    """PEFT's model of one layer, with adapters "default", "a1", "a2" in float32."""
    torch.manual_seed(0)
    base = nn.Linear(K, N) if base is None else base
    nn.init.normal_(base.weight, std=0.02)
    options = {"target_modules": ["0"], "r": 4, "init_lora_weights": False, **options}
    model = peft.get_peft_model(nn.Sequential(base).to(dtype), peft.LoraConfig(**options))
    for index in range(1, adapters):
        model.add_adapter(f"a{index}", peft.LoraConfig(**options))
    model.base_model.set_adapter(["default", *(f"a{index}" for index in range(1, adapters))])
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.1)
    return model.eval()


def layer_of(model: Any) -> Any:
    (layer,) = lora_layers(model)
    return layer


def bits(layer: Any) -> list[Tensor]:
    base = layer.get_base_layer()
    return [tensor.detach().clone() for tensor in (base.weight, base.bias) if tensor is not None]


def assert_bits(layer: Any, expected: list[Tensor]) -> None:
    names = ("weight", "bias")[: len(expected)]
    for name, got, wanted in zip(names, bits(layer), expected, strict=True):
        compare.assert_bitwise_equal(name, got, wanted)


def exact_sum(layer: Any) -> tuple[Tensor, Tensor]:
    """In float64, and the sum of the magnitudes that are added."""
    total = layer.base_layer.weight.detach().double()
    size = total.abs()
    for name in layer.active_adapters:
        up, down = (part[name].weight.detach().double() for part in (layer.lora_B, layer.lora_A))
        scaling = float(layer.scaling[name])
        update, update_size = up @ down * scaling, up.abs() @ down.abs() * scaling
        total = total + (update.t() if layer.fan_in_fan_out else update)
        size = size + (update_size.t() if layer.fan_in_fan_out else update_size)
    return total, size


def relative_to_one_rounding(layer: Any, exact: Tensor, size: Tensor) -> float:
    """The largest error in units of half a unit in the last place, and what the accumulation may add."""
    got = layer.base_layer.weight.detach()
    rounded = exact.to(got.dtype).double()
    wide = torch.finfo(torch.promote_types(got.dtype, torch.float32)).eps
    # Ranks of three adapters and W itself are 13 addends, each rounded once in the wide dtype.
    return float(((got.double() - exact).abs() / ((rounded - exact).abs() + 13 * wide * size)).max())


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rsLoRA": {"use_rslora": True},
    "bias": {"lora_bias": True},
    "Conv1D": {"base": lambda: Conv1D(N, K), "fan_in_fan_out": True, "lora_bias": True},
    "square Conv1D": {"base": lambda: Conv1D(K, K), "fan_in_fan_out": True},
    "no bias": {"base": lambda: nn.Linear(K, N, bias=False)},
}


def of_kind(kind: str, dtype: torch.dtype = torch.bfloat16, adapters: int = 1) -> Any:
    options = dict(KINDS[kind])
    return model_of(dtype, adapters, base=options.pop("base", lambda: None)(), **options)
