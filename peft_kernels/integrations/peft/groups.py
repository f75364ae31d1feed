"""``apply``'s groups: which parents have LoRA layers that may share an input, and what is put on them and taken off."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from peft.tuners.lora.layer import Linear as PeftLinear
from torch import nn

from peft_kernels._core.errors import UnsupportedError
from peft_kernels.integrations.peft import mixed, siblings
from peft_kernels.integrations.peft.grouped import PLACE, GroupedLoraLinear, place_of
from peft_kernels.integrations.peft.layers import FusedLoraLinear
from peft_kernels.integrations.peft.siblings import Group, Siblings, attach, attached, detach
from peft_kernels.integrations.report import Grouped
from peft_kernels.integrations.sites import Site, library_class


class Wanted(NamedTuple):
    """What ``apply`` puts on a parent.

    Attributes:
        name: the parent's in the model.
        parent: the module.
        layers: its LoRA layers by their names in it.
        named: its groups, where they are not observed but given.
        is_forced: whether they are groups even where the clock may find them slower.
    """

    name: str
    parent: nn.Module
    layers: dict[str, Any]
    named: tuple[Group, ...] | None
    is_forced: bool


def wanted(model: nn.Module, group: bool | str, groups: Sequence[Group] | None) -> list[Wanted]:
    """The parents whose layers may be groups.

    Raises:
        ValueError: ``groups`` has a name that no LoRA layer has, or names that are those of no parent's layers.
        UnsupportedError: groups are asked for, and torch is older than 2.8.
    """
    if not siblings.SEES_REGIONS:
        if group is True or groups is not None:
            raise UnsupportedError("apply: groups of layers need torch 2.8 or newer")
        return []
    parents = list(_parents(model))
    if groups is not None:
        _check_names(groups, [set(layers) for _, _, layers in parents])
        named = [(*each, tuple(group for group in groups if set(group) <= set(each[2]))) for each in parents]
        return [Wanted(name, parent, layers, own, True) for name, parent, layers, own in named if own]
    if group is False:
        return []
    parents = [each for each in parents if len(each[2]) > 1 and (group is True or _is_worth_it(each[2]))]
    return [Wanted(name, parent, layers, None, group is True) for name, parent, layers in parents]


def install(model: nn.Module, parents: Sequence[Wanted]) -> tuple[Grouped, ...]:
    """Make the layers of parents groups, and those of no others; what is as it is wanted stays as it is."""
    keep = {}
    for each in parents:
        there = attached(each.parent)
        if there is not None and there.wanted == (tuple(each.layers), each.named, each.is_forced):
            keep[each.parent] = there
    _remove(model, keep)
    found = []
    for name, parent, layers, named, is_forced in parents:
        shared = keep.get(parent)
        if shared is None:
            shared = Siblings(tuple(layers), named, is_forced)
            attach(parent, shared)
        _site(layers).fuse()
        for own, layer in layers.items():
            if isinstance(layer, GroupedLoraLinear):
                vars(layer)[PLACE] = shared, own
        found.append(Grouped(name, shared))
    return tuple(found)


def remove(model: nn.Module) -> None:
    """Take everything off again that ``install`` put on, and what ``mixed_batch`` did."""
    _remove(model, {})
    mixed.unbind_checkpoints(model)


def _remove(model: nn.Module, keep: dict[nn.Module, Siblings]) -> None:
    kept = list(keep.values())
    for name, module in model.named_modules():
        if module not in keep:
            detach(module)
        if isinstance(module, GroupedLoraLinear) and not any(place_of(module)[0] is each for each in kept):
            vars(module).pop(PLACE, None)
            _site({name: module}).restore()


def _site(layers: dict[str, Any]) -> Site:
    return Site(layers, {FusedLoraLinear: GroupedLoraLinear}, lambda: None)


def _parents(model: nn.Module) -> Any:
    """Each module with LoRA layers: its name, itself, and they by name; a layer with two parents is the first's."""
    seen: set[nn.Module] = set()
    for name, parent in model.named_modules():
        layers = {own: layer for own, layer in parent.named_children() if _is_lora(layer) and layer not in seen}
        seen.update(layers.values())
        if layers:
            yield name, parent, layers


def _is_lora(module: nn.Module) -> bool:
    return isinstance(module, PeftLinear) and library_class(module) is PeftLinear


def _is_worth_it(layers: dict[str, Any]) -> bool:
    """Whether reading x once could be faster: a CPU's products take far longer than the reading of their input."""
    return all(layer.get_base_layer().weight.is_cuda for layer in layers.values())


def _check_names(groups: Sequence[Group], parents: Sequence[set[str]]) -> None:
    known = set().union(*parents)
    unknown = [name for group in groups for name in group if name not in known]
    if unknown:
        raise ValueError(f"apply: groups must name LoRA layers of PEFT's, {sorted(known)}, got {unknown}")
    for group in groups:
        if not any(set(group) <= parent for parent in parents):
            raise ValueError(f"apply: groups must name layers of one parent, and none has all of {group}")
