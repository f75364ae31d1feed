"""AdapterHub's files for models with SerialAdapter and ParallelAdapter: ``adapter_config.json`` and the weights.

A file that is written here loads in AdapterHub on the same model without adapters, and the other way round. Keys are
``<block>.<location>.adapters.<name>.adapter_down.0.weight`` (r, K), ``.adapter_up.weight`` (K, r) and their biases.
What both have are adapters on a sublayer's output before it is added to the residual stream: AdapterHub's
configurations "double_seq_bn" (SerialAdapter) and "par_bn" (ParallelAdapter), and others with the same placement.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peft_kernels.adapter import ParallelAdapter, SerialAdapter
from peft_kernels.adapter.insertion import ATTRIBUTE
from peft_kernels.integrations.adapter_files import (
    AdapterFolder,
    check_tensor,
    fitted,
    is_plain,
    number,
    read_folder,
    write_folder,
    write_values,
)
from peft_kernels.integrations.adapterhub.activations import ACTIVATIONS
from peft_kernels.integrations.adapterhub.file_config import OPTIONS, Adapter, Shared, read_config

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "pytorch_adapter.bin"
SAFE_WEIGHTS_FILE = "adapter.safetensors"
# The release of AdapterHub's whose format is written.
_VERSION = "adapters.1.3.0"

# Where AdapterHub keeps the adapters of a sublayer within a block of this class.
LOCATIONS: dict[str, dict[str, str]] = {
    "BertLayer": {"attention": "attention.output", "feed_forward": "output"},
    "GPT2Block": {"attention": "attention_adapters", "feed_forward": "output_adapters"},
    "LlamaDecoderLayer": {"attention": "attention_adapters", "feed_forward": "output_adapters"},
}


class _Place(NamedTuple):
    """An adapter of a model, and where AdapterHub would have it.

    Attributes:
        blocks: path of the container of the blocks.
        layer: index of the block in it.
        sublayer: "attention" or "feed_forward".
        path: of the location, with the container's and the layer's.
    """

    blocks: str
    layer: int
    sublayer: str
    path: str
    adapter: Adapter


def save_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str],
    adapter_name: str = "default",
    *,
    locations: Mapping[str, str] | None = None,
    use_safetensors: bool = False,
) -> None:
    """Write the adapters that ``insert_adapters`` put into a model as one adapter of AdapterHub's.

    Args:
        model: a model of transformers', whose blocks have SerialAdapters or ParallelAdapters, named "attention" and
            "feed_forward".
        folder: is made if it does not exist. The configuration and the weights that lie there are replaced together,
            and whole after an error.
        adapter_name: what AdapterHub is to call it: a name that an nn.ModuleDict takes.
        locations: where AdapterHub keeps the adapters within a block, by sublayer; None knows BertLayer, GPT2Block and
            LlamaDecoderLayer.
        use_safetensors: write ``adapter.safetensors``, which AdapterHub reads if it is told so, instead of
            ``pytorch_adapter.bin``.

    Raises:
        ValueError: there are no such adapters, or one configuration cannot express them all: types, activations or
            scales differ, layers have adapters at different sublayers, or a layer's two have different widths; or the
            name or ``folder`` cannot be one, or a tensor is sharded or without values.
        OSError: the files cannot be written.
    """
    if not isinstance(adapter_name, str) or adapter_name in ("", *dir(nn.ModuleDict())) or "." in adapter_name:
        raise ValueError(f"save_adapter: adapter_name must be a name for an nn.ModuleDict, got {adapter_name!r}")
    places = _places(model, "save_adapter", locations)
    config = {
        "config": _config(model, places),
        "hidden_size": places[0].adapter.down.in_features,
        "model_class": type(model).__name__,
        "model_name": getattr(getattr(model, "config", None), "name_or_path", ""),
        "model_type": getattr(getattr(model, "config", None), "model_type", None),
        "name": adapter_name,
        "version": _VERSION,
    }
    tensors = _tensors(places, adapter_name)

    def write(path: Path) -> None:
        if use_safetensors:
            from safetensors.torch import save_file

            save_file(tensors, path, metadata={"format": "pt"})
        else:
            torch.save(tensors, path)

    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    weights, obsolete = (SAFE_WEIGHTS_FILE, WEIGHTS_FILE) if use_safetensors else (WEIGHTS_FILE, SAFE_WEIGHTS_FILE)
    write_folder("save_adapter", folder, (CONFIG_FILE, text), (weights, write), (obsolete,))


def load_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    locations: Mapping[str, str] | None = None,
    strict: bool = True,
) -> None:
    """Read an adapter of AdapterHub's into the adapters that ``insert_adapters`` put into a model.

    They take the file's weights, activation and scale. Everything is read and checked before the first one is touched.

    Args:
        model: has an adapter of the file's type and width at every place that the file names, and at no other.
        folder: a local folder with ``adapter_config.json``, and ``adapter.safetensors`` or else
            ``pytorch_adapter.bin``; the latter is unpickled with ``weights_only``.
        locations: as ``save_adapter``'s.
        strict: False leaves out what only the file has, and leaves as it is what only the model has.

    Raises:
        FileNotFoundError: the folder or a file is missing.
        ValueError: a file is damaged, holds another kind of adapter, or does not fit the model. The text names the file
            or key, what it must be and what it was. The model is as it was.
    """
    files = read_folder("load_adapter", folder, CONFIG_FILE, SAFE_WEIGHTS_FILE, WEIGHTS_FILE)
    places = _places(model, "load_adapter", locations)
    shared = read_config(files)
    for place in places:
        if not isinstance(place.adapter, shared.kind):
            raise ValueError(
                f"load_adapter: {files.config_file} is of {shared.kind.__name__}s, "
                f"the model has a {type(place.adapter).__name__} at {place.path}"
            )
    places, values = _matched(files, places, shared, getattr(model, "base_model_prefix", ""), strict)
    for place in places:
        place.adapter.activation, place.adapter.scale = shared.activation, shared.scale
    write_values(values)


def _places(model: nn.Module, caller: str, locations: Mapping[str, str] | None) -> list[_Place]:
    places = []
    for path, block in model.named_modules():
        inserted = getattr(block, ATTRIBUTE, None)
        if not isinstance(inserted, nn.ModuleDict):
            continue
        for sublayer, adapter in inserted.items():
            if isinstance(adapter, (SerialAdapter, ParallelAdapter)):
                location = _location(caller, path, block, sublayer, locations)
                blocks, _, layer = path.rpartition(".")
                places.append(_Place(blocks, int(layer), sublayer, f"{path}.{location}", adapter))
    if not places:
        raise ValueError(f"{caller}: {type(model).__name__} must have adapters of insert_adapters, has none")
    return places


def _location(caller: str, path: str, block: nn.Module, sublayer: str, locations: Mapping[str, str] | None) -> str:
    kind = next((cls.__name__ for cls in type(block).__mro__ if cls.__name__ in LOCATIONS), "")
    known = LOCATIONS.get(kind) if locations is None else locations
    if known is None:
        raise ValueError(
            f"{caller}: the blocks must be one of {', '.join(LOCATIONS)} unless locations are given, "
            f"got {type(block).__name__}"
        )
    if sublayer not in OPTIONS or sublayer not in known:
        raise ValueError(f"{caller}: adapters must be named after {', '.join(OPTIONS)}, {path} has {sublayer!r}")
    if not path.rpartition(".")[2].isdecimal():
        raise ValueError(f"{caller}: a block with adapters must be one of a list, got {path!r}")
    return known[sublayer]


def _parts(adapter: Adapter) -> list[tuple[str, nn.Linear, str]]:
    """(end of AdapterHub's key, linear layer, name of its parameter)."""
    linears = {"adapter_down.0": adapter.down, "adapter_up": adapter.up}
    return [(f"{key}.{part}", linear, part) for key, linear in linears.items() for part in ("weight", "bias")]


def _tensors(places: list[_Place], name: str) -> dict[str, Tensor]:
    """A file's tensors by key."""
    tensors = {}
    for place in places:
        for suffix, linear, part in _parts(place.adapter):
            key, value = f"{place.path}.adapters.{name}.{suffix}", getattr(linear, part)
            # AdapterHub's adapters always have biases.
            value = torch.zeros_like(linear.weight[:, 0]) if value is None else value
            check_tensor(f"save_adapter: {key} (whole: gather one that is sharded)", value, _shape(linear, part))
            if not is_plain(value):
                raise ValueError(f"save_adapter: {key} must be a dense tensor with values, is a {type(value).__name__}")
            tensors[key] = value.detach().to("cpu", copy=True).contiguous()
    return tensors


def _shape(linear: nn.Linear, part: str) -> tuple[int, ...]:
    return (linear.out_features, linear.in_features) if part == "weight" else (linear.out_features,)


def _config(model: nn.Module, places: list[_Place]) -> dict[str, Any]:
    """AdapterHub's configuration for all the adapters."""
    first = places[0].adapter
    for place in places:
        number(f"save_adapter: {place.path}", "scale", place.adapter.scale)
        for what, value, expected in (
            ("type", type(place.adapter).__name__, type(first).__name__),
            ("activation", place.adapter.activation, first.activation),
            ("scale", place.adapter.scale, first.scale),
            ("blocks", place.blocks, places[0].blocks),
        ):
            if value != expected:
                raise ValueError(f"save_adapter: all adapters must have one {what}, got {expected!r} and {value!r}")
    sublayers: dict[int, set[str]] = {}
    widths: dict[int, set[int]] = {}
    for place in places:
        sublayers.setdefault(place.layer, set()).add(place.sublayer)
        widths.setdefault(place.layer, set()).add(place.adapter.down.out_features)
    if len({frozenset(names) for names in sublayers.values()}) > 1:
        raise ValueError("save_adapter: layers must have adapters at the same sublayers, got " + _listed(sublayers))
    if any(len(layer) > 1 for layer in widths.values()):
        raise ValueError("save_adapter: the adapters of a layer must have one width, got " + _listed(widths))
    hidden = first.down.in_features
    factors = {str(layer): _reduction_factor(hidden, min(width)) for layer, width in widths.items()}
    layers = len(list(model.get_submodule(places[0].blocks).children()))
    return {
        **{option: sublayer in sublayers[places[0].layer] for sublayer, option in OPTIONS.items()},
        "is_parallel": isinstance(first, ParallelAdapter),
        "non_linearity": next(theirs for theirs, ours in ACTIVATIONS.items() if ours == first.activation),
        "scaling": float(first.scale),
        "reduction_factor": next(iter(factors.values())) if len(set(factors.values())) == 1 else factors,
        "leave_out": [layer for layer in range(layers) if layer not in sublayers],
        "original_ln_before": False,
        "original_ln_after": True,
        "residual_before_ln": True,
    }


def _listed(layers: Mapping[int, set[Any]]) -> str:
    return "; ".join(f"layer {layer}: {', '.join(map(str, sorted(values)))}" for layer, values in layers.items())


def _reduction_factor(hidden: int, width: int) -> float:
    """A factor f of which AdapterHub makes the width: floor(hidden / f)."""
    return hidden / width if hidden % width == 0 else hidden / (width + 0.5)


def _matched(
    files: AdapterFolder, places: list[_Place], shared: Shared, prefix: str, strict: bool
) -> tuple[list[_Place], list[tuple[Tensor, Tensor]]]:
    """The places that the file is for, and each parameter with its value, after every check.

    The base model's own prefix may stand or not, on both sides.
    """
    path, tensors = files.weights_file, files.tensors

    def without_prefix(key: str) -> str:
        return key.removeprefix(f"{prefix}.") if prefix else key

    given = {without_prefix(key): key for key in tensors}
    if len(given) < len(tensors):
        raise ValueError(f"load_adapter: {path} must hold each tensor once, holds some with and without '{prefix}.'")
    keys = {
        place: [f"{place.path}.adapters.{shared.name}.{end}" for end, *_ in _parts(place.adapter)] for place in places
    }
    wanted = {without_prefix(key) for place in places for key in keys[place]}
    for short_key in sorted(given.keys() - wanted) if strict else ():
        raise ValueError(
            f"load_adapter: {path}: key {given[short_key]!r} must name an adapter of the model, which has none there"
        )
    values: list[tuple[Tensor, Tensor]] = []
    chosen = []
    for place in places:
        there = [without_prefix(key) in given for key in keys[place]]
        if not strict and not any(there):
            continue
        if not all(there):
            raise ValueError(f"load_adapter: {path} must hold {keys[place][there.index(False)]!r}, which it lacks")
        if place.sublayer not in shared.sublayers or place.layer in shared.left_out:
            raise ValueError(
                f"load_adapter: {files.config_file} must set {OPTIONS[place.sublayer]} and not leave out layer "
                f"{place.layer}, since {path.name} holds an adapter at {place.path}"
            )
        chosen.append(place)
        for key, (_, linear, part) in zip(keys[place], _parts(place.adapter), strict=True):
            value, parameter = tensors[given[without_prefix(key)]], getattr(linear, part)
            check_tensor(f"load_adapter: {path}: {key}", value, _shape(linear, part))
            if parameter is not None:
                values.append((parameter, fitted(f"load_adapter: {path}: {key}", value, parameter)))
            elif fitted(key, value, linear.weight).any():
                raise ValueError(f"load_adapter: {path}: {key} must be zero, since the model's adapter has no bias")
    if not chosen:
        raise ValueError(f"load_adapter: {path} must hold an adapter that the model has, holds none")
    return chosen, values
