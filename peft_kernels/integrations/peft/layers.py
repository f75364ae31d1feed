"""PEFT's LoRA layers on ``lora_linear``: the layer's class is swapped, its state is not touched.

A swapped layer decides at each call whether ``lora_linear`` computes exactly what PEFT's forward would; if not, that
forward runs, and the reason is counted. The class has no ``__init__`` and no attributes, so everything that works on
PEFT's layer works on it: ``isinstance``, pickling, deepcopy, merging, hotswapping, hooks on the layer itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from peft.tuners.lora.layer import VARIANT_KWARG_KEYS, LoraLayer
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor, nn

from peft_kernels._core.autocast import autocast_dtype
from peft_kernels.integrations.hooks import is_hooked
from peft_kernels.integrations.report import count_fallback
from peft_kernels.integrations.rules import Support
from peft_kernels.integrations.sites import Site
from peft_kernels.lora import lora_linear

SUPPORT = Support(
    "PEFT: LoRA layers",
    (
        "`lora.Linear` on `nn.Linear`, or on transformers' `Conv1D`",
        "rsLoRA, `rank_pattern`, `alpha_pattern`, `lora_bias`, PiSSA and other initialisations",
        "adapters in float32 on a half-precision base, autocast, dropout in training",
        "several active adapters without dropout, in one call",
    ),
)
_OTHER_LAYER = SUPPORT.rule(
    "a layer of another class: embeddings, convolutions, quantized layers, MoE parameters",
    "it is PEFT's {layer}, not its lora.Linear",
)
_DISABLED = SUPPORT.rule("a call inside `disable_adapter()`", "adapters are disabled")
_MERGED = SUPPORT.rule("a call after `merge_adapter()`", "adapters are merged into the weight")
_NO_ADAPTER = SUPPORT.rule("a call while none of the layer's adapters is active", "no adapter is active")
_OTHER_BASE = SUPPORT.rule(
    "a base layer of another class, a parametrized one too", "its base layer is {base}, not nn.Linear or Conv1D"
)
_VARIANT = SUPPORT.rule("DoRA, aLoRA, QA-LoRA and PEFT's other variants", "its adapter is a {variant}, not plain LoRA")
_OTHER_DROPOUT = SUPPORT.rule("dropout of another class", "its dropout is {dropout}, not nn.Dropout")
_HOOKED = SUPPORT.rule(
    "hooks inside the layer: offloading, tensor parallelism, FSDP of the parts",
    "there are hooks on its base layer or on its adapters",
)
_NO_PLAIN_WEIGHT = SUPPORT.rule(
    "a weight that is a tensor subclass", "a weight of it is a {weight}, not a plain tensor"
)
_ADAPTER_NAMES = SUPPORT.rule("`adapter_names` in the call", "adapter_names mixes adapters within a batch")
_MORE_ARGUMENTS = SUPPORT.rule("a call with further arguments", "the call has arguments beside x")
_SEVERAL_DEVICES = SUPPORT.rule("tensors on several devices", "its tensors are on several devices")
_SEVERAL_DTYPES = SUPPORT.rule("active adapters of several dtypes", "its adapters have several dtypes")
_SEVERAL_MASKS = SUPPORT.rule(
    "several active adapters with dropout in training", "several active adapters with dropout draw a mask each"
)
_X_DTYPE = SUPPORT.rule("input and base weight of two dtypes outside autocast", "x is {x}, the base weight {base}")
_ADAPTER_DTYPE = SUPPORT.rule(
    "adapters neither in the input's dtype nor in float32 outside autocast", "x is {x}, the adapters are {adapter}"
)


class FusedLoraLinear(PeftLinear):
    """PEFT's ``lora.Linear`` whose base product and low-rank update are one operation."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As PEFT's; what it cannot fuse runs PEFT's own."""
        reason = _why_not_state(self) or _why_not_parts(self) or _why_not_call(self, x, args, kwargs)
        if reason is not None:
            count_fallback(self, reason)
            return super().forward(x, *args, **kwargs)
        return _fused(self, x)


