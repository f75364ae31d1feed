"""What FusedLoRALinear does with its adapters, for all such layers of a model, and their adapters' parameters alone.

Each function checks all layers before it changes the first.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from peft_kernels._core import arguments
from peft_kernels.lora.module import FusedLoRALinear
from peft_kernels.lora.named_adapters import Disabled


def add_adapter(model: nn.Module, name: str, r: int = 8, lora_alpha: float = 16) -> None:
    """Add an adapter to every FusedLoRALinear of a model, that changes nothing yet, without making it active.

    Raises:
        ValueError: the model has no such layer, or one of them refuses: the name is taken or bad, ``r`` or
            ``lora_alpha`` is.
    """
    added: list[FusedLoRALinear] = []
    layers = _layers("add_adapter", model)
    try:
        for path, layer in layers.items():
            if name in layer.scaling:
                raise ValueError(f"add_adapter: {path or 'model'} has an adapter {name!r} already")
            layer.add_adapter(name, r, lora_alpha)
            added.append(layer)
    except ValueError:
        for layer in added:
            layer.delete_adapter(name)
        raise


def set_adapter(model: nn.Module, name: str | None) -> None:
    """Make an adapter active in all of a model's FusedLoRALinear layers, or none; copies nothing.

    A layer that has no adapter of this name has none active then. ``requires_grad`` stays as it is.

    Raises:
        KeyError: no layer has such an adapter.
        ValueError: the model has no such layer, or one is merged with another adapter.

    Example:
        >>> import peft_kernels as pk
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        >>> pk.inject_lora(model, "*", r=2, adapter_name="first")
        ['0', '1']
        >>> pk.add_adapter(model, "second", r=2)
        >>> pk.set_adapter(model, "second")
        >>> model[1].active_adapter
        'second'
    """
    layers = _layers("set_adapter", model)
    if name is not None:
        _check_known("set_adapter", layers, name)
    wanted = {path: name if name in layer.scaling else None for path, layer in layers.items()}
    for path, layer in layers.items():
        if layer.merged and layer.active_adapter != wanted[path]:
            raise ValueError(
                f"set_adapter: {path or 'model'} is merged with {layer.active_adapter!r}; call its unmerge() first"
            )
    for path, layer in layers.items():
        layer.set_adapter(wanted[path])


def delete_adapter(model: nn.Module, name: str) -> None:
    """Remove an adapter, which may not be active, from the FusedLoRALinear layers of a model that have it.

    Raises:
        KeyError: no layer has such an adapter.
        ValueError: the model has no such layer, or the adapter is active in one.
    """
    layers = _having("delete_adapter", model, name)
    for path, layer in layers.items():
        if layer.active_adapter == name:
            raise ValueError(
                f"delete_adapter: {name!r} is active in {path or 'model'}; call set_adapter with another first"
            )
    for layer in layers.values():
        layer.delete_adapter(name)


def set_scale(model: nn.Module, name: str, scale: float) -> None:
    """Make an adapter's scaling ``scale`` times what it was added or loaded with, in all layers that have it.

    Raises:
        KeyError: no layer has such an adapter.
        ValueError: the model has no such layer, ``scale`` is no number, or a base weight was overwritten with this
            adapter.
    """
    layers = _having("set_scale", model, name)
    arguments.number("set_scale", "scale", scale)
    for path, layer in layers.items():
        if layer.is_overwritten and layer.active_adapter == name:
            raise ValueError(f"set_scale: merge(keep_base=False) overwrote the base weight of {path or 'model'}")
    for layer in layers.values():
        layer.set_scale(name, scale)


def disable_adapters(model: nn.Module) -> Disabled:
    """Make all FusedLoRALinear layers of a model compute what their base does; what is active stays active.

    Returns:
        For a ``with`` block, at whose end the layers that this call has disabled are enabled again.

    Raises:
        ValueError: the model has no such layer, or a base weight was overwritten.

    Example:
        >>> layer, x = FusedLoRALinear(4, 3, r=2), torch.ones(1, 4)
        >>> with disable_adapters(layer):
        ...     base = layer(x)
        >>> layer.enabled
        True
    """
    layers = _layers("disable_adapters", model)
    for path, layer in layers.items():
        if layer.is_overwritten:
            raise ValueError(f"disable_adapters: merge(keep_base=False) overwrote the base weight of {path or 'model'}")
    disabled = [layer for layer in layers.values() if layer.enabled]
    for layer in disabled:
        layer.disable_adapters()
    return Disabled(disabled)


def enable_adapters(model: nn.Module) -> None:
    """Undo ``disable_adapters``.

    Raises:
        ValueError: the model has no FusedLoRALinear.
    """
    for layer in _layers("enable_adapters", model).values():
        layer.enable_adapters()


def lora_parameters(model: nn.Module, name: str | None = None) -> list[nn.Parameter]:
    """A and B of all FusedLoRALinear layers of a model, for an optimizer: of one adapter, or of all for None.

    Raises:
        KeyError: no layer has such an adapter.
        ValueError: the model has no such layer.
    """
    return [parameter for _, parameter in _named("lora_parameters", model, name)]


def lora_state_dict(model: nn.Module, name: str | None = None) -> dict[str, Tensor]:
    """The same under their names in ``model.state_dict()``; ``load_state_dict(..., strict=False)`` takes it.

    Raises:
        KeyError: no layer has such an adapter.
        ValueError: the model has no FusedLoRALinear.
    """
    return {key: parameter.detach() for key, parameter in _named("lora_state_dict", model, name)}


def _named(caller: str, model: nn.Module, name: str | None) -> Iterator[tuple[str, nn.Parameter]]:
    layers = _layers(caller, model) if name is None else _having(caller, model, name)
    for path, layer in layers.items():
        for letter, factors in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B)):
            for adapter in factors if name is None else (name,):
                yield f"{path}.{letter}.{adapter}".removeprefix("."), factors[adapter]


def _layers(caller: str, model: nn.Module) -> dict[str, FusedLoRALinear]:
    if not isinstance(model, nn.Module):
        raise ValueError(f"{caller}: model must be a torch.nn.Module, got {type(model).__name__}")
    layers = {path: part for path, part in model.named_modules() if isinstance(part, FusedLoRALinear)}
    if not layers:
        raise ValueError(
            f"{caller}: {type(model).__name__} has no FusedLoRALinear; inject_lora puts them in, and a model that PEFT "
            "has built is switched by PEFT's own methods"
        )
    return layers


def _having(caller: str, model: nn.Module, name: str) -> dict[str, FusedLoRALinear]:
    layers = _layers(caller, model)
    _check_known(caller, layers, name)
    return {path: layer for path, layer in layers.items() if name in layer.scaling}


def _check_known(caller: str, layers: dict[str, FusedLoRALinear], name: str) -> None:
    known = {each for layer in layers.values() for each in layer.scaling}
    if name not in known:
        raise KeyError(f"{caller}: there is no adapter {name!r}; there are {sorted(known)}")
