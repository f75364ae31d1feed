"""AdapterHub's bottleneck adapters on ``bottleneck_adapter``: the adapter's class is swapped, its state is not touched.

A swapped adapter decides at each call whether the operation computes what AdapterHub's forward would; if not, that
forward runs, and the reason is counted. What surrounds the adapter stays AdapterHub's: the layer norms and residuals of
its placement, the composition blocks, and the sum of a parallel adapter with its sublayer, which is made after the
blocks have joined their results.

| adapter    | AdapterHub's forward returns             | operation                                        |
| sequential | residual + s up(act(down(x))), down, up  | residual=residual: read once where x is residual |
| parallel   | s up(act(down(x))), down, up             | residual=None; ``up`` is the same tensor         |

Composition blocks pass ``up`` on, and only Fuse reads it; nothing reads ``down``. What may stay unread is made when it
is read: deferred.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from adapters.methods.adapter_layer_base import AdapterLayerBase
from adapters.methods.bottleneck import BottleneckLayer
from adapters.methods.modeling import (
    Activation_Function_Class,
    Adapter,
    GLOWCouplingBlock,
    NICECouplingBlock,
    ParallelAdapter,
)
from torch import Tensor, nn
from transformers.activations import ACT2CLS

from peft_kernels._core.autocast import autocast_dtype
from peft_kernels.adapter import bottleneck_adapter
from peft_kernels.adapter.kernels.activations import LEAKY_SLOPE
from peft_kernels.adapter.op import OPERATOR
from peft_kernels.adapter.problem import Inputs
from peft_kernels.integrations import calls
from peft_kernels.integrations.adapterhub import rules
from peft_kernels.integrations.adapterhub.activations import ACTIVATIONS
from peft_kernels.integrations.adapterhub.deferred import Deferred
from peft_kernels.integrations.faster import SLOWER, is_library_faster, is_timed
from peft_kernels.integrations.hooks import OwnMethods, is_hooked
from peft_kernels.integrations.report import count_fallback
from peft_kernels.integrations.sites import Site, Swapped, library_class


def _class_of(name: str) -> type[nn.Module]:
    entry: Any = ACT2CLS[name]
    return entry[0] if isinstance(entry, tuple) else entry


# By what the adapter holds, which is what runs; a name would have to be looked up in the model's configuration.
_BY_CLASS = {_class_of(name): ours for name, ours in ACTIVATIONS.items() if name in ACT2CLS}


# What the fused adapters do without calling it.
_OWN = OwnMethods(
    *((cls, "forward") for cls in (Adapter, ParallelAdapter, Activation_Function_Class)),
    *((cls, "forward") for cls in (nn.Sequential, nn.Linear, nn.Dropout)),
    (F, "linear"),
)
_OWN_ACTIVATIONS = {cls: OwnMethods((cls, "forward")) for cls in _BY_CLASS}


class FusedAdapter(Swapped, Adapter):
    """AdapterHub's sequential bottleneck, with its residual sum, as one operation."""

    def forward(self, x: Tensor, residual_input: Tensor, output_gating: bool = False) -> tuple[Any, ...]:
        """As AdapterHub's; what it cannot fuse runs AdapterHub's own."""
        # A tool may have kept this method, and call it after revert; so below.
        if isinstance(self, FusedAdapter):
            output = _output(self, x, residual_input, residual_input, output_gating)
            if output is not None:
                return output, later(lambda: _down(self, x), x), later(lambda: _bottleneck(self, x, None), x)
        return Adapter.forward(self, x, residual_input, output_gating)


class FusedParallelAdapter(Swapped, ParallelAdapter):
    """AdapterHub's parallel bottleneck as one operation; the sum with the sublayer is its ``post_forward``'s."""

    def forward(self, x: Tensor, residual_input: Tensor, output_gating: bool = False) -> tuple[Any, ...]:
        """As AdapterHub's, which does not read the residual; what it cannot fuse runs AdapterHub's own."""
        if isinstance(self, FusedParallelAdapter):
            output = _output(self, x, x, None, output_gating)
            if output is not None:
                return output, later(lambda: _down(self, x), x), output
        return ParallelAdapter.forward(self, x, residual_input, output_gating)


