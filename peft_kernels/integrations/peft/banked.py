"""Layers with slots for many adapters: which a model has, and the class in whose place theirs is swapped.

PEFT's and transformers' classes are taken where they were imported, since a model has them only then.
"""

from __future__ import annotations

import sys
from functools import cache
from typing import Any

from torch import Tensor, nn

from peft_kernels.integrations import calls
from peft_kernels.integrations.hooks import has_other_forward, is_hooked
from peft_kernels.integrations.peft.lora_config import is_named, names_or_pattern
from peft_kernels.integrations.sites import Swapped
from peft_kernels.lora.slots import NAME, LayerSlots

SLOTS = "_peft_kernels_slots"
"""Attribute of a layer: its slots. ``close`` takes it away."""


class Banked(Swapped):
    """First base of the classes that ``banked_class`` makes."""


@cache
def banked_class(library: type[nn.Module]) -> type[nn.Module]:
    """The class of a library's layers while they have slots."""
    has_base = issubclass(library, _tuner_layers())

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # A tool may have kept this method, and call it after close.
        slots: LayerSlots | None = getattr(self, SLOTS, None)
        if slots is None or slots.current.batch is None or (has_base and self.disable_adapters):
            y: Tensor = library.forward(self, x, *args, **kwargs)
            return y
        if args or any(value is not None for value in kwargs.values()):
            given = f"got {[*kwargs] or args}; use(names) says whose rows it has"
            raise ValueError(f"{NAME}: a layer takes x alone, {given}")
        if has_base and self.merged:
            raise ValueError(f"{NAME}: {self.merged_adapters} are merged into a layer; call unmerge_adapter() before")
        base = self.base_layer if has_base else self
        weight = base.weight if isinstance(base, nn.Linear) else base.weight.t()
        return slots.linear(x, weight, base.bias)

    return type(library.__name__, (Banked, library), {"forward": forward, "__module__": __name__})


def weight_and_bias(layer: Any) -> tuple[Tensor, Tensor | None]:
    """The frozen product of a layer: weight (N, K), and bias."""
    base = layer.base_layer if isinstance(layer, _tuner_layers()) else layer
    return base.weight if isinstance(base, nn.Linear) else base.weight.t(), base.bias


def base_model(model: nn.Module) -> nn.Module:
    """The model to which the paths in an adapter's file belong."""
    holders = _loaded("peft", "PeftModel")
    return model.get_base_model() if isinstance(model, holders) else model


def candidates(root: nn.Module) -> dict[str, nn.Module]:
    """PEFT's layers and linear ones, by path; nothing inside of PEFT's."""
    found: dict[str, nn.Module] = {}
    inside: str | None = None
    linear: tuple[type[Any], ...] = (nn.Linear, *_loaded("transformers.pytorch_utils", "Conv1D"))
    for name, module in root.named_modules():
        if inside is not None and name.startswith(inside):
            continue
        is_tuner = isinstance(module, _tuner_layers())
        if is_tuner or isinstance(module, linear):
            found[name] = module
        if is_tuner:
            inside = f"{name}."
    return found


def targets_of(root: nn.Module, target_modules: object) -> dict[str, nn.Module] | None:
    """The layers that are to have slots; None where nothing says which.

    Args:
        target_modules: as PEFT's; None takes PEFT's layers, where there are some.

    Raises:
        ValueError: it is something else, or names no layer.
    """
    found = candidates(root)
    if target_modules is None:
        return {name: layer for name, layer in found.items() if isinstance(layer, _tuner_layers())} or None
    given = list(target_modules) if isinstance(target_modules, (tuple, set)) else target_modules
    wanted = names_or_pattern(NAME, "target_modules", {"target_modules": given})
    if wanted is None:
        head = getattr(root, "get_output_embeddings", lambda: None)()
        chosen = {name: layer for name, layer in found.items() if layer is not head}
    else:
        chosen = {name: layer for name, layer in found.items() if is_named(wanted, name)}
    for each in wanted if isinstance(wanted, tuple) else ():
        if not any(is_named((each,), name) for name in chosen):
            raise ValueError(f"{NAME}: target_modules must name linear layers, {type(root).__name__} has no {each!r}")
    if not chosen:
        raise ValueError(f"{NAME}: target_modules must name linear layers, {target_modules!r} names none")
    return chosen


def check_layer(name: str, layer: Any) -> None:
    """Raise unless a layer's call is known to be ``F.linear``, with PEFT's adapters or without.

    Raises:
        ValueError: it is something else.
    """
    where = f"{NAME}: {name}"
    if isinstance(layer, Banked):
        raise ValueError(f"{where} is in a bank already; call its close() before")
    if isinstance(layer, Swapped):
        raise ValueError(f"{where} is on apply's kernels, which a bank needs not; call pk.revert(model) before")
    base = layer
    if isinstance(layer, _tuner_layers()):
        if type(layer) not in _loaded("peft.tuners.lora.layer", "Linear"):
            raise ValueError(f"{where} must be a linear layer or PEFT's lora.Linear, is a {type(layer).__name__}")
        if layer.merged:
            raise ValueError(f"{where} is merged with {layer.merged_adapters}; call unmerge_adapter() before")
        base = layer.base_layer
        if is_hooked(base):
            raise ValueError(f"{where} must have no hooks on its base layer, which would not be called")
    if type(base) not in (nn.Linear, *_loaded("transformers.pytorch_utils", "Conv1D")):
        raise ValueError(f"{where} must be an nn.Linear or Conv1D, is a {type(base).__name__}")
    if has_other_forward(layer):
        raise ValueError(f"{where} must have its class's forward, which was replaced")
    if not calls.is_plain(base.weight) or base.weight.is_meta or not base.weight.is_floating_point():
        raise ValueError(f"{where} must have a plain floating weight, is a {type(base.weight).__name__}")
    if "experts" in name.split("."):
        raise ValueError(f"{where} is an expert's, and sees tokens of which it is not known whose they are")


def _tuner_layers() -> tuple[type[Any], ...]:
    return _loaded("peft.tuners.tuners_utils", "BaseTunerLayer")


def _loaded(module: str, name: str) -> tuple[type[Any], ...]:
    """A class of a library that was imported, or none."""
    return (getattr(sys.modules[module], name),) if module in sys.modules else ()
