"""LoRA layers that run as one operation with those that are handed the same input: q, k and v; gate and up.

The member that is called first makes all outputs and parks the others', each of which is taken by its layer if that
would compute the same: the very input, weights, factors and numbers, unchanged, in the same modes. Else the layer
computes alone, as it does where the operation refuses the group.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor

from peft_kernels._core.autocast import is_any_autocast
from peft_kernels._core.errors import UnsupportedError
from peft_kernels._core.plans import is_seen_into
from peft_kernels.integrations import calls
from peft_kernels.integrations.faster import SLOWER, is_group_slower, is_timed
from peft_kernels.integrations.peft import bases, dora, layers, row_calls
from peft_kernels.integrations.peft.eligibility import operands_of_call
from peft_kernels.integrations.peft.layers import FusedLoraLinear
from peft_kernels.integrations.peft.operands import Operands, base_of, group_inputs, joined, updates_of
from peft_kernels.integrations.peft.siblings import Group, Scope, Siblings, values_of
from peft_kernels.integrations.report import count_fallback
from peft_kernels.lora import lora_linear
from peft_kernels.lora.group.op import OPERATOR, Update, group_call

PLACE = "_peft_kernels_place"
"""Attribute of a layer: the siblings that it is one of, and its name among them. Neither pickled nor left by revert."""


class GroupedLoraLinear(FusedLoraLinear):
    """A ``FusedLoraLinear`` that may be a member of a group."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As PEFT's; what it cannot fuse runs PEFT's own."""
        if isinstance(self, GroupedLoraLinear):
            siblings, name = place_of(self)
            scope = None if siblings is None else siblings.scope()
            is_apart = dora.is_active(self) or bases.kind(self) != bases.PLAIN
            if scope is not None and not is_apart and row_calls.chosen_by_rows(self, x, kwargs) is None:
                return _in_scope(self, scope, name, x, args, kwargs)
        return FusedLoraLinear.forward(self, x, *args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        make, arguments, state = FusedLoraLinear.__reduce_ex__(self, protocol)
        return make, arguments, {name: value for name, value in state.items() if name != PLACE}


def place_of(layer: Any) -> tuple[Siblings | None, str]:
    """A layer's siblings, and its name among them."""
    place: tuple[Siblings | None, str] = getattr(layer, PLACE, (None, ""))
    return place


def _in_scope(layer: Any, scope: Scope, name: str, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """A layer's call within its parent's."""
    if name in scope.siblings.unseen and not torch.compiler.is_compiling():
        scope.observe(name, x)
    if name not in scope.groups and not (args or kwargs or torch.compiler.is_compiling()):
        known = layers._known(layer, x)
        if known is not None and not known[1].is_timed:
            return layers._fused(*known)
    operands = _operands(layer, x, args, kwargs)
    if isinstance(operands, str):
        reason = operands
    else:
        y = scope.take(name, x, operands.values())
        if y is None:
            y = _lead(layer, scope, name, x, operands)
        if y is not None:
            return y
        try:
            if not (is_timed(x) and _is_left_to_peft(layer, scope, x, operands)):
                return _alone(scope, name, x, operands)
            reason = SLOWER()
        except ValueError as error:
            reason = calls.why_not_operation(error)
    count_fallback(layer, reason)
    return PeftLinear.forward(layer, x, *args, **kwargs)


def _operands(layer: Any, x: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Operands | str:
    """What ``operands_of_call`` returns, sooner where all is as it nearly always is."""
    is_usual = not (args or kwargs or torch.compiler.is_compiling() or is_any_autocast() or is_seen_into())
    found = layers.usual(layer) if is_usual else None
    if found is not None and calls.why_not_input(x) is None and _fits(layer, x, *found):
        weight, down, up, scaling, bias, p = found
        return Operands(weight, bias, False, [down], [up], [None], [scaling], [p])
    return operands_of_call(layer, x, args, kwargs)


def _fits(layer: Any, x: Tensor, weight: Any, down: Any, up: Any, scaling: float, bias: Any, p: float) -> bool:
    """Whether no rule about dtypes, devices and kinds of tensors stands against what a layer usually is."""
    for tensor in (weight, down, up, weight if bias is None else bias):
        if not calls.is_plain(tensor) or tensor.device != x.device:
            return False
    if down.dtype != x.dtype and (down.dtype != torch.float32 or not getattr(layer, "cast_input_dtype_enabled", True)):
        return False
    return p < 1 and weight.dtype == x.dtype and up.dtype == down.dtype


def _alone(scope: Scope, name: str, x: Tensor, operands: Operands) -> Tensor:
    """A layer's output, with the masks that it has in a group."""
    if not operands.drops():
        return layers._fused(joined(operands, x))
    seed, (weight, bias) = scope.seed_for(name, x), base_of(operands)
    updates = _updates(scope.siblings, {name: operands})
    if len(updates) == 1 and updates[0].lane == 0:
        _, down, up, scaling, p, _ = updates[0]
        y = lora_linear(x, weight, down, up, scaling, bias, dropout_p=p, seed=seed.value)
    else:
        (y,) = group_call(x, (weight,), (bias,), updates, seed.value)
    seed.used.add(name)
    return y


def _lead(layer: Any, scope: Scope, name: str, x: Tensor, operands: Operands) -> Tensor | None:
    """A layer's output from one operation with those of its group that are to come; None: it has to compute alone."""
    group = scope.groups.get(name)
    if group is None or group[-1] == name or scope.waits(group):
        return None
    members = _members(layer, scope, group, name, x, operands)
    if len(members) < 2:
        return None
    made_of = {}
    for each, theirs in members.items():
        values = values_of([x, *theirs.values()])
        if values is None:
            return None
        made_of[each] = values
    frozen = [base_of(theirs) for theirs in members.values()]
    weights, biases = tuple([weight for weight, _ in frozen]), tuple([bias for _, bias in frozen])
    updates = _updates(scope.siblings, members)
    if is_timed(x) and not scope.is_forced:
        parts: list[Any] = [scope.parent._modules[each] for each in members]

        def runs() -> tuple[Any, Any]:
            own = [_own_call(part, joined(theirs, x)) for part, theirs in zip(parts, members.values(), strict=True)]
            return partial(_timed_group, scope, parts, tuple(members)), lambda x: tuple(run(x) for run in own)

        if is_group_slower(parts, OPERATOR, group_inputs(x, weights, biases, updates), runs):
            return None
    seed = scope.seed_for(name, x) if operands.drops() else None
    try:
        y, *others = group_call(x, weights, biases, updates, None if seed is None else seed.value)
    except (ValueError, UnsupportedError):
        # What is wrong with a layer's own call, that call says.
        return None
    if seed is not None:
        seed.used.add(name)
    followers = list(members)[1:]
    outputs = {each: (out, made_of[each]) for each, out in zip(followers, others, strict=True)}
    scope.park(group, x, outputs, seed)
    return y


def _members(layer: Any, scope: Scope, group: Group, name: str, x: Tensor, operands: Operands) -> dict[str, Operands]:
    """A layer and those after it in its group that can be fused with it now."""
    members = {name: operands}
    if is_timed(x) and operands.drops() and _is_left_to_peft(layer, scope, x, operands):
        return members
    for each in group[group.index(name) + 1 :]:
        member = scope.parent._modules.get(each)
        if not isinstance(member, GroupedLoraLinear) or place_of(member)[0] is not scope.siblings:
            continue
        if dora.is_active(member) or bases.kind(member) != bases.PLAIN:
            continue
        theirs = _operands(member, x, (), {})
        if isinstance(theirs, str):
            continue
        if theirs.drops():
            # A mask is that which the layer would have alone: of a seed that is drawn now, and not by its own call.
            is_drawn = operands.drops() and scope.unused_seed(each, x) is scope.unused_seed(name, x)
            if not is_drawn or (is_timed(x) and _is_left_to_peft(member, scope, x, theirs)):
                continue
        members[each] = theirs
    return members


def _updates(siblings: Siblings, members: dict[str, Operands]) -> list[Update]:
    """Updates of members in their order, in the lanes that their places among the siblings give them."""
    lanes = siblings.lanes
    return [
        update
        for index, (name, operands) in enumerate(members.items())
        for update in updates_of(operands, index, lanes[name], len(lanes))
    ]


def _timed_group(scope: Scope, parts: list[Any], names: Group, x: Tensor) -> tuple[Tensor, ...]:
    """The members' calls as a group, with all that is asked and compared."""
    inside = Scope(scope.siblings, scope.parent, scope.mode)
    inside.groups, inside.is_forced = dict.fromkeys(names, names), True
    return tuple(_in_scope(part, inside, name, x, (), {}) for part, name in zip(parts, names, strict=True))


def _own_call(layer: Any, call: Any) -> Callable[[Tensor], Tensor]:
    """What runs a call of a layer by itself."""
    if layers.is_faster_by_peft(layer, call):
        return lambda x: PeftLinear.forward(layer, x)
    return lambda x: layers._fused(call._replace(x=x))


def _is_left_to_peft(layer: Any, scope: Scope, x: Tensor, operands: Operands) -> bool:
    """Whether the clock leaves a call that is timed to PEFT.

    Not where groups are forced and masks are drawn, which PEFT draws otherwise: they are those that a group draws.
    """
    if scope.is_forced and operands.drops():
        return False
    return layers.is_faster_by_peft(layer, joined(operands, x))
