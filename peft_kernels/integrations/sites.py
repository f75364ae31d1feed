"""What ``apply`` puts on these kernels: sites, whose modules' classes are swapped."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

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
    """

    modules: Mapping[str, Any]
    classes: Classes
    why_not: Callable[[], str | None]

    def fuse(self) -> None:
        """Swap the classes that are not swapped yet."""
        self._swap(self.classes)

    def restore(self) -> None:
        """Swap back those that are swapped."""
        self._swap({ours: theirs for theirs, ours in self.classes.items()})

    def _swap(self, classes: Classes) -> None:
        for module in self.modules.values():
            if type(module) in classes:
                module.__class__ = classes[type(module)]
                if "_old_forward" in module.__dict__:
                    # accelerate wraps the bound method that it finds, and calls that one.
                    module.__dict__["_old_forward"] = types.MethodType(type(module).forward, module)
