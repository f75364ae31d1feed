"""PEFT's LoRA layers on bitsandbytes' 4-bit weights (QLoRA) on ``lora_linear``, as layers.py has it for plain ones.

bitsandbytes multiplies in the layer's compute dtype, to which it decodes the weight, and returns x's dtype. So does the
operation, in one pass for product and update: without PEFT's clone of the product, its scaled copy and its sum.

What bitsandbytes knows of a weight is read once, and again when the weight or what is known of it is another.
"""

from __future__ import annotations

import operator
from functools import partial
from typing import Any, NamedTuple

import torch
from bitsandbytes import nn as bitsandbytes
from bitsandbytes.autograd import _functions as products
from peft.tuners.lora.bnb import Linear4bit as PeftLinear4bit
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from peft_kernels._core.autocast import autocast_dtype
from peft_kernels._core.errors import UnsupportedError
from peft_kernels.four_bit_weight.quant_state import QuantizedWeight, from_quant_state, understood
from peft_kernels.integrations import calls
from peft_kernels.integrations.faster import SLOWER, is_library_faster, is_timed
from peft_kernels.integrations.hooks import OwnMethods, has_other_forward, is_hooked
from peft_kernels.integrations.peft.eligibility import (
    is_unused,
    why_not_adapters,
    why_not_operands,
    why_not_state,
)
from peft_kernels.integrations.peft.operands import Lanes, Operands, active, joined, operands_of
from peft_kernels.integrations.report import count_fallback
from peft_kernels.integrations.rules import Support
from peft_kernels.integrations.sites import Site, Swapped, library_class
from peft_kernels.lora.four_bit.op import OPERATOR, four_bit_call, inputs_of
from peft_kernels.lora.members import Update

SUPPORT = Support(
    "PEFT: LoRA layers on 4-bit weights",
    (
        "`lora.bnb.Linear4bit`: NF4 and FP4 of bitsandbytes, with double quantization or without, any `quant_storage`",
        "what `lora.Linear` fuses, but for `adapter_names`, `mixed_batch` and aLoRA",
    ),
)
_REPLACED = SUPPORT.rule("methods that another tool replaced, of bitsandbytes' too", "{method} was replaced")
_OTHER_FORWARD = SUPPORT.rule("a forward put on the layer", "its forward was replaced")
_OTHER_BASE = SUPPORT.rule("a base layer of another class", "its base layer is {base}, not bitsandbytes' Linear4bit")
_NOT_READ = SUPPORT.rule(
    "a weight without a `quant_state`, a wrapped one, one that is packed anew for a CPU", "{error}"
)
_BY_ROW = SUPPORT.rule("`adapter_names`", "rows choose adapters, and its weight is 4-bit")
_COMPUTE_DTYPE = SUPPORT.rule(
    "autocast to another dtype than `bnb_4bit_compute_dtype`", "autocast is to {autocast}, the compute dtype {compute}"
)
_WIDE_INPUT = SUPPORT.rule(
    "float32 activations under autocast, to which PEFT adds updates in float32", "x is {x}, and autocast to {autocast}"
)

_OWN = OwnMethods(
    *((PeftLinear4bit, name) for name in ("forward", "_cast_input_dtype", "_check_forward_args")),
    (bitsandbytes.Linear4bit, "forward"),
    (bitsandbytes.Linear4bit, "set_compute_type"),
    (products, "matmul_4bit"),
    *((cls, "forward") for cls in (nn.Linear, nn.Dropout)),
)


class FusedLoraLinear4bit(Swapped, PeftLinear4bit):
    """PEFT's ``lora.bnb.Linear4bit`` whose base product and low-rank update are one operation."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As PEFT's; what it cannot fuse runs PEFT's own."""
        # A tool may have kept this method, and call it after revert.
        if isinstance(self, FusedLoraLinear4bit):
            call = _call(self, x, args, kwargs)
            if isinstance(call, Lanes):
                try:
                    if not (is_timed(x) and _is_faster_by_peft(self, call)):
                        return _fused(call)
                    call = SLOWER()
                except ValueError as error:
                    call = calls.why_not_operation(error)
            count_fallback(self, call)
        y: Tensor = PeftLinear4bit.forward(self, x, *args, **kwargs)
        return y


def site(name: str, module: nn.Module) -> Site | None:
    """A layer by itself; None where it is no layer on a 4-bit weight."""
    if library_class(module) is not PeftLinear4bit:
        return None
    return Site(
        {name: module},
        {PeftLinear4bit: FusedLoraLinear4bit},
        why_not=partial(_why_not, module),
        why_not_now=partial(_why_not_now, module),
        is_unused=partial(is_unused, module),
    )


def _why_not(layer: Any) -> str | None:
    """Reason that lies in what the layer is, and is made of."""
    if has_other_forward(layer):
        return _OTHER_FORWARD()
    return _why_not_base(layer) or why_not_adapters(layer, active(layer)) or _why_not_weight(layer.base_layer)


def _why_not_now(layer: Any) -> str | None:
    """Reason that lies in the layer's state: what its methods change."""
    adapters = active(layer)
    if not adapters and not layer.disable_adapters and not layer.merged:
        return None
    return why_not_state(layer, adapters)


