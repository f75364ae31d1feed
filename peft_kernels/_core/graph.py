"""What torch does around a call: whether it may be opaque, and which numbers a compiled graph holds as symbols."""

from __future__ import annotations

from collections.abc import Iterable
from types import NoneType
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _functorch, _get_tracing_state, _len_torch_dispatch_stack
from torch.autograd import forward_ad

DISPATCH_MODE = "a TorchDispatchMode sees every operation (selective checkpointing, fake tensors, FLOP counters)"
_OPAQUE_TYPES = frozenset({Tensor, nn.Parameter, float, int, bool, str, torch.dtype, NoneType})


def why_not_opaque(values: Iterable[Any]) -> str | None:
    """Reason why torch must see the operations of a call one by one, or None.

    An ``autograd.Function`` around kernels is opaque: vmap, forward-mode differentiation, a tracer, a dispatch mode and
    a tensor subclass would fail on it, or lose what it does. It is asked in every call and takes half a microsecond.

    Args:
        values: the call's arguments, tensors and others.
    """
    if (
        not is_transformed()
        and _get_tracing_state() is None
        and _len_torch_dispatch_stack() == 0
        and _OPAQUE_TYPES.issuperset(map(type, values))
    ):
        return None
    return _reason(values)


def _reason(values: Iterable[Any]) -> str | None:
    if is_transformed():
        return "a transform of torch.func, or forward-mode differentiation, is active"
    if _get_tracing_state() is not None:
        return "torch.jit.trace records every operation"
    for value in values:
        for each in value if isinstance(value, tuple) else (value,):
            if isinstance(each, Tensor) and not _is_opaque_type(type(each)):
                return f"a tensor of it is a {type(each).__name__}, which has operations of its own"
    return DISPATCH_MODE if _len_torch_dispatch_stack() > 0 else None


def _is_opaque_type(cls: type[Tensor]) -> bool:
    """Whether a class of tensors leaves torch's functions as they are, as a subclass of nn.Parameter may."""
    own = getattr(cls.__torch_function__, "__func__", cls.__torch_function__)
    plain = (Tensor.__torch_function__.__func__, torch._C._disabled_torch_function_impl)  # type: ignore[attr-defined]
    return own in plain and cls.__torch_dispatch__ is torch._C._disabled_torch_dispatch_impl


def is_transformed() -> bool:
    """Whether torch.func or forward-mode differentiation changes what operations mean; a graph is traced for each."""
    return _functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


# As in dispatch.py.
is_transformed._dynamo_marked_constant = True  # type: ignore[attr-defined]


def why_not_strided(tensor: Tensor) -> str | None:
    """What a tensor is that has no address for each element, or None: sparse, nested and the like."""
    if tensor.is_nested:
        return "a nested tensor"
    return None if tensor.layout is torch.strided else f"a {tensor.layout} tensor"


def as_symbol(scale: Any, like: Tensor) -> Any:
    """While a graph is traced: a number that the graph holds as a symbol, as a 0-d tensor; else what was given.

    A float of a schema takes no symbol, and every value would be compiled anew. torch makes a symbol of a float that it
    has seen change, such as a scale in a module's dict.
    """
    if not isinstance(scale, float):
        return scale
    from torch.fx.experimental import symbolic_shapes

    # Older torch cannot say.
    if not hasattr(symbolic_shapes, "has_static_value") or symbolic_shapes.has_static_value(scale):
        return scale
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return torch.ones((), dtype=dtype, device=like.device) * scale
