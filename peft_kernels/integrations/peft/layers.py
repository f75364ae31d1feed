"""PEFT's LoRA layers on ``lora_linear``: the layer's class is swapped, its state is not touched.

A swapped layer decides at each call whether ``lora_linear`` computes exactly what PEFT's forward would; if not, that
forward runs, and the reason is counted. The class has no ``__init__`` and no attributes, so everything that works on
PEFT's layer works on it: ``isinstance``, pickling, deepcopy, merging, hotswapping, hooks on the layer itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import VARIANT_KWARG_KEYS
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peft_kernels._core.autocast import autocast_dtype, is_any_autocast
from peft_kernels._core.plans import Plan, Recent
from peft_kernels.integrations import calls
from peft_kernels.integrations.faster import SLOWER, is_library_faster, is_timed
from peft_kernels.integrations.hooks import OwnMethods, has_other_forward, is_hooked
from peft_kernels.integrations.peft.merging import Merging
from peft_kernels.integrations.report import count_fallback
from peft_kernels.integrations.rules import Support
from peft_kernels.integrations.sites import Site
from peft_kernels.lora import lora_linear
from peft_kernels.lora.linear.op import OPERATOR
from peft_kernels.lora.linear.problem import Inputs

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
    "a layer of another class: embeddings, convolutions, quantized layers, MoE parameters; methods other than LoRA",
    "it is PEFT's {layer}, not its lora.Linear",
)
_OTHER_FORWARD = SUPPORT.rule("a forward put on the layer: X-LoRA, diffusers' hooks", "its forward was replaced")
_REPLACED = SUPPORT.rule("methods of PEFT's or torch's classes that another tool replaced", "{method} was replaced")
_DISABLED = SUPPORT.rule("a call inside `disable_adapter()`", "adapters are disabled")
_MERGED = SUPPORT.rule("a call after `merge_adapter()`", "adapters are merged into the weight")
_NO_ADAPTER = SUPPORT.rule("a call while none of the layer's adapters is active", "no adapter is active")
_OTHER_BASE = SUPPORT.rule(
    "a base layer of another class, a parametrized one too", "its base layer is {base}, not nn.Linear or Conv1D"
)
_VARIANT = SUPPORT.rule("DoRA, aLoRA, QA-LoRA and PEFT's other variants", "its adapter is a {variant}, not plain LoRA")
_OTHER_FACTOR = SUPPORT.rule(
    "`lora_A` or `lora_B` of another class, `lora_A` with a bias",
    "lora_A is {down} and lora_B {up}, not two nn.Linear of which the first has no bias",
)
_OTHER_DROPOUT = SUPPORT.rule("dropout of another class, or in place", "its dropout is {dropout}, not nn.Dropout")
_SCALING = SUPPORT.rule(
    "a scaling that is trained, or neither a number nor a 0-d tensor", "its scaling is {scaling}, not a constant number"
)
_HOOKED = SUPPORT.rule(
    "hooks inside the layer: offloading, tensor parallelism, FSDP of the parts",
    "there are hooks on its base layer or on its adapters",
)
_NO_PLAIN_WEIGHT = SUPPORT.rule(
    "a weight that is a tensor subclass, or not strided", "a weight of it is a {weight}, not a plain tensor"
)
_ADAPTER_NAMES = SUPPORT.rule("`adapter_names` in the call", "adapter_names mixes adapters within a batch")
_MORE_ARGUMENTS = SUPPORT.rule("a call with further arguments", "the call has arguments beside x")
_SEVERAL_DEVICES = SUPPORT.rule("tensors on several devices", "its tensors are on several devices")
_SEVERAL_DTYPES = SUPPORT.rule("active adapters of several dtypes", "its adapters have several dtypes")
_SEVERAL_MASKS = SUPPORT.rule(
    "several active adapters with dropout in training", "several active adapters with dropout draw a mask each"
)
_DROPS_ALL = SUPPORT.rule("dropout with p = 1 in training", "its dropout leaves nothing, with p = {p}")
_X_DTYPE = SUPPORT.rule("input and base weight of two dtypes outside autocast", "x is {x}, the base weight {base}")
_ADAPTER_DTYPE = SUPPORT.rule(
    "adapters neither in the input's dtype nor in float32 outside autocast", "x is {x}, the adapters are {adapter}"
)

# What the fused layer does without calling it.
_OWN = OwnMethods(
    *((PeftLinear, name) for name in ("forward", "_cast_input_dtype", "_check_forward_args")),
    *((cls, "forward") for cls in (nn.Linear, Conv1D, nn.Dropout)),
    (F, "linear"),
)


# Of layers with one adapter, whose scaling is a float and whose dropout is not at work.
_RECENT = Recent()


class _Modules(NamedTuple):
    """What PEFT's forward calls, beside the base layer, for an active adapter."""

    name: str
    down: Any
    up: Any
    dropout: Any
    scaling: Any


