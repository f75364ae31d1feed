"""Calls that no fused layer takes, whatever library it is of."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook as has_any_global_hook

from peft_kernels._core.checks import FLOATING
from peft_kernels._core.dispatch import requested_backend
from peft_kernels._core.graph import is_transformed
from peft_kernels.integrations.rules import Support

SUPPORT = Support("Calls of any layer that `apply` fused")
_NO_PLAIN_TENSOR = SUPPORT.rule(
    "an input that is a tensor subclass, nested or not strided; fake tensors too", "x is {x}, not a plain tensor"
)
_TRANSFORMED = SUPPORT.rule(
    "`torch.func`, `vmap`, forward-mode differentiation, `torch.jit.trace`, `torch.export`",
    "the call is transformed, traced or exported",
)
_GLOBAL_HOOKS = SUPPORT.rule(
    "hooks on all modules, as `register_module_forward_hook` and FlopCounterMode set them",
    "there are hooks on all modules",
)
_DTYPE = SUPPORT.rule("an integer, complex or 8-bit input", "x is {dtype}")
_DEVICE = SUPPORT.rule('tensors on a device without autocast, such as "meta"', "it runs on {device}")
_REFUSED = SUPPORT.rule("what no other rule foresees, and the operation refuses", "{error}")


def why_not_input(x: Any) -> str | None:
    """Reason that lies in the input, or in what surrounds the call."""
    if not is_plain(x):
        return _NO_PLAIN_TENSOR(x=f"a {type(x).__name__}" if not isinstance(x, Tensor) else _described(x))
    if _is_transformed():
        return _TRANSFORMED()
    if has_any_global_hook():
        return _GLOBAL_HOOKS()
    if x.dtype not in FLOATING:
        return _DTYPE(dtype=x.dtype)
    return why_not_device(x)


def why_not_device(x: Tensor) -> str | None:
    """Reason that lies in the input's device."""
    # The first two are asked because they cost a tenth of the third.
    if not (x.is_cuda or x.is_cpu or torch.amp.is_autocast_available(x.device.type)):
        return _DEVICE(device=x.device.type)
    return None


def why_not_operation(error: ValueError) -> str:
    """Reason that the operation gave.

    Raises:
        ValueError: the environment names no backend, which is no reason to run another.
    """
    requested_backend(None)
    return _REFUSED(error=error)


def is_plain(tensor: Any) -> bool:
    """Whether its elements lie in memory as its sizes and strides say."""
    return type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided and not tensor.is_nested


def _described(x: Tensor) -> str:
    kind = "" if type(x) in (Tensor, nn.Parameter) else f"a {type(x).__name__}, "
    return f"{kind}{'nested, ' if x.is_nested else ''}{x.layout}"


def _is_transformed() -> bool:
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting() or is_transformed()
    return is_transformed() or torch._C._get_tracing_state() is not None
