"""apply and revert: put a model's layers on this package's kernels in place, and take them off again."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from types import ModuleType

from torch import nn

from peft_kernels._core.errors import UnsupportedError
from peft_kernels.integrations import kept
from peft_kernels.integrations.kept import KeepBase
from peft_kernels.integrations.report import Report, forget
from peft_kernels.integrations.sites import Site
from peft_kernels.integrations.versions import needs

# Library -> the files here that find its sites in a model: sites(model) -> Iterator[Site].
_LIBRARIES = {
    "peft": ("peft.layers", "peft.prompts"),
    "adapters.methods.modeling": ("adapterhub.layers", "adapterhub.batch_split"),
}

# Library -> the file here that makes groups of its layers: wanted(model, group, groups), install(model, wanted) and
# remove(model).
_GROUPS = {"peft": "peft.groups"}

# What a report calls the model itself.
_WHOLE = "the model"


def apply(
    model: nn.Module,
    *,
    strict: bool = False,
    group: bool | str = "auto",
    groups: Sequence[Sequence[str]] | None = None,
    keep_base: KeepBase | None = None,
) -> Report:
    """Put a model of PEFT's or AdapterHub's on these kernels, in place.

    Of PEFT's: its LoRA layers, or the prefixes or prompts of the whole model. Of AdapterHub's: its bottleneck adapters.
    Layers and models keep their parameters, names, hooks and their library's whole interface: saving, merging,
    switching and adding adapters work as before, and every call that the kernels have no equivalent for runs the
    library's own code. A pickled model is the library's, and layers that come later (``add_adapter``) are plain: apply
    again. Applying twice changes nothing.

    Args:
        model: any module that contains PEFT's or AdapterHub's layers, or is PEFT's model for prefix or prompt tuning.
        strict: raise, and change nothing, if as things stand any module of a known kind would fall back, or none would
            run on these kernels.
        group: whether PEFT's LoRA layers of one parent that are handed the same input (q, k and v; gate and up) run as
            one operation. They are found by watching the parent's first eager call; a group whose members do not take
            what was made for them is dissolved. "auto": on a GPU, where the clock finds it faster, and nowhere on a
            CPU; apply again after moving the model. True: wherever it is right; False: nowhere.
        groups: names of layers within their parent, a tuple for each group in the order of their calls, such as
            ``[("q_proj", "k_proj", "v_proj")]``: these are groups, as with ``group=True``, and no others are looked
            for. Nothing has to be watched, so that a model can be compiled before its first call.
        keep_base: where PEFT's LoRA layers keep their base weights while merged, so that ``unmerge`` puts back every
            bit: "device", beside the merged ones, "host", in pinned memory, or False, nowhere: PEFT subtracts. None
            leaves a layer's choice as it is, at first "device". Counts from the next merge into an unmerged layer;
            ``merge_and_unload`` keeps nothing.

    Returns:
        A report: counts, every fallback with its reason; prints well.

    Raises:
        ValueError: ``model`` is no module; ``group`` is something else; ``groups`` has a name that no LoRA layer has,
            one twice, or names that no parent has; ``keep_base`` is no such choice.
        UnsupportedError: ``strict``, and something would fall back; or groups are asked for with torch older than 2.8.
        ImportError: the library is older than what this package knows; says which release is needed.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"apply: model must be a torch.nn.Module, got {type(model).__name__}")
    kept.check_choice("apply", keep_base)
    named = _checked(group, groups)
    sites = _sites(model)
    grouping = _grouping()
    if named is not None and grouping is None:
        raise ValueError(f"apply: groups must name LoRA layers of PEFT's, and there are none, got {named}")
    wanted = [] if grouping is None else grouping.wanted(model, group, named)
    swapped = [site for site in sites if site.why_not() is None]
    report = _report(sites, swapped)
    if strict and (report.fallbacks or not report.fused):
        raise UnsupportedError(f"apply: strict, and not everything can be fused\n{report}{_hint(sites)}")
    if not report.fused:
        text = f"apply: nothing in {type(model).__name__} was put on these kernels\n{report}{_hint(sites)}"
        warnings.warn(text, stacklevel=2)
    for site in swapped:
        site.fuse()
        for module in site.modules.values():
            kept.choose(module, keep_base)
    return report if grouping is None else replace(report, grouped=grouping.install(model, wanted))


def _report(sites: list[Site], swapped: list[Site]) -> Report:
    """Describe what calls of the sites' modules run once some sites are swapped."""
    fused: list[str] = []
    unused: list[str] = []
    fallbacks: dict[str, str] = {}
    for site in sites:
        if site.is_part:
            continue
        reason = site.why_not() or site.why_not_now()
        names = [name or _WHOLE for name in site.modules]
        if reason is not None:
            fallbacks |= dict.fromkeys(names, reason)
        else:
            (unused if site.is_unused() else fused).extend(names)
    modules = tuple(module for site in swapped for module in site.modules.values())
    return Report(tuple(fused), fallbacks, tuple(unused), modules)


def _hint(sites: list[Site]) -> str:
    """What to say where nothing was found."""
    if sites:
        return ""
    return (
        "\n  It has none of PEFT's layers, prefixes and prompts, and none of AdapterHub's adapters. Call apply after"
        "\n  get_peft_model or add_adapter, on what they return or change; this package's own modules need no apply."
    )


def revert(model: nn.Module) -> None:
    """Undo ``apply``: every module is again of its library's own class, and nothing else differs.

    A merged layer stays merged, and what was kept for its ``unmerge`` goes: PEFT subtracts the updates from it.

    Raises:
        ValueError: ``model`` is no module.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"revert: model must be a torch.nn.Module, got {type(model).__name__}")
    grouping = _grouping()
    if grouping is not None:
        grouping.remove(model)
    for site in _sites(model):
        site.restore()
        for module in site.modules.values():
            forget(module)
            kept.forget(module)


def _checked(group: object, groups: Sequence[Sequence[str]] | None) -> list[tuple[str, ...]] | None:
    """The named groups, if there are some."""
    if group not in ("auto", True, False) or not isinstance(group, (bool, str)):
        raise ValueError(f"apply: group must be 'auto', True or False, got {group!r}")
    if groups is None:
        return None
    if group is False:
        raise ValueError(f"apply: group=False makes no groups, got groups={groups!r}")
    if isinstance(groups, str) or not all(isinstance(each, (tuple, list)) and len(each) > 1 for each in groups):
        raise ValueError(f"apply: groups must be tuples of at least two names, got {groups!r}")
    names = [name for each in groups for name in each]
    if not all(isinstance(name, str) for name in names):
        raise ValueError(f"apply: groups must be tuples of names, got {groups!r}")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"apply: a layer is a member of one group, and groups name {twice} more than once")
    return [tuple(each) for each in groups]


def _grouping() -> ModuleType | None:
    """The file that makes groups, if its library was imported."""
    names = [file for library, file in _GROUPS.items() if library in sys.modules]
    return importlib.import_module(f"peft_kernels.integrations.{names[0]}") if names else None


def _sites(model: nn.Module) -> list[Site]:
    # A model holds a library's modules only if that library was imported.
    names = [file for library, files in _LIBRARIES.items() if library in sys.modules for file in files]
    with needs("apply"):
        files = [importlib.import_module(f"peft_kernels.integrations.{name}") for name in names]
    return [site for file in files for site in file.sites(model)]
