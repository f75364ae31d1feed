"""LoRA layers in the place of a model's linear ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import nn

from peft_kernels.lora.module import FusedLoRALinear


def inject_lora(
    model: nn.Module,
    targets: str | Sequence[str],
    r: int = 8,
    lora_alpha: float = 16,
    lora_dropout: float = 0.0,
    use_rslora: bool = False,
    adapter_dtype: torch.dtype | None = None,
    adapter_name: str = "default",
) -> list[str]:
    """Put FusedLoRALinear in the place of linear layers, and freeze all parameters that are no adapter's.

    Whatever else shall train (a head, norms) is thawed afterwards, with ``requires_grad_(True)``.

    Args:
        model: is changed in place.
        targets: patterns of layer names or of their last parts: "q_proj", "layers.?.mlp.*_proj", "*" for all.
        r, lora_alpha, lora_dropout, use_rslora, adapter_dtype, adapter_name: as ``FusedLoRALinear.from_linear``'s.

    Returns:
        The names of the layers that were replaced.

    Raises:
        ValueError: ``model`` is no module or itself the linear layer, a pattern is no name of an nn.Linear in it, or
            ``from_linear`` refuses a layer or an argument; nothing is changed then.

    Example:
        >>> model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9))
        >>> inject_lora(model, ["1"], r=2)
        ['1']
        >>> [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        ['1.lora_A.default', '1.lora_B.default']
    """
    if not isinstance(model, nn.Module) or isinstance(model, nn.Linear):
        raise ValueError(f"inject_lora: model must be a module that contains layers, got {type(model).__name__}")
    patterns = [targets] if isinstance(targets, str) else list(targets)
    # A layer that is used in two places has two names, and stays one.
    linears = {name: part for name, part in model.named_modules(remove_duplicate=False) if isinstance(part, nn.Linear)}
    found = {name: part for name, part in linears.items() if any(_fits(name, pattern) for pattern in patterns)}
    for pattern in patterns:
        if not any(_fits(name, pattern) for name in found):
            raise ValueError(f"inject_lora: no nn.Linear in {type(model).__name__} has a name like {pattern!r}")
    options = (r, lora_alpha, lora_dropout, use_rslora, adapter_dtype, adapter_name)
    put_layers(model, found, lambda name, part: FusedLoRALinear.from_linear(part, *options))
    freeze_all_but_adapters(model)
    return list(found)


def put_layers(
    model: nn.Module, parts: Mapping[str, nn.Linear], make: Callable[[str, nn.Linear], FusedLoRALinear]
) -> Callable[[], None]:
    """Put layers in the place of linear ones, by path; a part that stands at several paths gets one.

    Args:
        make: called with a path and the part there.

    Returns:
        What undoes it, with ``requires_grad`` of all parameters.

    Raises:
        ValueError: ``make`` refuses a part; nothing is changed then.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    layers: dict[int, FusedLoRALinear] = {}

    def undo() -> None:
        for name, part in parts.items():
            _put(model, name, part)
        for parameter in trained:
            parameter.requires_grad_(True)

    try:
        for name, part in parts.items():
            if id(part) not in layers:
                layers[id(part)] = make(name, part)
    except BaseException:
        undo()
        raise
    for name, part in parts.items():
        _put(model, name, layers[id(part)])
    return undo


def _put(model: nn.Module, name: str, part: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, part)


def freeze_all_but_adapters(model: nn.Module) -> None:
    """Set ``requires_grad`` to False but for adapters' parameters, which stay as they are."""
    lora = [part for part in model.modules() if isinstance(part, FusedLoRALinear)]
    adapters = {id(p) for part in lora for p in (*part.lora_A.parameters(), *part.lora_B.parameters())}
    for parameter in model.parameters():
        if id(parameter) not in adapters:
            parameter.requires_grad_(False)


def _fits(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")
