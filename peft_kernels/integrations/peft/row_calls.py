"""Calls of LoRA layers whose rows choose adapters: which adapter each row has, and the operation that the call is.

A base module that makes its output by itself is called once, for the whole batch, and its output is never written to,
as PEFT's loop over the adapters does.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from peft_kernels._core.errors import UnsupportedError
from peft_kernels.integrations import calls
from peft_kernels.integrations.peft import bases, mixed
from peft_kernels.integrations.peft.by_row import ByRow
from peft_kernels.integrations.peft.eligibility import is_late, slots_of_call, why_not_output
from peft_kernels.integrations.peft.operands import active
from peft_kernels.integrations.peft.slots import Slots
from peft_kernels.integrations.report import count_fallback
from peft_kernels.integrations.sites import library_class
from peft_kernels.lora.rows.op import rows_call
from peft_kernels.lora.update_rows.op import update_rows_call


def chosen_by_rows(layer: Any, x: Any, kwargs: dict[str, Any]) -> ByRow | None:
    """Which adapter each row of a call uses; None where all use the active ones."""
    batch, names = mixed.of(layer), kwargs.get("adapter_names")
    if batch is not None:
        if names is not None:
            raise ValueError("mixed_batch: a call within its block has adapter_names of its own")
        return batch.for_layer(x)
    offsets = kwargs.get("alora_offsets")
    if isinstance(names, (list, tuple)):
        return ByRow.of(names, offsets)
    if names is None and layer.lora_variant and isinstance(x, Tensor) and x.dim() > 1:
        adapters = active(layer)
        if len(adapters) == 1 and is_late(layer, adapters[0].name):
            return ByRow.of([adapters[0].name] * x.shape[0], offsets)
    return None


def run(layer: Any, by_row: ByRow, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """A layer's output where rows choose adapters."""
    call = slots_of_call(layer, by_row, x, args, kwargs, is_peft_s=mixed.of(layer) is None)
    if call is None:
        y: Tensor = bases.call(layer, x)
        return y
    called = layer
    if isinstance(call, Slots):
        given = None
        if call.weight is None:
            # A base module is not called again, whatever comes of its output; an error of its own is the caller's.
            given = bases.call(layer, x)
            called = bases.with_output(layer, given)
        try:
            made = _made(layer, call, x, given)
            if isinstance(made, Tensor):
                return made
            call = made
        except ValueError as error:
            call = calls.why_not_operation(error)
    count_fallback(layer, call)
    if mixed.of(layer) is not None:
        if not layer.disable_adapters and not bases.takes_names(layer):
            raise UnsupportedError(f"mixed_batch: {call}, and PEFT's layer there takes no adapter_names")
        kwargs = kwargs | {"adapter_names": list(by_row.names), "alora_offsets": by_row.offsets}
    y = library_class(layer).forward(called, x, *args, **kwargs)
    return y


def _made(layer: Any, call: Slots, x: Tensor, given: Any) -> Tensor | str:
    """The operation's result, or the reason that lies in what a base module returned."""
    if call.weight is not None:
        return run_slots(call)
    update = call.updates[0]
    reason = why_not_output(layer, update.lora_b, x, given)
    return reason or update_rows_call(given, _cast(layer, x, update.lora_b), update, call.rows)


def run_slots(call: Slots) -> Tensor:
    """The operation that a call is whose frozen product is this package's."""
    assert call.weight is not None
    (y,) = rows_call(call.x, (call.weight,), (call.bias,), call.updates, call.rows)
    return y


def _cast(layer: Any, x: Tensor, factor: Tensor) -> Tensor:
    """x as PEFT's layer hands it to its adapters."""
    return x if bases.follows_autocast(layer) else x.to(bases.cast_of(x.dtype, factor.dtype))
