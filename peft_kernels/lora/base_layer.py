"""Which linear layers can be a FusedLoRALinear's base, and which modules of torch cannot hold one."""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.modules.module import register_module_module_registration_hook
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from peft_kernels._core.encoder_layer import refuse_nested

_LINEAR_FORWARD = nn.Linear.forward

# Of these the forward passes read the weight of a linear layer, which they do not call. Older torch lacks the last.
_READERS = tuple(getattr(nn, name) for name in ("MultiheadAttention", "LinearCrossEntropyLoss") if hasattr(nn, name))


def why_not_base(linear: object) -> str | None:
    """Reason why ``y = F.linear(x, weight, bias)`` is not all that this module does, or None."""
    if not isinstance(linear, nn.Linear):
        return f"must be an nn.Linear, got {type(linear).__name__}"
    if isinstance(linear, NonDynamicallyQuantizableLinear):
        return (
            f"must be called by what holds it, got a {type(linear).__name__}: "
            "nn.MultiheadAttention reads its out_proj's weight and never calls it"
        )
    if getattr(linear.forward, "__func__", None) is not _LINEAR_FORWARD:
        return f"must have nn.Linear's own forward, got a {type(linear).__name__} with another"
    for name in ("weight", "bias"):
        if name not in linear._parameters:
            return f"must have a parameter {name}, got one that is computed (parametrized, pruned, weight-normed)"
    weight: Any = linear.weight
    if is_lazy(weight) or is_traceable_wrapper_subclass(weight) or not weight.is_floating_point():
        return f"must have a floating weight that is a plain tensor, got {type(weight).__name__} of {weight.dtype}"
    hooks = [name for name, value in vars(linear).items() if name.endswith("_hooks") and value]
    if hooks:
        return f"must have no hooks, which would be lost, got {', '.join(hooks)}"
    return None


def _refuse_nested(block: nn.Module, args: tuple[Any, ...]) -> None:
    # A hook of its own: that of inserted adapters goes when they do.
    refuse_nested(block, args)


@cache
def guard_readers(layer: type[nn.Module]) -> None:
    """Let no module of torch's that reads weights get a ``layer`` whose adapters it would leave out in silence.

    A hook on every registration of a submodule in this process: a layer itself never learns what holds it.
    """

    def on_registration(holder: nn.Module, name: str, module: nn.Module | None) -> None:
        if not isinstance(module, layer):
            return
        if isinstance(holder, nn.TransformerEncoderLayer) and _refuse_nested not in holder._forward_pre_hooks.values():
            holder.register_forward_pre_hook(_refuse_nested)
        for reader in _READERS:
            if isinstance(holder, reader) and type(holder).forward is reader.forward:
                raise ValueError(
                    f"{layer.__name__}: {type(holder).__name__} reads the weight of its {name} and never calls it, "
                    "so that adapters there would do nothing"
                )

    register_module_module_registration_hook(on_registration)
