"""PEFT's (IA)^3 layers on ``linear_with_gain_alone``: which they are, and the forward in the place of theirs.

    y = l (x W^T + bias)        l (N,), the product of the active adapters' vectors

A backward pass then reads dY and the product once each for the gradient of l, where PEFT's writes their product and
reads it again, and the multiplication of dY by l is that of W where W is smaller. What is kept is the same.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from peft.tuners.ia3.layer import IA3Layer
from peft.tuners.ia3.layer import Linear as PeftIA3Linear
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peft_kernels._core.autocast import autocast_dtype
from peft_kernels.integrations import calls
from peft_kernels.integrations.faster import SLOWER, is_library_faster, is_timed
from peft_kernels.integrations.hooks import OwnMethods, has_other_forward, is_hooked
from peft_kernels.integrations.peft import bases
from peft_kernels.integrations.report import count_fallback
from peft_kernels.integrations.rules import Support
from peft_kernels.integrations.sites import Swapped, library_class
from peft_kernels.lora.gain_alone.op import OPERATOR, linear_with_gain_alone
from peft_kernels.lora.gain_alone.problem import Inputs

SUPPORT = Support(
    "PEFT: (IA)^3",
    (
        "`ia3.Linear` on `nn.Linear` and `Conv1D`: several active adapters, float32 vectors beside half precision,"
        " autocast",
    ),
)
_OTHER_LAYER = SUPPORT.rule(
    "(IA)^3 on convolutions and on bitsandbytes' weights", "it is PEFT's {layer}, not its ia3.Linear"
)
_FEEDFORWARD = SUPPORT.rule(
    "`feedforward_modules`, whose vector multiplies the input", "its vector multiplies the input (feedforward)"
)
_OTHER_FORWARD = SUPPORT.rule("a forward put on the layer", "its forward was replaced")
_OTHER_BASE = SUPPORT.rule(
    "a base layer of another class, hooked or with a weight that is no plain tensor",
    "its base layer is a {base} that has hooks, or makes its output by itself",
)
_REPLACED = SUPPORT.rule("methods of PEFT's or torch's classes that another tool replaced", "{method} was replaced")
_VECTOR = SUPPORT.rule(
    "a vector that is a tensor subclass, or of another size", "one of its vectors is not {n} plain numbers"
)
_ON_CPU = SUPPORT.rule(
    "a layer on a CPU, unless a backend is forced: PEFT's own takes less time there",
    "it runs on a CPU, where PEFT's own takes less time",
)
_DISABLED = SUPPORT.rule("a call inside `disable_adapter()`", "adapters are disabled")
_MERGED = SUPPORT.rule("a call after `merge_adapter()`", "adapters are merged into the weight")
_NO_ADAPTER = SUPPORT.rule("a call while none of the layer's adapters is active", "no adapter is active")
_MORE_ARGUMENTS = SUPPORT.rule("a call with further arguments", "the call has arguments beside x")
_BESIDE = SUPPORT.rule(
    "tensors of several devices, or dtypes but for float32 vectors beside half precision, outside autocast",
    "x is {x}, the base weight {base}, the vector {vector}",
)

_OWN = OwnMethods((PeftIA3Linear, "forward"), (nn.Linear, "forward"), (Conv1D, "forward"))


class FusedIA3Linear(Swapped, PeftIA3Linear):
    """PEFT's ``ia3.Linear`` whose product and multiplication are one operation."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As PEFT's; what it cannot fuse runs PEFT's own."""
        # A tool may have kept this method, and call it after revert.
        if isinstance(self, FusedIA3Linear):
            call = _call(self, x, args, kwargs)
            if not isinstance(call, str):
                try:
                    if not (is_timed(x) and _is_faster_by_peft(self, call)):
                        return call.run()
                    call = SLOWER()
                except ValueError as error:
                    call = calls.why_not_operation(error)
            count_fallback(self, call)
        y: Tensor = PeftIA3Linear.forward(self, x, *args, **kwargs)
        return y


class _Call(NamedTuple):
    """The operation that a layer's call is: ``linear_with_gain_alone``'s arguments, its vectors unmultiplied."""

    x: Tensor
    weight: Tensor
    vectors: tuple[Tensor, ...]
    bias: Tensor | None

    def gain(self) -> Tensor:
        """Their product (N,), in their widest dtype, or float32 where x is in half precision."""
        gain = self.vectors[0].flatten()
        for vector in self.vectors[1:]:
            gain = gain * vector.flatten()
        return gain if gain.dtype == self.x.dtype else gain.float()

    def run(self) -> Tensor:
        """The layer's output."""
        return linear_with_gain_alone(self.x, self.weight, self.gain(), self.bias)