def _why_not_base(layer: Any) -> str | None:
    replaced = _OWN.replaced()
    if replaced is not None or "_cast_input_dtype" in layer.__dict__:
        return _REPLACED(method=replaced or "its _cast_input_dtype")
    base = layer.base_layer
    if type(base).forward is not bitsandbytes.Linear4bit.forward:
        return _OTHER_BASE(base=type(base).__name__)
    return None


def _why_not_weight(base: Any) -> str | None:
    reason = weight_of(base)
    return reason if isinstance(reason, str) else None


def _call(layer: Any, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Lanes | str:
    """The operation that a call of the layer is, or the reason why it is none."""
    adapters = active(layer)
    reason = why_not_state(layer, adapters) or _why_not_base(layer)
    reason = reason or why_not_adapters(layer, adapters, hooked=is_hooked(layer.base_layer)) or calls.why_not_input(x)
    if reason is None and kwargs.get("adapter_names") is not None:
        reason = _BY_ROW()
    if reason is not None:
        return reason
    weight = weight_of(layer.base_layer)
    if isinstance(weight, str):
        return weight
    dtype = _compute_dtype(layer.base_layer, x)
    read = operands_of(layer, adapters)
    operands = _FourBit(*read._replace(weight=weight._replace(dtype=dtype), is_transposed=False))  # type: ignore[arg-type]
    reason = _why_not_autocast(x, dtype) or why_not_operands(layer, operands, x, args, kwargs)
    if reason is not None:
        return reason
    call = joined(operands, x)
    if isinstance(call, Lanes):
        return call
    return Lanes(x, call.weight, call.bias, [Update(0, call.lora_a, call.lora_b, call.scale, call.dropout_p, 0)])


class _FourBit(Operands):
    """A call's operands whose weight is 4-bit, in the compute dtype."""

    def tensors(self) -> Any:
        return Operands.tensors(self._replace(weight=self.weight.packed))  # type: ignore[attr-defined]


def _why_not_autocast(x: Tensor, compute: torch.dtype) -> str | None:
    """bitsandbytes decodes to the compute dtype, and torch then multiplies in autocast's."""
    dtype = autocast_dtype(x.device.type)
    if dtype is None:
        return None
    if dtype != compute:
        return _COMPUTE_DTYPE(autocast=dtype, compute=compute)
    return None if x.dtype == dtype else _WIDE_INPUT(x=x.dtype, autocast=dtype)


def _compute_dtype(base: Any, x: Tensor) -> torch.dtype:
    """In which bitsandbytes multiplies; what its forward sets is set, and the bias cast, as there."""
    if not base.compute_type_is_set:
        base.set_compute_type(x)
        base.compute_type_is_set = True
    dtype: torch.dtype = x.dtype if base.compute_dtype is None else base.compute_dtype
    if base.bias is not None and base.bias.dtype != dtype:
        base.bias.data = base.bias.data.to(dtype)
    return dtype


def _fused(call: Lanes) -> Tensor:
    (y,) = four_bit_call(call.x, (call.weight,), (call.bias,), call.updates)
    return y


def _is_faster_by_peft(layer: Any, call: Lanes) -> bool:
    """Whether PEFT's forward should run a call that is timed."""
    inputs = inputs_of(call.x, (call.weight,), (call.bias,), call.updates, 0)

    def ours(x: Tensor) -> Tensor:
        return _fused(call._replace(x=x))

    def theirs(x: Tensor) -> Tensor:
        y: Tensor = PeftLinear4bit.forward(layer, x)
        return y

    return is_library_faster(layer, OPERATOR, inputs, ours, theirs)


class _Read(NamedTuple):
    """What was read of a weight, and what it was read from."""

    place: tuple[int, int]
    parts: tuple[Any, ...]
    weight: QuantizedWeight | str


# By the weight itself: what was read of it goes with it.
_read: WeakIdKeyDictionary = WeakIdKeyDictionary()


def weight_of(base: Any) -> QuantizedWeight | str:
    """The weight of a layer of bitsandbytes', or the reason why it is not understood."""
    packed: Any = base._parameters.get("weight")
    state = getattr(packed, "quant_state", None)
    if not isinstance(packed, Tensor) or state is None:
        return _read_anew(packed, state)
    if torch.compiler.is_compiling():
        return understood(packed, state)
    second = getattr(state, "state2", None)
    parts = state, *(getattr(state, name, None) for name in _STATISTICS), getattr(second, "absmax", None)
    with torch._C.DisableTorchFunctionSubclass():
        place = packed.data_ptr(), packed._version
    known = _read.get(packed)
    if known is None or known.place != place or not all(map(operator.is_, known.parts, parts)):
        known = _read[packed] = _Read(place, parts, _read_anew(packed, state))
    return known.weight


_STATISTICS = ("absmax", "offset", "state2", "shape", "blocksize", "packing_format_for_cpu")


def _read_anew(packed: Any, state: Any) -> QuantizedWeight | str:
    try:
        return from_quant_state(packed, state)
    except UnsupportedError as error:
        return _NOT_READ(error=error)
