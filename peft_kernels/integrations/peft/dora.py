"""DoRA layers of PEFT's on ``lora_linear`` with a gain: which they are, and the operation that a call is.

    y = g (x W^T + s (x A^T) B^T) + bias,  g = magnitude / norms of the rows of W + s B A

The sum that ``DoraLinearVariant`` adds to the base layer's result is this minus that result, so that the base product
is made once, and nothing of its size is made beside it but what a gradient of g reads.

Where the base module makes its output y by itself, the layer's is g (y - bias) + bias + s S (g * B)^T: y meets the gain
once, and the update is added to that. The norms are then of the weight as PEFT decodes it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.variants import DoraLinearVariant
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peft_kernels.integrations.calls import is_plain
from peft_kernels.integrations.hooks import OwnMethods, is_hooked
from peft_kernels.integrations.peft import bases
from peft_kernels.integrations.peft.operands import Factors, Modules, Operands, base_of
from peft_kernels.integrations.rules import Support
from peft_kernels.lora import dora_gain, lora_linear, lora_update
from peft_kernels.lora.gain.problem import Inputs

SUPPORT = Support(
    "PEFT: DoRA",
    (
        "`use_dora` on `lora.Linear`: on `nn.Linear` and `Conv1D`, in float32, half precision and under autocast",
        "`use_dora` on bitsandbytes' 4 bits (QDoRA), whose weight is decoded for each product; on layers with hooks"
        " the base module makes its output by itself, and the gain multiplies that",
        "magnitudes over rows of zeros, where PEFT has nan: a gain of 0",
    ),
)
_BESIDE = SUPPORT.rule("DoRA beside other active adapters", "a DoRA adapter of it is active beside others")
_BY_ROW = SUPPORT.rule(
    "DoRA among `adapter_names`, or in `mixed_batch`: PEFT raises", "rows choose among adapters with DoRA"
)
_REPLACED = SUPPORT.rule("methods of PEFT's DoRA classes that another tool replaced", "{method} was replaced")
_OTHER_VECTOR = SUPPORT.rule(
    "a magnitude vector of another class, hooked, or in another orientation than the weight",
    "its magnitude vector is not PEFT's own DoraLinearLayer beside an nn.Linear or a Conv1D",
)
_UP_BIAS = SUPPORT.rule("`lora_B` with a bias", "lora_B of its DoRA adapter has a bias")
_GIVEN_BASE = SUPPORT.rule(
    "DoRA on any other base module that makes its output by itself", "its DoRA adapter is on a {base}"
)
_OTHER_MAGNITUDE = SUPPORT.rule(
    "magnitudes that are a tensor subclass, of another shape or on another device",
    "its magnitudes are not N plain numbers beside the weight",
)
_DROPS = SUPPORT.rule(
    "dropout at work in training: PEFT's base product is then that of what is left of x, and so a second one",
    "its DoRA adapter drops elements of x, with p = {p}",
)

_METHODS = ("forward", "get_weight_norm", "get_lora_weight")
_OWN = OwnMethods(
    (DoraLinearVariant, "forward"),
    # Of older releases the first two.
    *((DoraLinearLayer, name) for name in _METHODS if hasattr(DoraLinearLayer, name)),
)
# Whether a base layer stores (in, out), as the magnitudes' ``fan_in_fan_out`` has to say too.
_TRANSPOSED = {nn.Linear: False, Conv1D: True}


class Gained(NamedTuple):
    """A call of a layer whose adapter is DoRA: ``lora_linear``'s arguments, and the magnitudes."""

    x: Tensor
    weight: Tensor
    lora_a: Tensor
    lora_b: Tensor
    scale: float | Tensor
    bias: Tensor | None
    magnitude: Tensor

    def inputs(self) -> Inputs:
        """As the operator takes it, but for the gain, in whose place its like is."""
        like = self.magnitude.detach().float() if self.x.dtype.itemsize < 8 else self.magnitude
        return Inputs(self.x, self.weight, self.lora_a, self.lora_b, like, self.scale, self.bias, 0.0, None)

    def run(self) -> Tensor:
        """The layer's output."""
        gain = dora_gain(self.weight, self.lora_a, self.lora_b, self.scale, self.magnitude)
        return lora_linear(*self[:6], gain=gain)


