"""Which LoRA layers of PEFT's are fused, and which calls of them: every rule, and what asks it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import VARIANT_KWARG_KEYS
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.tuners.lora.variants import ALoraLinearVariant
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peft_kernels._core.autocast import autocast_dtype
from peft_kernels._core.checks import FLOATING
from peft_kernels.integrations import calls
from peft_kernels.integrations.hooks import OwnMethods, has_other_forward, is_hooked
from peft_kernels.integrations.peft import bases, dora
from peft_kernels.integrations.peft.banked import Banked
from peft_kernels.integrations.peft.by_row import ByRow
from peft_kernels.integrations.peft.operands import Factors, Modules, Operands, active, factors_of, operands_of
from peft_kernels.integrations.peft.slots import Slots, named, slots_of
from peft_kernels.integrations.rules import Support
from peft_kernels.integrations.sites import library_class
from peft_kernels.lora.update.problem import are_mixed

SUPPORT = Support(
    "PEFT: LoRA layers",
    (
        "`lora.Linear` on `nn.Linear`, or on transformers' `Conv1D`",
        "`lora.Linear` on any other module, parametrized and hooked ones too, and PEFT's layers on bitsandbytes'"
        " (8 and 4 bits), GPTQModel's (GPTQ, AWQ), HQQ's, torchao's, TransformerEngine's, EETQ's, AQLM's and INC's:"
        " the base module makes its output by itself, and the update is added to it",
        "rsLoRA, `rank_pattern`, `alpha_pattern`, `lora_bias`, PiSSA and other initialisations",
        "adapters in float32 on a half-precision base, autocast, dropout in training",
        "several active adapters in one call, each with its own dropout",
        "`adapter_names`, in `generate` too, and `mixed_batch`: several adapters in one batch; aLoRA",
    ),
)
_OTHER_LAYER = SUPPORT.rule(
    "a layer of another class: embeddings, convolutions, MoE parameters; methods other than LoRA",
    "it is PEFT's {layer}, not its lora.Linear",
)
_OTHER_FORWARD = SUPPORT.rule("a forward put on the layer: X-LoRA, diffusers' hooks", "its forward was replaced")
_BANKED = SUPPORT.rule("a layer of a model with an `AdapterBank`", "an AdapterBank is on it; its close() comes before")
_REPLACED = SUPPORT.rule("methods of PEFT's or torch's classes that another tool replaced", "{method} was replaced")
_DISABLED = SUPPORT.rule("a call inside `disable_adapter()`", "adapters are disabled")
_MERGED = SUPPORT.rule("a call after `merge_adapter()`", "adapters are merged into the weight")
_NO_ADAPTER = SUPPORT.rule("a call while none of the layer's adapters is active", "no adapter is active")
_VARIANT = SUPPORT.rule("QA-LoRA and PEFT's other variants", "its adapter is a {variant}, not plain LoRA")
_BESIDE_ALORA = SUPPORT.rule(
    "aLoRA beside other active adapters, but for those that `adapter_names` give to other rows",
    "an aLoRA adapter of it is active beside others",
)
_OTHER_FACTOR = SUPPORT.rule(
    "`lora_A` or `lora_B` of another class, `lora_A` with a bias",
    "lora_A is {down} and lora_B {up}, not two nn.Linear of which the first has no bias",
)
_OTHER_DROPOUT = SUPPORT.rule("dropout of another class, or in place", "its dropout is {dropout}, not nn.Dropout")
_SCALING = SUPPORT.rule(
    "a scaling that is trained, or neither a number nor a 0-d tensor", "its scaling is {scaling}, not a constant number"
)
_HOOKED = SUPPORT.rule(
    "hooks on the adapters' modules: offloading, tensor parallelism, FSDP of the parts",
    "there are hooks on its adapters",
)
_NO_PLAIN_WEIGHT = SUPPORT.rule(
    "a weight that is a tensor subclass, or not strided", "a weight of it is a {weight}, not a plain tensor"
)
_NO_NAMES = SUPPORT.rule(
    "`adapter_names` that are no list, or not one for each row of x: PEFT raises", "adapter_names do not fit x's rows"
)
_BIAS_BY_ROW = SUPPORT.rule(
    "`lora_bias` of adapters among `adapter_names`", "an adapter that rows choose has a bias (lora_bias)"
)
_ALORA_ROWS = SUPPORT.rule(
    "aLoRA on an input of more than three dimensions, or with other than one offset a row: PEFT raises",
    "alora_offsets do not fit x's rows",
)
_MORE_ARGUMENTS = SUPPORT.rule("a call with further arguments", "the call has arguments beside x")
_SEVERAL_DEVICES = SUPPORT.rule("tensors on several devices", "its tensors are on several devices")
_SEVERAL_DTYPES = SUPPORT.rule("active adapters of several dtypes", "its adapters have several dtypes")
_DROPS_ALL = SUPPORT.rule("dropout with p = 1 in training", "its dropout leaves nothing, with p = {p}")
_X_DTYPE = SUPPORT.rule("input and base weight of two dtypes outside autocast", "x is {x}, the base weight {base}")
_ADAPTER_DTYPE = SUPPORT.rule(
    "adapters neither in the input's dtype nor in float32 outside autocast", "x is {x}, the adapters are {adapter}"
)

_GIVEN_NO_NAMES = SUPPORT.rule(
    "`adapter_names` and aLoRA on PEFT's layers that take none (GPTQ, AWQ, EETQ, AQLM, TransformerEngine), aLoRA on"
    " HQQ: PEFT's answer, mostly an error; `mixed_batch` runs there",
    "PEFT's {layer} takes no adapters by row, or none of aLoRA",
)
_GIVEN_ON_CPU = SUPPORT.rule(
    "such a base module on a CPU, unless a backend is forced: PEFT's sum takes less of the host's time there",
    "PEFT adds to the output of its base layer, a {base}, on a CPU",
)
_GIVEN_OUTPUT = SUPPORT.rule(
    "such a base module that returns no plain tensor of x's rows",
    "its base layer, a {base}, returned no plain tensor of {shape} beside x",
)
_GIVEN_GRADIENT = SUPPORT.rule(
    "such a base module without a backward pass: PEFT's layer drops that part of x's gradient silently",
    "its base layer, a {base}, returned a tensor without a gradient for an x with one",
)
_GIVEN_DTYPE = SUPPORT.rule(
    "such a base module whose output is float64 beside another x, or narrower than autocast's dtype on CUDA",
    "its base layer returned {y} beside {other}",
)
_GIVEN_BIAS = SUPPORT.rule("`lora_bias` on such a base module", "an adapter has a bias (lora_bias) beside a {base}")

# What the fused layer does without calling it.
OWN = OwnMethods(
    *((PeftLinear, name) for name in ("forward", "_cast_input_dtype", "_check_forward_args", "_mixed_batch_forward")),
    *((cls, "forward") for cls in (nn.Linear, Conv1D, nn.Dropout, ALoraLinearVariant)),
    (F, "linear"),
)


def why_not(layer: Any) -> str | None:
    """Reason that lies in what the layer is, and is made of."""
    if not bases.is_known(library_class(layer)):
        return _OTHER_LAYER(layer=f"{type(layer).__module__.rpartition('.')[2]}.{type(layer).__name__}")
    if has_other_forward(layer):
        return _OTHER_FORWARD()
    if isinstance(layer, Banked):
        return _BANKED()
    adapters = active(layer)
    reason = _why_not_modules(layer, adapters, may_be_late=len(adapters) == 1)
    if reason is not None:
        return reason
    is_plain = bases.kind(layer) == bases.PLAIN
    return _why_not_plain(operands_of(layer, adapters) if is_plain else factors_of(adapters))


def why_not_now(layer: Any) -> str | None:
    """Reason that lies in the layer's state: what its methods, ``to`` and ``train`` change."""
    adapters = active(layer)
    if not adapters:
        return _why_not_merged(layer)
    reason = _why_not_merged(layer)
    if bases.kind(layer) == bases.PLAIN:
        operands = operands_of(layer, adapters)
        like_x = operands.weight
        reason = reason or dora.why_not_now(layer, adapters) or calls.why_not_device(like_x)
        return reason or _why_not_beside(layer, operands, like_x)
    factors = factors_of(adapters)
    like_x = factors.downs[0]
    reason = reason or calls.why_not_device(like_x) or why_not_on(layer, like_x) or dora.why_not_now(layer, adapters)
    return reason or _why_not_added(layer, factors, like_x)


