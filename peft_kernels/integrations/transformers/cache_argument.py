"""Under which name a call of a transformers model has its cache: ``cache`` since 5.24, ``past_key_values`` before.

Newer models still take the older name, and rename it behind the hooks, which see what the caller wrote.
"""

from __future__ import annotations

import inspect
from typing import Any

from transformers.masking_utils import create_causal_mask

_OLDER = "past_key_values"
# As the library's own models and functions name it.
NAME = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else _OLDER


def name_in(kwargs: dict[str, Any]) -> str:
    """The name of the cache of a call, also where it has none yet."""
    return _OLDER if kwargs.get(_OLDER) is not None else NAME


def cache_in(kwargs: dict[str, Any]) -> Any:
    """The cache of a call, or None."""
    return kwargs.get(name_in(kwargs))


def replace(kwargs: dict[str, Any], cache: Any) -> None:
    """Give a call another cache, under the one name."""
    name = name_in(kwargs)
    if name != _OLDER:
        kwargs.pop(_OLDER, None)
    kwargs[name] = cache
