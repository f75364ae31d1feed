"""PEFT's LoRA layers on bitsandbytes' 4-bit weights (QLoRA) on ``lora_linear``, where that is what PEFT computes.

bitsandbytes multiplies in the layer's compute dtype, to which it decodes the weight, and returns x's dtype. So does the
operation, in one pass for product and update. Everything else is as on any given base: bitsandbytes' own layer is
called, and the update is added to what it returns. On a CPU PEFT's own forward runs, unless a backend is forced.

What bitsandbytes knows of a weight is read once, and again when the weight or what is known of it is another.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
from bitsandbytes import nn as bitsandbytes
from bitsandbytes.autograd import _functions as products
from peft.tuners.lora.bnb import Linear4bit as PeftLinear4bit
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from peft_kernels._core.autocast import autocast_dtype
from peft_kernels._core.errors import UnsupportedError
from peft_kernels._core.operator import Operator
from peft_kernels.four_bit_weight.quant_state import QuantizedWeight, from_quant_state, understood
from peft_kernels.integrations import calls
from peft_kernels.integrations.faster import is_library_faster, is_timed
from peft_kernels.integrations.hooks import OwnMethods, is_hooked
from peft_kernels.integrations.peft import bases, dora, given, row_calls
from peft_kernels.integrations.peft.eligibility import factors_of_call
from peft_kernels.integrations.peft.operands import Factors
from peft_kernels.integrations.peft.row_calls import chosen_by_rows
from peft_kernels.integrations.sites import Swapped
from peft_kernels.lora import dora_gain
from peft_kernels.lora.four_bit.op import OPERATOR, four_bit_call, inputs_of
from peft_kernels.lora.gain_four_bit.op import OPERATOR as GAIN
from peft_kernels.lora.gain_four_bit.op import four_bit_with_gain
from peft_kernels.lora.gain_four_bit.op import inputs_of as inputs_with_gain
from peft_kernels.lora.members import Update

_OWN = OwnMethods(
    (bitsandbytes.Linear4bit, "forward"),
    (bitsandbytes.Linear4bit, "set_compute_type"),
    (products, "matmul_4bit"),
)


class FusedLoraLinear4bit(Swapped, PeftLinear4bit):
    """PEFT's ``lora.bnb.Linear4bit`` whose base product and low-rank update are one operation."""

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As PEFT's; what it cannot fuse runs as on any other base module."""
        # A tool may have kept this method, and call it after revert.
        if isinstance(self, FusedLoraLinear4bit):
            by_row = chosen_by_rows(self, x, kwargs)
            if by_row is not None:
                return row_calls.run(self, by_row, x, args, kwargs)
            call = _call(self, x, args, kwargs)
            try:
                if call is not None and not (is_timed(x) and _is_faster_by_peft(self, call)):
                    return _fused(call)
            except ValueError as error:
                calls.why_not_operation(error)
            return given.run(self, x, args, kwargs)
        y: Tensor = PeftLinear4bit.forward(self, x, *args, **kwargs)
        return y


class _Call(NamedTuple):
    """The operation that a layer's call is; ``magnitude`` and the result's ``dtype`` where its adapter is DoRA."""

    x: Tensor
    weight: QuantizedWeight
    bias: Tensor | None
    updates: list[Update]
    magnitude: Tensor | None = None
    dtype: torch.dtype | None = None


def _call(layer: Any, x: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call | None:
    """The operation that a call of the layer is; None where it is none, or slower than what bitsandbytes has."""
    base = layer.base_layer
    if not isinstance(x, Tensor) or bases.is_left_to_peft(x):
        return None
    if type(base).forward is not bitsandbytes.Linear4bit.forward or is_hooked(base) or _OWN.replaced() is not None:
        return None
    factors = factors_of_call(layer, x, args, kwargs)
    if isinstance(factors, str):
        return None
    weight = weight_of(base)
    if isinstance(weight, str) or weight.packed.device != x.device:
        return None
    dtype = _compute_dtype(base, x)
    is_right = x.dtype == dtype and autocast_dtype(x.device.type) in (None, dtype)
    if not is_right or factors.downs[0].dtype not in (dtype, torch.float32):
        return None
    call = _Call(x, weight._replace(dtype=dtype), base.bias, _updates(factors))
    if not dora.is_active(layer):
        return call
    return call._replace(magnitude=dora.vector_of(layer).weight, dtype=dora.result_dtype(layer, dtype))


def _updates(factors: Factors) -> list[Update]:
    if not factors.drops():
        return [Update(0, *factors.joined(), 0.0, 0)]
    adapters = zip(factors.downs, factors.ups, factors.scalings, factors.ps, strict=True)
    return [Update(0, down, up, scaling, p, lane) for lane, (down, up, scaling, p) in enumerate(adapters)]


def _compute_dtype(base: Any, x: Tensor) -> torch.dtype:
    """In which bitsandbytes multiplies; what its forward sets is set, and the bias cast, as there."""
    if not base.compute_type_is_set:
        base.set_compute_type(x)
        base.compute_type_is_set = True
    dtype: torch.dtype = x.dtype if base.compute_dtype is None else base.compute_dtype
    if base.bias is not None and base.bias.dtype != dtype:
        base.bias.data = base.bias.data.to(dtype)
    return dtype


def _fused(call: _Call) -> Tensor:
    if call.magnitude is None:
        (y,) = four_bit_call(call.x, (call.weight,), (call.bias,), call.updates)
        return y
    (update,) = call.updates
    gain = dora_gain(call.weight, update.lora_a, update.lora_b, update.scale, call.magnitude)
    return four_bit_with_gain(call.x, call.weight, call.bias, update, gain).to(call.dtype)


def _is_faster_by_peft(layer: Any, call: _Call) -> bool:
    """Whether PEFT's forward should run a call that is timed."""
    operator: Operator = OPERATOR
    inputs: Any = inputs_of(call.x, (call.weight,), (call.bias,), call.updates, 0)
    if call.magnitude is not None:
        # The gain is not made yet; it has the magnitudes' shape, and float32.
        operator, gain = GAIN, call.magnitude.detach().float()
        inputs = inputs_with_gain(call.x, call.weight, call.bias, call.updates[0], gain, 0)

    def ours(x: Tensor) -> Tensor:
        return _fused(call._replace(x=x))

    def theirs(x: Tensor) -> Tensor:
        y: Tensor = PeftLinear4bit.forward(layer, x)
        return y

    return is_library_faster(layer, operator, inputs, ours, theirs)


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
        return str(error)