_FUSED: dict[type[nn.Module], type[nn.Module]] = {Adapter: FusedAdapter, ParallelAdapter: FusedParallelAdapter}
_KNOWN = (*_FUSED, *_FUSED.values())


def sites(model: nn.Module) -> Iterator[Site]:
    """AdapterHub's bottlenecks, and what its other methods put into a model."""
    for name, module in model.named_modules():
        if isinstance(module, Adapter) or _is_other_method(module):
            yield Site({name: module}, _FUSED, partial(_why_not, module), partial(_why_not_now, module))


def _is_other_method(module: Any) -> bool:
    if isinstance(module, AdapterLayerBase) and not isinstance(module, BottleneckLayer):
        return bool(module.adapter_modules)
    return isinstance(module, (NICECouplingBlock, GLOWCouplingBlock))


def _why_not(module: Any) -> str | None:
    if not isinstance(module, Adapter):
        return rules.OTHER_METHOD(layer=type(module).__name__)
    return why_not_adapter(module)


def _why_not_now(adapter: Any) -> str | None:
    """Reason that lies in the adapter's state: what ``to`` and ``train`` change."""
    like_x = adapter.adapter_up.weight
    return _why_not_dropout(adapter) or calls.why_not_device(like_x) or _why_not_beside(adapter, like_x, like_x)


def _output(adapter: Any, x: Any, beside: Any, residual: Tensor | None, output_gating: bool) -> Tensor | None:
    """The operation's result, or None where AdapterHub's own forward must run, which is counted."""
    reason = why_not_adapter(adapter) or why_not_call(adapter, x, beside, output_gating)
    if reason is None:
        try:
            if not (is_timed(x) and _is_faster_by_adapterhub(adapter, x, residual)):
                return _bottleneck(adapter, x, residual)
            reason = SLOWER()
        except ValueError as error:
            reason = calls.why_not_operation(error)
    count_fallback(adapter, reason)
    return None


def _is_faster_by_adapterhub(adapter: Any, x: Tensor, residual: Tensor | None) -> bool:
    """Whether AdapterHub's forward is faster; None is the residual of a parallel adapter."""
    down_weight, down_bias, up_weight, up_bias = parameters_of(adapter)
    serial, tensors = residual is x, (down_weight, up_weight, down_bias, up_bias)
    call = Inputs(x, *tensors, None if serial else residual, serial, activation_of(adapter), adapter.scaling)

    def theirs(given: Tensor) -> Tensor:
        output: Tensor = library_class(adapter).forward(
            adapter, given, given if serial or residual is None else residual
        )[0]
        return output

    return is_library_faster(
        adapter, OPERATOR, call, lambda given: _bottleneck(adapter, given, given if serial else residual), theirs
    )


def why_not_adapter(adapter: Any) -> str | None:
    """Reason that lies in what the adapter is made of."""
    if type(adapter) not in _KNOWN:
        return rules.OTHER_CLASS(adapter=type(adapter).__name__)
    if adapter.use_gating:
        return rules.GATE()
    if adapter.add_layer_norm_before or adapter.add_layer_norm_after:
        return rules.NORM()
    if hasattr(adapter, "DropPath"):
        return rules.STOCHASTIC_DEPTH()
    if not isinstance(adapter.scaling, (int, float)):
        return rules.SCALING(scaling=type(adapter.scaling).__name__)
    down = adapter.adapter_down
    parts = (*(down if type(down) is nn.Sequential else (down,)), adapter.adapter_up, adapter.dropout)
    if tuple(map(type, parts)) != (nn.Linear, Activation_Function_Class, nn.Linear, nn.Dropout):
        return rules.OTHER_PARTS(parts=", ".join(type(part).__name__ for part in parts))
    if not activation_of(adapter):
        return rules.OTHER_ACTIVATION(activation=type(adapter.adapter_down[1].f).__name__)
    return _why_not_modules(adapter)


