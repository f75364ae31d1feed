"""apply and revert: put a model's layers on this package's kernels in place, and take them off again."""

from __future__ import annotations

import importlib
import sys
import warnings

from torch import nn

from peft_kernels._core.errors import UnsupportedError
from peft_kernels.integrations.report import Report, forget
from peft_kernels.integrations.sites import Site
from peft_kernels.integrations.versions import needs

# Library -> the files here that find its sites in a model: sites(model) -> Iterator[Site].
_LIBRARIES = {
    "peft": ("peft.layers", "peft.prompts"),
    "adapters.methods.modeling": ("adapterhub.layers",),
}

# What a report calls the model itself.
_WHOLE = "the model"


def apply(model: nn.Module, *, strict: bool = False) -> Report:
    """Put a model of PEFT's or AdapterHub's on these kernels, in place.

    Of PEFT's: its LoRA layers, or the prefixes or prompts of the whole model. Of AdapterHub's: its bottleneck adapters.
    Layers and models keep their parameters, names, hooks and their library's whole interface: saving, merging,
    switching and adding adapters work as before, and every call that the kernels have no equivalent for runs the
    library's own code. Layers that come later (``add_adapter``) are plain: apply again. Applying twice changes nothing.

    Args:
        model: any module that contains PEFT's or AdapterHub's layers, or is PEFT's model for prefix or prompt tuning.
        strict: raise, and change nothing, if any module of a known kind cannot be fused or there is none.

    Returns:
        A report: counts, every fallback with its reason; prints well.

    Raises:
        ValueError: ``model`` is no module.
        UnsupportedError: ``strict``, and something would fall back.
        ImportError: the library is older than what this package knows; says which release is needed.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"apply: model must be a torch.nn.Module, got {type(model).__name__}")
    sites = [(site, site.why_not()) for site in _sites(model)]
    fused: dict[str, nn.Module] = {}
    fallbacks: dict[str, str] = {}
    for site, reason in sites:
        for name, module in site.modules.items():
            if reason is None:
                fused[name or _WHOLE] = module
            else:
                fallbacks[name or _WHOLE] = reason
    report = Report(tuple(fused), fallbacks, tuple(fused.values()))
    if strict and (fallbacks or not fused):
        raise UnsupportedError(f"apply: strict, and not everything can be fused\n{report}")
    if not fused:
        warnings.warn(f"apply: nothing in {type(model).__name__} was put on these kernels\n{report}", stacklevel=2)
    for site, reason in sites:
        if reason is None:
            site.fuse()
    return report


def revert(model: nn.Module) -> None:
    """Undo ``apply``: every module is again of its library's own class, and nothing else differs.

    Raises:
        ValueError: ``model`` is no module.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"revert: model must be a torch.nn.Module, got {type(model).__name__}")
    for site in _sites(model):
        site.restore()
        for module in site.modules.values():
            forget(module)


def _sites(model: nn.Module) -> list[Site]:
    # A model holds a library's modules only if that library was imported.
    names = [file for library, files in _LIBRARIES.items() if library in sys.modules for file in files]
    with needs("apply"):
        files = [importlib.import_module(f"peft_kernels.integrations.{name}") for name in names]
    return [site for file in files for site in file.sites(model)]
