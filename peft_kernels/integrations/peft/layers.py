"""PEFT's LoRA layers on ``lora_linear`` and ``lora_update``: the layer's class is swapped, its state is not touched.

A swapped layer decides at each call whether ``lora_linear`` computes exactly what PEFT's forward would; if not, that
forward runs, and the reason is counted. The class has no ``__init__`` and no attributes, so everything that works on
PEFT's layer works on it: ``isinstance``, pickling, deepcopy, merging, hotswapping, hooks on the layer itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from peft_kernels._core.autocast import is_any_autocast
from peft_kernels._core.plans import Plan, Recent
from peft_kernels.integrations import calls
from peft_kernels.integrations.faster import SLOWER, is_library_faster, is_timed
from peft_kernels.integrations.peft import bases, dora, given, ia3, row_calls
from peft_kernels.integrations.peft.dora import Gained
from peft_kernels.integrations.peft.eligibility import (
    OWN,
    is_unused,
    operands_of_call,
    why_not,
    why_not_now,
)
from peft_kernels.integrations.peft.merging import Merging
from peft_kernels.integrations.peft.operands import Lanes, joined
from peft_kernels.integrations.peft.row_calls import chosen_by_rows
from peft_kernels.integrations.report import count_fallback
from peft_kernels.integrations.sites import Site, library_class
from peft_kernels.lora import lora_linear
from peft_kernels.lora.gain.op import OPERATOR as GAIN
from peft_kernels.lora.group.op import OPERATOR as GROUP
from peft_kernels.lora.group.op import group_call
from peft_kernels.lora.linear.op import OPERATOR
from peft_kernels.lora.linear.problem import Inputs

# Of layers with one adapter, whose scaling is a float and whose dropout is not at work.
_RECENT = Recent()


class FusedLoraLinear(Merging, PeftLinear):
    """PEFT's ``lora.Linear`` whose base product and low-rank update are one operation."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As PEFT's; what it cannot fuse runs PEFT's own."""
        # A tool may have kept this method, and call it after revert.
        if isinstance(self, FusedLoraLinear):
            by_row = chosen_by_rows(self, x, kwargs)
            if by_row is not None:
                return row_calls.run(self, by_row, x, args, kwargs)
            known = None if args or kwargs or torch.compiler.is_compiling() else _known(self, x)
            if known is not None and not known[1].is_timed:
                return _fused(*known)
            if known is None and bases.kind(self) == bases.GIVEN:
                return given.run(self, x, args, kwargs)
            call, plan = (_call(self, x, args, kwargs), None) if known is None else known
            if isinstance(call, tuple):
                try:
                    if not (is_timed(x) and is_faster_by_peft(self, call)):
                        return _fused(call, plan)
                    call = SLOWER()
                except ValueError as error:
                    call = calls.why_not_operation(error)
            count_fallback(self, call)
        return PeftLinear.forward(self, x, *args, **kwargs)


def sites(model: nn.Module) -> Iterator[Site]:
    """PEFT's layers, each by itself."""
    for name, module in model.named_modules():
        if ia3.is_layer(module):
            yield Site(
                {name: module},
                ia3.classes(module),
                why_not=partial(ia3.why_not, module),
                why_not_now=partial(ia3.why_not_now, module),
                is_unused=partial(ia3.is_unused, module),
            )
        elif isinstance(module, BaseTunerLayer):
            yield Site(
                {name: module},
                _classes(module),
                why_not=partial(why_not, module),
                why_not_now=partial(why_not_now, module),
                is_unused=partial(is_unused, module),
            )


def _classes(layer: Any) -> dict[type[nn.Module], type[nn.Module]]:
    """A layer's class and the one in its place; a class that is not known has none."""
    cls: Any = library_class(layer)
    if cls is PeftLinear:
        return {PeftLinear: FusedLoraLinear}
    if bases.is_four_bit(cls):
        # PEFT has imported bitsandbytes where there is such a layer.
        from peft_kernels.integrations.peft import four_bit

        return {cls: four_bit.FusedLoraLinear4bit}
    return {cls: given.class_of(cls)} if bases.is_known(cls) else {}


