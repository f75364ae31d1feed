"""What every class swap needs: the swap itself, and whether a module is called as its class says."""

from __future__ import annotations

import types
from typing import Any

from torch import nn

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def set_class(module: nn.Module, cls: Any) -> None:
    """Make a module one of another class, whose state is the same."""
    module.__class__ = cls
    if "_old_forward" in module.__dict__:
        # accelerate wraps the bound method that it finds, and calls that one.
        module.__dict__["_old_forward"] = types.MethodType(cls.forward, module)


def is_hooked(module: nn.Module) -> bool:
    """Whether a call of the module runs something beside its class's forward."""
    return any(getattr(module, hooks) for hooks in _HOOKS) or "forward" in module.__dict__