class _Operands(NamedTuple):
    """The tensors of a call, read once, and the numbers of each active adapter.

    Attributes:
        weight: as the base layer stores it.
        bias: the base layer's, or None.
        downs, ups, up_biases: of each adapter.
        scalings, ps: of each adapter; p is 0 where its dropout is not at work.
    """

    weight: Tensor
    bias: Tensor | None
    downs: list[Tensor]
    ups: list[Tensor]
    up_biases: list[Tensor | None]
    scalings: list[Any]
    ps: list[float]

    def tensors(self) -> Iterator[Tensor]:
        """All that must be where x is; a scaling may also be on the CPU, as PEFT's product takes it."""
        yield from (self.weight, *self.downs, *self.ups)
        yield from (bias for bias in (self.bias, *self.up_biases) if bias is not None)
        yield from (scaling for scaling in self.scalings if isinstance(scaling, Tensor) and not scaling.is_cpu)


class FusedLoraLinear(Merging, PeftLinear):
    """PEFT's ``lora.Linear`` whose base product and low-rank update are one operation."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As PEFT's; what it cannot fuse runs PEFT's own."""
        # A tool may have kept this method, and call it after revert.
        if isinstance(self, FusedLoraLinear):
            known = None if args or kwargs or torch.compiler.is_compiling() else _known(self, x)
            if known is not None and not known[1].is_timed:
                return _fused(*known)
            call, plan = (_call(self, x, args, kwargs), None) if known is None else known
            if isinstance(call, tuple):
                try:
                    if not (is_timed(x) and _is_faster_by_peft(self, call)):
                        return _fused(call, plan)
                    call = SLOWER()
                except ValueError as error:
                    call = calls.why_not_operation(error)
            count_fallback(self, call)
        return PeftLinear.forward(self, x, *args, **kwargs)


def sites(model: nn.Module) -> Iterator[Site]:
    """PEFT's layers, each by itself."""
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            yield Site(
                {name: module},
                {PeftLinear: FusedLoraLinear},
                why_not=partial(_why_not, module),
                why_not_now=partial(_why_not_now, module),
                is_unused=partial(_is_unused, module),
            )


def _why_not(layer: Any) -> str | None:
    """Reason that lies in what the layer is, and is made of."""
    if type(layer) not in (PeftLinear, FusedLoraLinear):
        return _OTHER_LAYER(layer=f"{type(layer).__module__.rpartition('.')[2]}.{type(layer).__name__}")
    if has_other_forward(layer):
        return _OTHER_FORWARD()
    adapters = _active(layer)
    return _why_not_modules(layer, adapters) or _why_not_operands(_operands(layer, adapters))


def _why_not_now(layer: Any) -> str | None:
    """Reason that lies in the layer's state: what its methods, ``to`` and ``train`` change."""
    adapters = _active(layer)
    if not adapters and not layer.disable_adapters and not layer.merged:
        return None
    operands = _operands(layer, adapters)
    like_x = operands.weight
    return _why_not_state(layer, adapters) or calls.why_not_device(like_x) or _why_not_beside(layer, operands, like_x)


def _is_unused(layer: Any) -> bool:
    return not _active(layer)


def _why_not_state(layer: PeftLinear, adapters: list[_Modules]) -> str | None:
    if layer.disable_adapters:
        return _DISABLED()
    if layer.merged:
        return _MERGED()
    if not adapters:
        return _NO_ADAPTER()
    return None


