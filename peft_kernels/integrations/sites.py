"""What ``apply`` puts on these kernels: sites, whose modules' classes are swapped."""

from __future__ import annotations

import copy
import copyreg
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn

Classes = Mapping[type[nn.Module], type[nn.Module]]


@dataclass(frozen=True)
class Site:
    """Modules that are swapped as one: a layer, or a whole model.

    A library's file finds its sites in a model, those too that are swapped already or cannot be.

    Attributes:
        modules: by their names in the model, "" for the model itself.
        classes: the library's classes, and for each the one in its place, whose state is the same.
        why_not: returns the reason why the modules are not fused, None if they are or can be.
        why_not_now: returns the reason why calls would run the library's own code as things stand, None if they would
            not: a state that the library's own methods change, so that the modules are swapped all the same.
        is_unused: whether the library's own code would have nothing to do that could be fused.
        is_part: whether the modules only call those of other sites, so that reports do not name them.
    """

    modules: Mapping[str, Any]
    classes: Classes
    why_not: Callable[[], str | None]
    why_not_now: Callable[[], str | None] = lambda: None
    is_unused: Callable[[], bool] = lambda: False
    is_part: bool = False

    def fuse(self) -> None:
        """Swap the classes that are not swapped yet."""
        self._swap(self.classes)

    def restore(self) -> None:
        """Swap back those that are swapped."""
        self._swap({ours: theirs for theirs, ours in self.classes.items()})

    def _swap(self, classes: Classes) -> None:
        for module in self.modules.values():
            old = type(module)
            if old not in classes:
                continue
            module.__class__ = classes[old]
            for name, kept in list(vars(module).items()):
                # Tools that wrap a forward keep the bound method on the module, and call that one or put it back.
                if isinstance(kept, types.MethodType) and kept.__self__ is module and kept.__func__ is old.forward:
                    vars(module)[name] = types.MethodType(classes[old].forward, module)


class Swapped(nn.Module):
    """First base of each class that stands in a library's place; the library's own class comes after it.

    Modules print and pickle as the library's, so that their files open where this package is absent; copies are fused
    as their originals are. Nothing in a class with this base may use ``super()``: tools keep bound methods, and call
    them after ``revert``.
    """

    def _get_name(self) -> str:
        return library_class(self).__name__

    def __reduce_ex__(self, protocol: Any) -> Any:
        # copyreg.__newobj__ refuses another class than the object's.
        return copyreg._reconstructor, (library_class(self), object, None), self.__getstate__()  # type: ignore[attr-defined]

    def __copy__(self) -> Any:
        copied = type(self).__new__(type(self))
        copied.__setstate__(self.__getstate__())
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        memo[id(self)] = copied = type(self).__new__(type(self))
        copied.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return copied


def library_class(module: nn.Module) -> type[nn.Module]:
    """The class in whose place the module's stands; the module's own where a tool derived one from ours."""
    # A compiler warns of what is remembered.
    cls: Any = type(module)
    return _found(cls) if torch.compiler.is_compiling() else _remembered(cls)


def _found(cls: Any) -> type[nn.Module]:
    return next(each for each in cls.__mro__ if not each.__module__.startswith("peft_kernels."))


@cache
def _remembered(cls: Any) -> type[nn.Module]:
    return _found(cls)
