"""PEFT's names of what a FusedLoRALinear holds, taken in state dicts.

base_layer.weight, base_layer.bias                      weight, bias
lora_A.<adapter>.weight, lora_B.<adapter>.weight        lora_A.<adapter>, lora_B.<adapter>
lora_A.weight, lora_B.weight                            the same of the only adapter, as its files have them
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection
from typing import Any

_BASE = {"base_layer.weight": "weight", "base_layer.bias": "bias"}
_FACTOR = re.compile(r"(lora_[AB])(?:\.([^.]+))?\.weight")
# They change what PEFT's layer computes.
_WITHOUT_A_PLACE = re.compile(r"lora_magnitude_vector\b.*|lora_[AB]\.([^.]+\.)?bias|lora_embedding_[AB]\b.*")


def take_peft_keys(state: dict[str, Any], prefix: str, adapters: Collection[str]) -> list[str]:
    """Give entries of one layer that have PEFT's names this package's, in place.

    An adapter of another name is taken for the layer's where both have but one. Others that the layer has not stay as
    they are, unexpected, and a warning says so.

    Args:
        state: a state dict whose entries of the layer begin with ``prefix``.
        adapters: names of the layer's.

    Returns:
        What does not fit, one sentence each.
    """
    where = f"FusedLoRALinear at {prefix[:-1]!r}" if prefix else "FusedLoRALinear"
    inside = [key[len(prefix) :] for key in state if key.startswith(prefix)]
    found = {key: match for key in inside if (match := _factor(key, adapters)) is not None}
    named = sorted({match[2] or "" for match in found.values()})
    only = next(iter(adapters)) if len(named) == len(adapters) == 1 else None
    new = {key: _BASE[key] for key in inside if key in _BASE}
    errors = [f"{where} has no place for {key}" for key in inside if _WITHOUT_A_PLACE.fullmatch(key)]
    for key, match in found.items():
        name = match[2] if only is None else only
        if name in adapters:
            new[key] = f"{match[1]}.{name}"
    unknown = [name for name in named if only is None and name not in adapters]
    if unknown:
        names = ", ".join(repr(name) if name else "one without a name" for name in unknown)
        # Without the layer's path, so that it is seen once for all layers.
        warnings.warn(
            f"load_state_dict: layers of FusedLoRALinear have the adapters {sorted(adapters)}, and not {names}, which "
            "is left out; add_adapter makes one",
            stacklevel=6,
        )
    for key, name in new.items():
        if prefix + name in state:
            errors.append(f"{where} is given both {key} and {name}")
        else:
            state[prefix + name] = state.pop(prefix + key)
    return errors


def _factor(key: str, adapters: Collection[str]) -> re.Match[str] | None:
    """A match with its adapter's name, or None; lora_A.weight is no key of PEFT's where an adapter is called so."""
    match = _FACTOR.fullmatch(key)
    return None if match is not None and match[2] is None and "weight" in adapters else match
