"""Adapters of one layer that rows of a batch choose among, as one update of several slots."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.tuners.lora.model import _adapter_names_pre_forward_hook
from torch import Tensor

from peft_kernels._core.cuda_tools import is_capturing
from peft_kernels._core.plans import is_seen_into
from peft_kernels._core.rows import Rows
from peft_kernels.integrations.peft.operands import Factors, Modules, Operands, base_of
from peft_kernels.lora.rows.op import SlotUpdate, table_of


class Slots(NamedTuple):
    """A call of a layer in which rows choose among adapters; weight is None where the base module is given."""

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    updates: list[SlotUpdate]
    rows: Rows


class _Stack(NamedTuple):
    """Factors of several adapters, and what they were made of."""

    made_of: tuple[Any, ...]
    lora_a: Tensor
    lora_b: Tensor


# By the hook through which PEFT hands a layer its names: it is there for one call of the model, or of generate.
_stacks: WeakKeyDictionary[Any, _Stack | None] = WeakKeyDictionary()


def named(layer: PeftLinear, names: Sequence[str]) -> list[Modules]:
    """Those of a layer's adapters that have one of the names."""
    downs, ups, dropouts = layer.lora_A, layer.lora_B, layer.lora_dropout
    return [
        Modules(name, downs[name], ups[name], dropouts[name], layer.scaling[name]) for name in names if name in downs
    ]


def slots_of(layer: PeftLinear, operands: Operands | Factors, of: Sequence[Modules], x: Tensor, rows: Rows) -> Slots:
    """The call that operands of some of a plan's adapters make; the others have no ranks here."""
    places = {module.name: place for place, module in enumerate(of)}
    ranks, ps, scalings = [], [], []
    for name in rows.names:
        place = places.get(name)
        ranks.append(0 if place is None else operands.downs[place].shape[0])
        ps.append(0.0 if place is None else operands.ps[place])
        scalings.append(0.0 if place is None else operands.scalings[place])
    scales: Any = tuple(scalings)
    if any(isinstance(scaling, Tensor) for scaling in scalings):
        scales = torch.stack([torch.as_tensor(scaling, device=x.device) for scaling in scalings])
    lora_a, lora_b = _stacked(layer, operands.downs, operands.ups)
    weight, bias = base_of(operands) if isinstance(operands, Operands) else (None, None)
    table = table_of(ranks, ps, lora_a.device)
    return Slots(x, weight, bias, [SlotUpdate(0, lora_a, lora_b, scales, table)], rows)


def _stacked(layer: Any, downs: list[Tensor], ups: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Factors under each other and side by side.

    Without gradients they are kept from a call's second step on, while PEFT's call of the model lasts and no part has
    changed: every token that is generated finds them. Between calls a part may be written unseen, through ``.data``.
    """
    if len(downs) == 1:
        return downs[0], ups[0]
    hook = None if torch.compiler.is_compiling() or torch.is_grad_enabled() else _hook_of(layer)
    made_of = None if hook is None else _state([*downs, *ups])
    if made_of is None:
        return torch.cat(downs), torch.cat(ups, dim=1)
    kept = _stacks.get(hook)
    if kept is not None and kept.made_of == made_of:
        return kept.lora_a, kept.lora_b
    is_first = hook not in _stacks
    stack = _Stack(made_of, torch.cat(downs), torch.cat(ups, dim=1))
    if is_first:
        _stacks[hook] = None
    elif not is_capturing(downs[0].device):
        _stacks[hook] = stack
    return stack.lora_a, stack.lora_b


def _hook_of(layer: Any) -> Any:
    """What PEFT's call put on the layer, if it did, the last one; it is another one in each call."""
    found = None
    for hook in layer._forward_pre_hooks.values():
        if type(hook) is partial and hook.func is _adapter_names_pre_forward_hook:
            found = hook
    return found


def _state(parts: list[Tensor]) -> tuple[Any, ...] | None:
    """What changes where one of them is written, or lies elsewhere; None where that could not be seen."""
    if is_seen_into() or any(part.is_inference() for part in parts):
        return None
    stream = torch.cuda.current_stream(parts[0].device).cuda_stream if parts[0].is_cuda else None
    return stream, *[(id(part), part._version, part.data_ptr()) for part in parts]
