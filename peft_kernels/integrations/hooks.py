"""Hooks on other libraries' modules: whether there are any, arguments by name, and removal without a handle."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_hooked(module: nn.Module) -> bool:
    """Whether a call of the module runs something beside its class's forward."""
    return any(getattr(module, hooks) for hooks in _HOOKS) or "forward" in module.__dict__


def named_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a forward call by name."""
    if not args:
        return dict(kwargs)
    names = list(inspect.signature(module.forward).parameters)
    return dict(zip(names, args, strict=False)) | kwargs


def takes_any_argument(module: nn.Module) -> bool:
    """Whether a module's forward takes keyword arguments that it does not name."""
    parameters = inspect.signature(type(module).forward).parameters.values()
    return any(parameter.kind == inspect.Parameter.VAR_KEYWORD for parameter in parameters)


def hands_on_arguments(module: nn.Module) -> bool:
    """Whether a forward takes keyword arguments that it does not name and, as its source says, passes them on.

    Where there is no source it is taken to do so.
    """
    forward = inspect.unwrap(type(module).forward)
    names = [p.name for p in inspect.signature(forward).parameters.values() if p.kind == inspect.Parameter.VAR_KEYWORD]
    if not names:
        return False
    try:
        # Once in the signature, and again in a call.
        return inspect.getsource(forward).count(f"**{names[0]}") > 1
    except OSError:
        return True


def remove_hooks(module: nn.Module, *hooks: Any) -> None:
    """Remove hooks by the function: a handle would neither copy nor pickle with the module."""
    for registered, with_kwargs in (
        (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
        (module._forward_hooks, module._forward_hooks_with_kwargs),
    ):
        for key in [key for key, hook in registered.items() if hook in hooks]:
            del registered[key]
            with_kwargs.pop(key, None)