def _call(layer: PeftLinear, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs | Lanes | Gained | str:
    """The operation that a call of the layer is, or the reason why it is none."""
    operands = operands_of_call(layer, x, args, kwargs)
    return operands if isinstance(operands, str) else dora.gained(layer, operands, x) or joined(operands, x)


def usual(layer: Any) -> tuple[Any, ...] | None:
    """Weight, A, B, scaling, bias and p of a layer as it nearly always is: one adapter, and nobody has touched it.

    None: look closer. What is read of modules is read where it lies; of tensors nothing is asked.
    """
    state, active = layer.__dict__, layer.active_adapter
    if type(active) is not list or len(active) != 1 or layer.disable_adapters or layer.merged_adapters:
        return None
    name, parts = active[0], state["_modules"]
    base, down, up = parts["base_layer"], parts["lora_A"]._modules.get(name), parts["lora_B"]._modules.get(name)
    dropout, scaling = parts["lora_dropout"]._modules.get(name), layer.scaling.get(name)
    if type(base) is not nn.Linear or type(down) is not nn.Linear or type(up) is not nn.Linear:
        return None
    if type(dropout) is not nn.Identity and (type(dropout) is not nn.Dropout or dropout.inplace):
        return None
    for part in (base, down, up, dropout):
        kept = part.__dict__
        if (
            kept["_forward_hooks"]
            or kept["_forward_pre_hooks"]
            or kept["_backward_hooks"]
            or kept["_backward_pre_hooks"]
            or "forward" in kept
        ):
            return None
    if name in layer.lora_variant or "_cast_input_dtype" in state:
        return None
    if calls.has_any_global_hook() or OWN.replaced() is not None:
        return None
    weight, bias = base._parameters.get("weight"), base._parameters.get("bias")
    of_down, of_up = down._parameters, up._parameters
    if type(scaling) is not float or of_down.get("bias") is not None or of_up.get("bias") is not None:
        return None
    p = dropout.p if type(dropout) is nn.Dropout and dropout.training else 0.0
    return weight, of_down.get("weight"), of_up.get("weight"), scaling, bias, p


def _known(layer: Any, x: Any) -> tuple[Any, Plan] | None:
    """What ``_call`` returns for a layer as it nearly always is, and a plan for it; None: look closer.

    Nothing is remembered of a layer, so nothing can be outdated. What ``_call`` asks of tensors was asked when the plan
    of their key was made, but for the rules that are PEFT's own.
    """
    operands = usual(layer)
    if operands is None or operands[5]:
        return None
    # A plain tuple, which costs a fifth of a named one.
    call = x, *operands, None
    bias = operands[4]
    plan = _RECENT.get(id(layer), call[:4] if bias is None else (*call[:4], bias))
    return (call, plan) if plan is not None and plan.native is not None else _planned(layer, Inputs._make(call))


def _planned(layer: Any, call: Inputs) -> tuple[Inputs, Plan] | None:
    """The same from where the operation is known but for its plan."""
    plan = None if is_any_autocast() else OPERATOR.known(call, None)
    if plan is None or plan.problem.device.type not in ("cpu", "cuda"):
        return None
    if plan.problem.adapter_dtype != plan.problem.dtype:
        return (call, plan) if getattr(layer, "cast_input_dtype_enabled", True) else None
    _RECENT.put(id(layer), tuple(value for value in (*call[:4], call.bias) if value is not None), plan)
    return call, plan


def is_faster_by_peft(layer: PeftLinear, call: Any) -> bool:
    """Whether PEFT's forward should run a call that is timed."""

    def ours(x: Tensor) -> Tensor:
        return _fused(call._replace(x=x))

    def theirs(x: Tensor) -> Tensor:
        return PeftLinear.forward(layer, x)

    if isinstance(call, (Lanes, Gained)):
        return is_library_faster(layer, GROUP if isinstance(call, Lanes) else GAIN, call.inputs(), ours, theirs)
    call = Inputs._make(call)
    return is_library_faster(layer, OPERATOR, call, ours, theirs)


def _fused(call: Any, plan: Plan | None = None) -> Tensor:
    if plan is not None:
        y: Tensor = OPERATOR.run(plan, call)
        return y
    if isinstance(call, Lanes):
        (y,) = group_call(call.x, (call.weight,), (call.bias,), call.updates)
        return y
    if isinstance(call, Gained):
        return call.run()
    x, weight, down, up, scaling, bias, p, _ = call
    return lora_linear(x, weight, down, up, scaling, bias, dropout_p=p)