def sites(model: nn.Module) -> Iterator[Site]:
    """PEFT's LoRA layers, each by itself."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            yield Site({name: module}, {PeftLinear: FusedLoraLinear}, partial(_why_not, module))


def _why_not(layer: Any) -> str | None:
    if type(layer) not in (PeftLinear, FusedLoraLinear):
        return _OTHER_LAYER(layer=f"{type(layer).__module__.rpartition('.')[2]}.{type(layer).__name__}")
    return _why_not_parts(layer)


def _why_not_state(layer: PeftLinear) -> str | None:
    if layer.disable_adapters:
        return _DISABLED()
    if layer.merged:
        return _MERGED()
    if not _active(layer):
        return _NO_ADAPTER()
    return None


def _why_not_parts(layer: PeftLinear) -> str | None:
    """Reason that lies in what the layer is made of."""
    base = layer.base_layer
    if type(base) is not nn.Linear and not _is_conv1d(base):
        return _OTHER_BASE(base=type(base).__name__)
    for name in _active(layer):
        if name in layer.lora_variant:
            return _VARIANT(variant=type(layer.lora_variant[name]).__name__)
        if type(layer.lora_dropout[name]) not in (nn.Dropout, nn.Identity):
            return _OTHER_DROPOUT(dropout=type(layer.lora_dropout[name]).__name__)
    for part in _parts(layer):
        if is_hooked(part):
            return _HOOKED()
        weight = getattr(part, "weight", None)
        if weight is not None and type(weight) not in (nn.Parameter, Tensor):
            return _NO_PLAIN_WEIGHT(weight=type(weight).__name__)
    return None


def _why_not_call(layer: PeftLinear, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """Reason that lies in the arguments, or in dtypes and devices."""
    if kwargs.get("adapter_names") is not None:
        return _ADAPTER_NAMES()
    if args or any(
        value is not None or key not in VARIANT_KWARG_KEYS for key, value in kwargs.items() if key != "adapter_names"
    ):
        return _MORE_ARGUMENTS()
    names = _active(layer)
    base, factors = _weight(layer.base_layer), [factor for name in names for factor in _factors(layer, name)]
    if any(weight.device != x.device for weight in (base, *factors)):
        return _SEVERAL_DEVICES()
    if len({factor.dtype for factor in factors}) > 1:
        return _SEVERAL_DTYPES()
    if len(names) > 1 and any(_dropout_p(layer, name) for name in names):
        return _SEVERAL_MASKS()
    return _why_not_dtypes(x, base.dtype, factors[0].dtype, layer.cast_input_dtype_enabled)


def _why_not_dtypes(x: Tensor, base: torch.dtype, adapter: torch.dtype, casts_input: bool) -> str | None:
    # Under autocast every product is in autocast's dtype, whatever its operands are; float64 stays out of it.
    if autocast_dtype(x.device.type) is not None and torch.float64 not in (x.dtype, base, adapter):
        return None
    if x.dtype != base:
        return _X_DTYPE(x=x.dtype, base=base)
    if adapter not in (x.dtype, torch.float32) or (adapter != x.dtype and not casts_input):
        return _ADAPTER_DTYPE(x=x.dtype, adapter=adapter)
    return None


def _fused(layer: PeftLinear, x: Tensor) -> Tensor:
    """One call for all active adapters: their ranks stand side by side."""
    names = _active(layer)
    weight, bias = _weight(layer.base_layer), _bias(layer, names)
    factors = [_factors(layer, name) for name in names]
    if len(names) == 1:
        ((lora_a, lora_b),) = factors
        scale, p = layer.scaling[names[0]], _dropout_p(layer, names[0])
        return lora_linear(x, weight, lora_a, lora_b, scale, bias, dropout_p=p)
    lora_a = torch.cat([a for a, _ in factors])
    lora_b = torch.cat([b * layer.scaling[name] for (_, b), name in zip(factors, names, strict=True)], dim=1)
    return lora_linear(x, weight, lora_a, lora_b, 1.0, bias)


def _bias(layer: PeftLinear, names: list[str]) -> Tensor | None:
    """The base layer's bias, and with it the scaled one that ``lora_bias`` gives an adapter's up factor."""
    base: Any = layer.base_layer
    bias: Tensor | None = base.bias
    for name in names:
        up: Any = layer.lora_B[name]
        if up.bias is not None:
            scaled = up.bias * layer.scaling[name]
            bias = scaled.to(base.weight.dtype) if bias is None else (bias + scaled).to(bias.dtype)
    return bias


def _weight(base: Any) -> Tensor:
    """The base weight as (N, K)."""
    weight: Tensor = base.weight
    return weight.t() if _is_conv1d(base) else weight


def _factors(layer: PeftLinear, name: str) -> tuple[Tensor, Tensor]:
    down: Any = layer.lora_A[name]
    up: Any = layer.lora_B[name]
    return down.weight, up.weight


def _active(layer: PeftLinear) -> list[str]:
    return [name for name in layer.active_adapters if name in layer.lora_A]


def _dropout_p(layer: PeftLinear, name: str) -> float:
    dropout = layer.lora_dropout[name]
    return dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0


def _parts(layer: PeftLinear) -> Iterator[nn.Module]:
    yield layer.base_layer
    for name in _active(layer):
        yield from (layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name])


def _is_conv1d(base: nn.Module) -> bool:
    """Whether it is transformers' Conv1D, a linear layer that stores its weight (in, out); imports nothing."""
    return type(base).__name__ == "Conv1D" and type(base).__module__ == "transformers.pytorch_utils"