def _why_not_modules(layer: PeftLinear, adapters: list[_Modules]) -> str | None:
    replaced = _OWN.replaced()
    if replaced is not None or "_cast_input_dtype" in layer.__dict__:
        return _REPLACED(method=replaced or "its _cast_input_dtype")
    base = layer.base_layer
    if type(base) not in (nn.Linear, Conv1D):
        return _OTHER_BASE(base=type(base).__name__)
    hooked = is_hooked(base)
    for name, down, up, dropout, scaling in adapters:
        if name in layer.lora_variant:
            return _VARIANT(variant=type(layer.lora_variant[name]).__name__)
        if not (_is_linear(down) and _is_linear(up)) or down.bias is not None:
            return _OTHER_FACTOR(down=down, up=up)
        if type(dropout) is not nn.Identity and (type(dropout) is not nn.Dropout or dropout.inplace):
            return _OTHER_DROPOUT(dropout=dropout)
        if not _is_constant_number(scaling):
            return _SCALING(scaling=_described(scaling))
        hooked = hooked or is_hooked(down) or is_hooked(up) or is_hooked(dropout)
    return _HOOKED() if hooked else None


def _why_not_operands(operands: _Operands) -> str | None:
    for tensor in operands.tensors():
        if not calls.is_plain(tensor):
            return _NO_PLAIN_WEIGHT(weight=type(tensor).__name__)
    return None