def is_unused(layer: Any) -> bool:
    return not active(layer)


def operands_of_call(layer: PeftLinear, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Operands | str:
    """What a call of the layer computes with, or the reason why it is not fused."""
    adapters = active(layer)
    reason = _why_not_state(layer, adapters) or _why_not_modules(layer, adapters)
    if reason is not None:
        return reason
    operands = operands_of(layer, adapters)
    reason = _why_not_plain(operands) or dora.why_not_now(layer, adapters)
    return reason or _why_not_call(layer, operands, x, args, kwargs) or operands


def why_not_on(layer: Any, x: Any) -> str | None:
    """Reason that lies in the device of a call on a given base, or of its like."""
    if isinstance(x, Tensor) and bases.is_left_to_peft(x):
        return _GIVEN_ON_CPU(base=bases.name_of(layer))
    return None


def factors_of_call(layer: Any, x: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Factors | str:
    """What is added to a given base's output, or the reason why PEFT adds it."""
    adapters = active(layer)
    reason = _why_not_state(layer, adapters) or _why_not_modules(layer, adapters) or calls.why_not_input(x)
    if reason is None:
        reason = _why_not_names(kwargs.get("adapter_names"), x)
    # Some of PEFT's layers take none at all.
    reason = reason or _why_not_arguments((*args, *kwargs), {})
    if reason is not None:
        return reason
    factors = factors_of(adapters)
    reason = _why_not_plain(factors) or dora.why_not_now(layer, adapters)
    return reason or _why_not_added(layer, factors, x) or factors


def why_not_output(layer: Any, up: Tensor, x: Tensor, y: Any) -> str | None:
    """Reason that lies in what a base module returned for x, beside a factor B."""
    shape = (*x.shape[:-1], up.shape[0])
    if not calls.is_plain(y) or y.shape != shape or y.device != x.device:
        return _GIVEN_OUTPUT(base=bases.name_of(layer), shape=shape)
    if torch.is_grad_enabled() and x.requires_grad and not y.requires_grad:
        return _GIVEN_GRADIENT(base=bases.name_of(layer))
    cast = autocast_dtype(x.device.type)
    other = bases.cast_of(x.dtype, up.dtype) if cast is None else cast
    is_right = y.dtype == other or are_mixed(y.dtype, other)
    if bases.follows_autocast(layer):
        # PEFT's sum has the wider dtype.
        is_right = is_right and x.is_cuda and torch.promote_types(y.dtype, other) == y.dtype
    return None if is_right else _GIVEN_DTYPE(y=y.dtype, other=other)


def slots_of_call(
    layer: Any, by_row: ByRow, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], is_peft_s: bool
) -> Slots | str | None:
    """What a call computes with whose rows choose adapters; None: what the base layer does; or why it is not fused.

    Args:
        is_peft_s: whether PEFT's layer has been told which, and has an answer of its own; else ``mixed_batch`` knows.
    """
    reason = _why_not_merged(layer) or calls.why_not_input(x) or _why_not_arguments(args, kwargs)
    reason = reason or _why_not_names(by_row.names, x)
    if reason is not None:
        return reason
    adapters = named(layer, by_row.adapters)
    late = frozenset([adapter.name for adapter in adapters if is_late(layer, adapter.name)])
    is_given = bases.kind(layer) != bases.PLAIN
    reason = _why_not_by_names(layer, x, bool(late)) if is_given and is_peft_s else None
    reason = reason or (_why_not_offsets(by_row, x) if late else None)
    reason = reason or _why_not_modules(layer, adapters, may_be_late=True, by_row=True)
    if reason is not None or not adapters:
        return reason
    operands: Operands | Factors
    if is_given:
        operands = factors_of(adapters)
        reason = _why_not_plain(operands) or _why_not_added(layer, operands, x)
    else:
        operands = operands_of(layer, adapters)
        reason = _why_not_plain(operands) or _why_not_beside(layer, operands, x, by_row=True)
    return reason or slots_of(layer, operands, adapters, x, by_row.rows(x, late))


def is_late(layer: Any, name: str) -> bool:
    """Whether an adapter changes the last tokens of a row alone, from its invocation on: PEFT's aLoRA."""
    return type(layer.lora_variant.get(name)) is ALoraLinearVariant


def _why_not_state(layer: PeftLinear, adapters: list[Modules]) -> str | None:
    return _why_not_merged(layer) or (None if adapters else _NO_ADAPTER())


def _why_not_merged(layer: PeftLinear) -> str | None:
    if layer.disable_adapters:
        return _DISABLED()
    return _MERGED() if layer.merged else None


def _why_not_modules(
    layer: PeftLinear, adapters: list[Modules], may_be_late: bool = False, by_row: bool = False
) -> str | None:
    replaced = OWN.replaced() or bases.replaced(layer)
    if replaced is not None or "_cast_input_dtype" in layer.__dict__:
        return _REPLACED(method=replaced or "its _cast_input_dtype")
    hooked = False
    for name, down, up, dropout, scaling in adapters:
        if name in layer.lora_variant and not (may_be_late and is_late(layer, name)):
            if is_late(layer, name):
                return _BESIDE_ALORA()
            if not dora.is_dora(layer, name):
                return _VARIANT(variant=type(layer.lora_variant[name]).__name__)
            reason = dora.why_not(layer, adapters, by_row)
            if reason is not None:
                return reason
        if not (_is_linear(down) and _is_linear(up)) or down.bias is not None:
            return _OTHER_FACTOR(down=down, up=up)
        if type(dropout) is not nn.Identity and (type(dropout) is not nn.Dropout or dropout.inplace):
            return _OTHER_DROPOUT(dropout=dropout)
        if not _is_constant_number(scaling):
            return _SCALING(scaling=_described(scaling))
        hooked = hooked or is_hooked(down) or is_hooked(up) or is_hooked(dropout)
    return _HOOKED() if hooked else None


def _why_not_by_names(layer: Any, x: Tensor, with_offsets: bool) -> str | None:
    if not bases.takes_names(layer, with_offsets):
        return _GIVEN_NO_NAMES(layer=library_class(layer).__name__)
    return why_not_on(layer, x)


def _why_not_plain(operands: Operands | Factors) -> str | None:
    for tensor in operands.tensors():
        if not calls.is_plain(tensor):
            return _NO_PLAIN_WEIGHT(weight=type(tensor).__name__)
    return None


def _why_not_call(
    layer: PeftLinear, operands: Operands, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> str | None:
    """Reason that lies in the arguments, or in dtypes and devices."""
    reason = _why_not_arguments(args, kwargs) or calls.why_not_input(x)
    return reason or _why_not_names(kwargs.get("adapter_names"), x) or _why_not_beside(layer, operands, x)


def _why_not_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    if args or any(key not in VARIANT_KWARG_KEYS for key in kwargs if key != "adapter_names"):
        return _MORE_ARGUMENTS()
    return None


def _why_not_names(names: Any, x: Tensor) -> str | None:
    if names is None or (isinstance(names, (list, tuple)) and x.dim() > 1 and len(names) == x.shape[0]):
        return None
    return _NO_NAMES()


def _why_not_offsets(by_row: ByRow, x: Tensor) -> str | None:
    is_one_each = by_row.offsets is None or len(by_row.offsets) == x.shape[0]
    return None if is_one_each and x.dim() <= 3 else _ALORA_ROWS()


def _why_not_beside(layer: PeftLinear, operands: Operands, x: Tensor, by_row: bool = False) -> str | None:
    """Reason that lies in dtypes, devices, dropout and biases, beside an input that is like x.

    Where rows choose adapters, factors may be of two dtypes: in float32 all of them have their bits.
    """
    reason = _why_not_factors(operands, x, by_row)
    casts_input = by_row or getattr(layer, "cast_input_dtype_enabled", True)
    for dtype in {factor.dtype for factor in (*operands.downs, *operands.ups)}:
        reason = reason or _why_not_dtypes(x, operands.weight.dtype, dtype, casts_input)
    return reason


def _why_not_added(layer: Any, factors: Factors, x: Tensor) -> str | None:
    """The same where a base module makes its output by itself, whose dtype nobody knows yet."""
    reason = _why_not_factors(factors, x)
    if reason is None and any(bias is not None for bias in factors.up_biases):
        return _GIVEN_BIAS(base=bases.name_of(layer))
    casts_input = getattr(layer, "cast_input_dtype_enabled", True)
    return reason or _why_not_dtypes(x, None, factors.downs[0].dtype, casts_input)


def _why_not_factors(operands: Operands | Factors, x: Tensor, by_row: bool = False) -> str | None:
    device = x.device
    if any(tensor.device != device for tensor in operands.tensors()):
        return _SEVERAL_DEVICES()
    if by_row and any(bias is not None for bias in operands.up_biases):
        return _BIAS_BY_ROW()
    if not by_row and len({factor.dtype for factor in (*operands.downs, *operands.ups)}) > 1:
        return _SEVERAL_DTYPES()
    greatest = max(operands.ps)
    return _DROPS_ALL(p=greatest) if greatest >= 1 else None


def _why_not_dtypes(x: Tensor, base: torch.dtype | None, adapter: torch.dtype, casts_input: bool) -> str | None:
    """A base without a dtype is given, and PEFT casts x to the adapter's."""
    # Under autocast every product is in autocast's dtype, whatever its operands are; it casts these three.
    casts = {torch.float32, torch.bfloat16, torch.float16}
    is_autocast = autocast_dtype(x.device.type) is not None
    if is_autocast and {x.dtype, base or x.dtype, adapter} <= casts:
        return None
    if base is not None and x.dtype != base:
        return _X_DTYPE(x=x.dtype, base=base)
    is_cast = adapter == torch.float32 or (base is None and not is_autocast and adapter in FLOATING)
    return None if adapter == x.dtype or (casts_input and is_cast) else _ADAPTER_DTYPE(x=x.dtype, adapter=adapter)


def _is_linear(part: nn.Module) -> bool:
    return type(part) is nn.Linear


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
