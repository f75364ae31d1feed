"""A model's configuration with another attention implementation, for the modules of one model alone.

Models of one configuration object share the attention implementation that stands in it. A view is the same object in
everything else: attributes are set and read in one dictionary, whoever sets them.
"""

from __future__ import annotations

import functools
from typing import Any

NAME = "peft_kernels"


def view_of(config: Any, implementation: str) -> Any:
    """Return a view whose attention implementation is this package's, as long as the configuration's is the given."""
    config_class: Any = type(config)
    view = object.__new__(_view_class(config_class))
    object.__setattr__(view, "__dict__", config.__dict__)
    object.__setattr__(view, "_viewed", config)
    object.__setattr__(view, "_replaced", implementation)
    return view


def viewed(config: Any) -> Any:
    """The configuration behind a view; any other is its own."""
    return getattr(config, "_viewed", config)


@functools.cache
def _view_class(config_class: Any) -> Any:
    # Of the same names, by which transformers finds a configuration's model.
    return type(
        config_class.__name__,
        (config_class,),
        {
            "__slots__": ("_replaced", "_viewed"),
            "__module__": config_class.__module__,
            "__qualname__": config_class.__qualname__,
            "__reduce_ex__": lambda self, protocol: (view_of, (self._viewed, self._replaced)),
            "_attn_implementation": property(_implementation, config_class._attn_implementation.fset),
        },
    )


def _implementation(view: Any) -> Any:
    own = view._attn_implementation_internal
    return NAME if own == getattr(view, "_replaced", "") else own