def _why_not_call(
    layer: PeftLinear, operands: _Operands, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> str | None:
    """Reason that lies in the arguments, or in dtypes and devices."""
    if kwargs.get("adapter_names") is not None:
        return _ADAPTER_NAMES()
    if args or any(
        value is not None or key not in VARIANT_KWARG_KEYS for key, value in kwargs.items() if key != "adapter_names"
    ):
        return _MORE_ARGUMENTS()
    return calls.why_not_input(x) or _why_not_beside(layer, operands, x)


def _why_not_beside(layer: PeftLinear, operands: _Operands, x: Tensor) -> str | None:
    """Reason that lies in dtypes, devices and dropout, beside an input that is like x."""
    device = x.device
    if any(tensor.device != device for tensor in operands.tensors()):
        return _SEVERAL_DEVICES()
    dtypes = {factor.dtype for factor in (*operands.downs, *operands.ups)}
    if len(dtypes) > 1:
        return _SEVERAL_DTYPES()
    if any(operands.ps):
        if len(operands.ps) > 1:
            return _SEVERAL_MASKS()
        if operands.ps[0] >= 1:
            return _DROPS_ALL(p=operands.ps[0])
    return _why_not_dtypes(x, operands.weight.dtype, dtypes.pop(), getattr(layer, "cast_input_dtype_enabled", True))


def _why_not_dtypes(x: Tensor, base: torch.dtype, adapter: torch.dtype, casts_input: bool) -> str | None:
    # Under autocast every product is in autocast's dtype, whatever its operands are; it casts these three.
    casts = {torch.float32, torch.bfloat16, torch.float16}
    if autocast_dtype(x.device.type) is not None and {x.dtype, base, adapter} <= casts:
        return None
    if x.dtype != base:
        return _X_DTYPE(x=x.dtype, base=base)
    if adapter not in (x.dtype, torch.float32) or (adapter != x.dtype and not casts_input):
        return _ADAPTER_DTYPE(x=x.dtype, adapter=adapter)
    return None


def _call(layer: PeftLinear, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs | str:
    """The operation that a call of the layer is, or the reason why it is none."""
    adapters = _active(layer)
    reason = _why_not_state(layer, adapters) or _why_not_modules(layer, adapters)
    if reason is not None:
        return reason
    operands = _operands(layer, adapters)
    reason = _why_not_operands(operands) or _why_not_call(layer, operands, x, args, kwargs)
    return _joined(layer, operands, x) if reason is None else reason


def _known(layer: Any, x: Any) -> tuple[Any, Plan] | None:
    """What ``_call`` returns for a layer as it nearly always is, and a plan for it; None: look closer.

    Nothing is remembered of a layer, so nothing can be outdated. What ``_call`` reads of modules is read here too, but
    where it lies, and for one adapter that nobody has touched. What it asks of tensors was asked when the plan of their
    key was made, but for the rules that are PEFT's own.
    """
    state, active = layer.__dict__, layer.active_adapter
    if type(active) is not list or len(active) != 1 or layer.disable_adapters or layer.merged_adapters:
        return None
    name, parts = active[0], state["_modules"]
    base, down, up = parts["base_layer"], parts["lora_A"]._modules.get(name), parts["lora_B"]._modules.get(name)
    dropout, scaling = parts["lora_dropout"]._modules.get(name), layer.scaling.get(name)
    if type(base) is not nn.Linear or type(down) is not nn.Linear or type(up) is not nn.Linear:
        return None
    if type(dropout) is not nn.Identity and (type(dropout) is not nn.Dropout or dropout.training):
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
    if calls.has_any_global_hook() or _OWN.replaced() is not None:
        return None
    weight, bias = base._parameters.get("weight"), base._parameters.get("bias")
    of_down, of_up = down._parameters, up._parameters
    if type(scaling) is not float or of_down.get("bias") is not None or of_up.get("bias") is not None:
        return None
    # A plain tuple, which costs a fifth of a named one.
    call = x, weight, of_down.get("weight"), of_up.get("weight"), scaling, bias, 0.0, None
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


def _is_faster_by_peft(layer: PeftLinear, call: Any) -> bool:
    call = Inputs._make(call)
    return is_library_faster(
        layer, OPERATOR, call, lambda x: _fused(call._replace(x=x)), lambda x: PeftLinear.forward(layer, x)
    )


def _fused(call: Any, plan: Plan | None = None) -> Tensor:
    if plan is not None:
        y: Tensor = OPERATOR.run(plan, call)
        return y
    x, weight, down, up, scaling, bias, p, _ = call
    return lora_linear(x, weight, down, up, scaling, bias, dropout_p=p)


def _joined(layer: PeftLinear, operands: _Operands, x: Tensor) -> Inputs:
    """One call for all active adapters: their ranks stand side by side. Its seed is not drawn yet."""
    weight, bias, downs, ups, up_biases, scalings, ps = operands
    # Conv1D stores (in, out).
    weight = weight if type(layer.base_layer) is nn.Linear else weight.t()
    for up_bias, scaling in zip(up_biases, scalings, strict=True):
        if up_bias is not None:
            scaled = up_bias * scaling
            bias = scaled.to(weight.dtype) if bias is None else (bias + scaled).to(bias.dtype)
    if len(downs) == 1:
        return Inputs(x, weight, downs[0], ups[0], scalings[0], bias, ps[0], None)
    scaled_ups = [up * scaling for up, scaling in zip(ups, scalings, strict=True)]
    return Inputs(x, weight, torch.cat(downs), torch.cat(scaled_ups, dim=1), 1.0, bias, 0.0, None)


def _active(layer: PeftLinear) -> list[_Modules]:
    """The active adapters of the layer."""
    downs, ups, dropouts = layer.lora_A, layer.lora_B, layer.lora_dropout
    return [
        _Modules(name, downs[name], ups[name], dropouts[name], layer.scaling[name])
        for name in layer.active_adapters
        if name in downs
    ]


def _operands(layer: PeftLinear, adapters: list[_Modules]) -> _Operands:
    base: Any = layer.base_layer
    return _Operands(
        base.weight,
        base.bias,
        [adapter.down.weight for adapter in adapters],
        [adapter.up.weight for adapter in adapters],
        [adapter.up.bias for adapter in adapters],
        [adapter.scaling for adapter in adapters],
        [adapter.dropout.p if _is_at_work(adapter.dropout) else 0.0 for adapter in adapters],
    )


def _is_linear(part: nn.Module) -> bool:
    return type(part) is nn.Linear


def _is_at_work(dropout: nn.Module) -> bool:
    return type(dropout) is nn.Dropout and dropout.training


def _is_constant_number(scaling: Any) -> bool:
    if isinstance(scaling, Tensor):
        is_number = scaling.dim() == 0 and scaling.is_floating_point() and calls.is_plain(scaling)
        return is_number and not scaling.requires_grad
    return isinstance(scaling, (int, float))


def _described(scaling: Any) -> str:
    if not isinstance(scaling, Tensor):
        return f"a {type(scaling).__name__}"
    kind = "a trained" if scaling.requires_grad else "a"
    return f"{kind} {type(scaling).__name__} {tuple(scaling.shape)} of {scaling.dtype}"