def _why_not_modules(adapter: Any) -> str | None:
    # A hook on the adapter itself may take away, after the call, the parameters that a deferred result needs.
    down, activation = adapter.adapter_down
    parts = (adapter, adapter.adapter_down, down, activation, activation.f, adapter.adapter_up, adapter.dropout)
    if any(isinstance(part, nn.Module) and is_hooked(part) for part in parts):
        return rules.HOOKED()
    replaced = _OWN.replaced() or _OWN_ACTIVATIONS.get(type(activation.f), _OWN).replaced()
    if replaced is not None:
        return rules.REPLACED(method=replaced)
    for tensor in parameters_of(adapter):
        if not calls.is_plain(tensor):
            return rules.NO_PLAIN_PARAMETER(parameter=type(tensor).__name__)
    return None


def why_not_call(adapter: Any, x: Tensor, residual: Any, output_gating: bool) -> str | None:
    """Reason that lies in the arguments, or in dtypes, devices and the mode of training."""
    if output_gating:
        # Without a gate AdapterHub keeps the last result instead, which is ``up``.
        return rules.GATING_SCORES()
    if not isinstance(residual, Tensor) or not calls.is_plain(residual):
        return rules.NO_RESIDUAL(residual=type(residual).__name__)
    reason = _why_not_dropout(adapter) or calls.why_not_input(x)
    if reason is not None:
        return reason
    if x.shape[-1:] != (adapter.input_size,) or residual.shape != x.shape:
        return rules.SHAPES(x=tuple(x.shape), residual=tuple(residual.shape), width=adapter.input_size)
    return _why_not_beside(adapter, x, residual)


def _why_not_dropout(adapter: Any) -> str | None:
    return rules.DROPOUT() if adapter.dropout.training and adapter.dropout.p != 0 else None


def _why_not_beside(adapter: Any, x: Tensor, residual: Tensor) -> str | None:
    """Reason that lies in dtypes and devices, beside an input and a residual that are like these."""
    parameters = parameters_of(adapter)
    if any(tensor.device != x.device for tensor in (residual, *parameters)):
        return rules.SEVERAL_DEVICES()
    return _why_not_dtypes(x, residual.dtype, {parameter.dtype for parameter in parameters})


def _why_not_dtypes(x: Tensor, residual: torch.dtype, parameters: set[torch.dtype]) -> str | None:
    # Under autocast every product is in autocast's dtype, whatever its operands are; it casts these three.
    casts = {torch.float32, torch.bfloat16, torch.float16}
    if autocast_dtype(x.device.type) is not None and {x.dtype, residual, *parameters} <= casts:
        return None
    if parameters != {x.dtype}:
        return rules.DTYPES(x=x.dtype, parameters=", ".join(sorted(map(str, parameters))))
    if residual not in (x.dtype, torch.float32) or torch.promote_types(residual, x.dtype) != residual:
        return rules.RESIDUAL_DTYPE(x=x.dtype, residual=residual)
    return None


def _bottleneck(adapter: Any, x: Tensor, residual: Tensor | None) -> Tensor:
    down_weight, down_bias, up_weight, up_bias = parameters_of(adapter)
    return bottleneck_adapter(
        x,
        down_weight,
        up_weight,
        down_bias=down_bias,
        up_bias=up_bias,
        residual=residual,
        activation=activation_of(adapter),
        scale=adapter.scaling,
    )


def _down(adapter: Any, x: Tensor) -> Tensor:
    hidden: Tensor = adapter.adapter_down(x)
    return hidden


def parameters_of(adapter: Any) -> tuple[Tensor, ...]:
    down, up = adapter.adapter_down[0], adapter.adapter_up
    return down.weight, down.bias, up.weight, up.bias


def activation_of(adapter: Any) -> str:
    """The operation's name for the adapter's activation, "" where it has none."""
    f = adapter.adapter_down[1].f
    if f is F.leaky_relu:
        return "leaky_relu"
    if isinstance(f, nn.LeakyReLU) and f.negative_slope != LEAKY_SLOPE:
        return ""
    return _BY_CLASS.get(type(f), "")


def later(make: Callable[[], Tensor], x: Tensor) -> Tensor | Deferred:
    # A compiler drops by itself what nobody reads.
    return make() if torch.compiler.is_compiling() else Deferred(make, x.device.type)