def is_dora(layer: Any, name: str) -> bool:
    """Whether an adapter of a layer is PEFT's DoRA."""
    return type(layer.lora_variant.get(name)) is DoraLinearVariant


def is_active(layer: Any) -> bool:
    """Whether an active adapter of a layer is."""
    return bool(layer.lora_variant) and any(is_dora(layer, name) for name in layer.active_adapters)


def why_not(layer: Any, adapters: list[Modules], by_row: bool) -> str | None:
    """Reason that lies in what a layer with an active DoRA adapter is made of."""
    if by_row:
        return _BY_ROW()
    if len(adapters) > 1:
        return _BESIDE()
    is_plain = bases.kind(layer) == bases.PLAIN
    if not is_plain and not bases.is_decoded_by_peft(layer):
        return _GIVEN_BASE(base=bases.name_of(layer))
    replaced = _OWN.replaced()
    if replaced is not None:
        return _REPLACED(method=replaced)
    (adapter,) = adapters
    vector = layer.lora_magnitude_vector[adapter.name]
    is_turned = is_plain and vector.fan_in_fan_out is not _TRANSPOSED[type(layer.base_layer)]
    if type(vector) is not DoraLinearLayer or is_hooked(vector) or is_turned:
        return _OTHER_VECTOR()
    return None if getattr(adapter.up, "bias", None) is None else _UP_BIAS()


def why_not_now(layer: Any, adapters: list[Modules]) -> str | None:
    """Reason that lies in the state of a layer, which may have no DoRA adapter."""
    if len(adapters) != 1 or not is_dora(layer, adapters[0].name):
        return None
    up, magnitude = adapters[0].up.weight, layer.lora_magnitude_vector[adapters[0].name].weight
    if not is_plain(magnitude) or magnitude.shape != up.shape[:1] or magnitude.device != up.device:
        return _OTHER_MAGNITUDE()
    p = _dropped(layer, adapters[0].dropout)
    return _DROPS(p=p) if p > 0 else None


def gained(layer: Any, operands: Operands, x: Tensor) -> Gained | None:
    """The call of a layer, all whose rules were asked; None where its adapters are no DoRA."""
    if not is_active(layer):
        return None
    weight, bias = base_of(operands)
    magnitude = vector_of(layer).weight
    return Gained(x, weight, operands.downs[0], operands.ups[0], operands.scalings[0], bias, magnitude)


def vector_of(layer: Any) -> Any:
    """The module that has the magnitudes of a layer whose one active adapter is DoRA."""
    (name,) = (name for name in layer.active_adapters if name in layer.lora_A)
    return layer.lora_magnitude_vector[name]


def result_dtype(layer: Any, y: torch.dtype) -> torch.dtype:
    """Of a DoRA layer on a given base whose output has dtype y: that, but where PEFT leaves all casts to autocast."""
    return torch.promote_types(y, vector_of(layer).weight.dtype) if bases.follows_autocast(layer) else y


def on_output(layer: Any, factors: Factors, x: Tensor, y: Tensor) -> Tensor:
    """A layer's output where its base module made y of x by itself; nothing is dropped."""
    vector, bias = vector_of(layer), layer.get_base_layer().bias
    down, up, scaling = factors.joined()
    gain = dora_gain(_decoded(layer, vector.fan_in_fan_out), down, up, scaling, vector.weight)
    # In the gain's dtype, which is wide: rounded once, as PEFT's sum is.
    scaled = y * gain if bias is None else torch.addcmul(bias * (1 - gain), y, gain)
    up = up * gain[:, None]
    return lora_update(scaled, x, down.to(up.dtype), up, scaling).to(result_dtype(layer, y.dtype))


def _decoded(layer: Any, is_transposed: bool) -> Tensor:
    """The base's weight (N, K), by PEFT's code."""
    with torch.no_grad():
        weight: Tensor = dequantize_module_weight(layer.get_base_layer()).detach()
    return weight.t() if is_transposed else weight


def _dropped(layer: Any, dropout: Any) -> float:
    """p of the dropout that PEFT's DoRA calls, which is in training alone."""
    if not layer.training or isinstance(dropout, nn.Identity) or not dropout.training:
        return 0.0
    return float(getattr(dropout, "p", 0.0))