def why_not(layer: Any) -> str | None:
    """Reason that lies in what a layer is, and is made of."""
    if library_class(layer) is not PeftIA3Linear:
        return _OTHER_LAYER(layer=f"{type(layer).__module__.rpartition('.')[2]}.{type(layer).__name__}")
    if has_other_forward(layer):
        return _OTHER_FORWARD()
    return _why_not_modules(layer)


def why_not_now(layer: Any) -> str | None:
    """Reason that lies in the layer's state: what its methods, ``to`` and ``train`` change."""
    reason = _why_not_state(layer)
    if reason is not None:
        return reason
    weight = layer.base_layer.weight
    return calls.why_not_device(weight) or _why_not_on(weight) or _why_not_beside(layer, weight)


def is_unused(layer: Any) -> bool:
    """Whether none of a layer's adapters is active."""
    return not _vectors(layer)


def classes(layer: Any) -> dict[type[nn.Module], type[nn.Module]]:
    """A layer's class and the one in its place; a class that is not known has none."""
    return {PeftIA3Linear: FusedIA3Linear} if library_class(layer) is PeftIA3Linear else {}


def is_layer(module: nn.Module) -> bool:
    """Whether it is one of PEFT's layers of this method."""
    return isinstance(module, IA3Layer)


def _call(layer: Any, x: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call | str:
    """The operation that a call of the layer is, or the reason why it is none."""
    if args or kwargs:
        return _MORE_ARGUMENTS()
    reason = _why_not_on(x) or _why_not_state(layer) or _why_not_modules(layer) or calls.why_not_input(x)
    reason = reason or _why_not_beside(layer, x)
    if reason is not None:
        return reason
    base = layer.base_layer
    weight = base.weight.t() if type(base) is Conv1D else base.weight
    return _Call(x, weight, tuple(_vectors(layer)), base.bias)


def _why_not_on(x: Any) -> str | None:
    return _ON_CPU() if isinstance(x, Tensor) and bases.is_left_to_peft(x) else None


def _why_not_state(layer: Any) -> str | None:
    if layer.disable_adapters:
        return _DISABLED()
    if layer.merged:
        return _MERGED()
    return None if _vectors(layer) else _NO_ADAPTER()


def _why_not_modules(layer: Any) -> str | None:
    if layer.is_feedforward:
        return _FEEDFORWARD()
    replaced = _OWN.replaced()
    if replaced is not None:
        return _REPLACED(method=replaced)
    base = layer.base_layer
    is_known = type(base) in (nn.Linear, Conv1D) and not is_hooked(base)
    if not is_known or not calls.is_plain(base.weight) or not (base.bias is None or calls.is_plain(base.bias)):
        return _OTHER_BASE(base=type(base).__name__)
    n = base.weight.shape[1 if type(base) is Conv1D else 0]
    if any(not calls.is_plain(vector) or vector.numel() != n for vector in _vectors(layer)):
        return _VECTOR(n=n)
    return None


def _why_not_beside(layer: Any, x: Tensor) -> str | None:
    """Reason that lies in dtypes and devices, beside an input that is like x."""
    base, vectors = layer.base_layer, _vectors(layer)
    tensors = base.weight, *vectors, *(() if base.bias is None else (base.bias,))
    cast = autocast_dtype(x.device.type)
    dtype = x.dtype if cast is None or x.dtype == torch.float64 else cast
    is_one = all(tensor.device == x.device for tensor in tensors)
    if cast is None or dtype == torch.float64:
        is_one = is_one and base.weight.dtype == x.dtype and (base.bias is None or base.bias.dtype == x.dtype)
    # PEFT multiplies in the wider dtype and rounds to the product's.
    fits = all(vector.dtype == dtype or (vector.dtype, dtype.itemsize) == (torch.float32, 2) for vector in vectors)
    if is_one and fits:
        return None
    return _BESIDE(x=x.dtype, base=base.weight.dtype, vector=vectors[0].dtype)


def _vectors(layer: Any) -> list[Tensor]:
    """The active adapters' vectors, in their order."""
    return [layer.ia3_l[name] for name in layer.active_adapters if name in layer.ia3_l]


def _is_faster_by_peft(layer: Any, call: _Call) -> bool:
    """Whether PEFT's forward should run a call that is timed."""
    inputs = Inputs(call.x, call.weight, call.gain().detach(), call.bias)

    def theirs(x: Tensor) -> Tensor:
        y: Tensor = PeftIA3Linear.forward(layer, x)
        return y

    return is_library_faster(layer, OPERATOR, inputs, lambda x: call._replace(x=x).run(), theirs)
