"""What others put on a library's modules: hooks, and methods in the place of the class's own."""

from __future__ import annotations

import functools
import inspect
import operator
import sys
from typing import Any

from torch import nn


def is_hooked(module: nn.Module) -> bool:
    """Whether a call of the module runs something beside its class's forward."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or ("forward" in module.__dict__ and not _is_own(module, module.__dict__["forward"]))
    )


def has_other_forward(module: nn.Module) -> bool:
    """Whether calls of the module run a forward of the instance's, which does not lead to the class's.

    accelerate's leads there, through the method that it keeps.
    """
    forward = module.__dict__.get("forward")
    if isinstance(forward, functools.partial) and forward.func.__module__ == "accelerate.hooks":
        forward = module.__dict__.get("_old_forward")
    return forward is not None and not _is_own(module, forward)


def _is_own(module: nn.Module, forward: Any) -> bool:
    """Whether it is the class's, bound: what tools leave behind that wrapped it and took their wrapper off again."""
    return getattr(forward, "__self__", None) is module and forward.__func__ is type(module).forward


class OwnMethods:
    """Methods of other libraries' classes, as those libraries define them.

    A fused layer computes what they do without calling them: where somebody has replaced one, on its class and at any
    time, it may not.

    Args:
        methods: (class, name of the method), or (module, name of a function).
    """

    def __init__(self, *methods: tuple[Any, str]) -> None:
        self._holders, self._names = tuple(zip(*methods, strict=True))
        self._defined = tuple(_defined(holder, name) for holder, name in methods)

    def replaced(self) -> str | None:
        """The name of one that was replaced, None if all are as they were defined."""
        # Without a loop of Python's, because it is asked in every call.
        if all(map(operator.is_, map(getattr, self._holders, self._names), self._defined)):
            return None
        for holder, name, defined in zip(self._holders, self._names, self._defined, strict=True):
            if getattr(holder, name) is not defined:
                return f"{holder.__name__}.{name}"
        return None


def _defined(holder: Any, name: str) -> Any:
    """The method, if it is a builtin or from its class's own file, which functools.wraps cannot feign; else None."""
    method = getattr(holder, name)
    if inspect.isbuiltin(method):
        return method
    owner = next(base for base in holder.__mro__ if name in vars(base)) if inspect.isclass(holder) else holder
    home = sys.modules[owner.__module__ if inspect.isclass(owner) else owner.__name__]
    return method if getattr(method, "__globals__", None) is vars(home) else None


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
