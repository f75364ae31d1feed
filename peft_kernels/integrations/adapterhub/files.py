"""AdapterHub's files for models with SerialAdapter and ParallelAdapter: ``adapter_config.json`` and the weights.

A file that is written here loads in AdapterHub on the same model without adapters, and the other way round. Keys are
``<block>.<location>.adapters.<name>.adapter_down.0.weight`` (r, K), ``.adapter_up.weight`` (K, r) and their biases.
What both have are adapters on a sublayer's output before it is added to the residual stream: AdapterHub's
configurations "double_seq_bn" (SerialAdapter) and "par_bn" (ParallelAdapter), and others with the same placement.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peft_kernels.adapter import ParallelAdapter, SerialAdapter
from peft_kernels.adapter.insertion import ATTRIBUTE
from peft_kernels.integrations.adapterhub.activations import ACTIVATIONS, BEFORE_VERSIONS
from peft_kernels.integrations.file_readers import read_json_object, read_tensors

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
_OPTIONS = {"attention": "mh_adapter", "feed_forward": "output_adapter"}

# What a configuration may ask for that these modules have no place for; each must be absent or empty.
_UNSUPPORTED = (
    "architecture",
    "ln_before",
    "ln_after",
    "use_gating",
    "phm_layer",
    "inv_adapter",
    "invertible_adapter",
    "cross_adapter",
    "stochastic_depth",
    "dropout",
)

_Adapter = SerialAdapter | ParallelAdapter


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
    adapter: _Adapter


class _Shared(NamedTuple):
    """What all adapters of a file have in common."""

    kind: type[_Adapter]
    activation: str
    scale: float


def save_adapter(
    model: nn.Module,
    folder: str | Path,
    adapter_name: str = "default",
    *,
    locations: Mapping[str, str] | None = None,
    use_safetensors: bool = False,
) -> None:
    """Write the adapters that ``insert_adapters`` put into a model as one adapter of AdapterHub's.

    Args:
        model: a model of transformers', whose blocks have SerialAdapters or ParallelAdapters, named "attention" and
            "feed_forward".
        folder: is made if it does not exist. The configuration and the weights that lie there are replaced.
        adapter_name: what AdapterHub is to call it.
        locations: where AdapterHub keeps the adapters within a block, by sublayer; None knows BertLayer, GPT2Block and
            LlamaDecoderLayer.
        use_safetensors: write ``adapter.safetensors``, which AdapterHub reads if it is told so, instead of
            ``pytorch_adapter.bin``.

    Raises:
        ValueError: there are no such adapters, or one configuration cannot express them all: types, activations or
            scales differ, layers have adapters at different sublayers, or a layer's two have different widths.
    """
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
    tensors = {}
    for place in places:
        for suffix, linear, part in _parts(place.adapter):
            value = getattr(linear, part)
            # AdapterHub's adapters always have biases.
            value = torch.zeros_like(linear.weight[:, 0]) if value is None else value
            tensors[f"{place.path}.adapters.{adapter_name}.{suffix}"] = value.detach().cpu().clone()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name in (WEIGHTS_FILE, SAFE_WEIGHTS_FILE):
        (folder / name).unlink(missing_ok=True)
    if use_safetensors:
        from safetensors.torch import save_file

        save_file(tensors, folder / SAFE_WEIGHTS_FILE, metadata={"format": "pt"})
    else:
        torch.save(tensors, folder / WEIGHTS_FILE)
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def load_adapter(model: nn.Module, folder: str | Path, *, locations: Mapping[str, str] | None = None) -> None:
    """Read an adapter of AdapterHub's into the adapters that ``insert_adapters`` put into a model.

    They take the file's weights, activation and scale. Everything is read and checked before the first one is touched.

    Args:
        model: has an adapter of the file's type and width at every place that the file names, and at no other.
        folder: holds ``adapter_config.json``, and ``adapter.safetensors`` or else ``pytorch_adapter.bin``; the latter
            is unpickled with ``weights_only``.
        locations: as ``save_adapter``'s.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, holds another kind of adapter, or does not fit the model. The text names the file
            or key, what it must be and what it was. The model is as it was.
    """
    folder = Path(folder)
    places = _places(model, "load_adapter", locations)
    name, shared = _read_config(folder / CONFIG_FILE)
    weights_file, tensors = read_tensors("load_adapter", folder, SAFE_WEIGHTS_FILE, WEIGHTS_FILE)
    for place in places:
        if not isinstance(place.adapter, shared.kind):
            raise ValueError(
                f"load_adapter: {folder / CONFIG_FILE} is of {shared.kind.__name__}s, "
                f"the model has a {type(place.adapter).__name__} at {place.path}"
            )
    values = _matched(weights_file, tensors, places, name, getattr(model, "base_model_prefix", ""))
    for place in places:
        place.adapter.activation, place.adapter.scale = shared.activation, shared.scale
    for parameter, value in values:
        # In place, for an optimizer that holds the parameter.
        parameter.data.copy_(value)


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
    if sublayer not in _OPTIONS or sublayer not in known:
        raise ValueError(f"{caller}: adapters must be named after {', '.join(_OPTIONS)}, {path} has {sublayer!r}")
    if not path.rpartition(".")[2].isdecimal():
        raise ValueError(f"{caller}: a block with adapters must be one of a list, got {path!r}")
    return known[sublayer]


def _parts(adapter: _Adapter) -> list[tuple[str, nn.Linear, str]]:
    """(end of AdapterHub's key, linear layer, name of its parameter)."""
    linears = {"adapter_down.0": adapter.down, "adapter_up": adapter.up}
    return [(f"{key}.{part}", linear, part) for key, linear in linears.items() for part in ("weight", "bias")]


def _config(model: nn.Module, places: list[_Place]) -> dict[str, Any]:
    """AdapterHub's configuration for all the adapters."""
    first = places[0].adapter
    for place in places:
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
        **{option: sublayer in sublayers[places[0].layer] for sublayer, option in _OPTIONS.items()},
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


def _read_config(path: Path) -> tuple[str, _Shared]:
    """The adapter's name in the file, and what its adapters share."""
    where = f"load_adapter: {path}"
    outer = read_json_object("load_adapter", path)
    name, config = outer.get("name"), outer.get("config")
    if not isinstance(name, str) or not isinstance(config, dict):
        raise ValueError(f"{where} must have a name and an object config, got {name!r} and a {type(config).__name__}")
    for option in _UNSUPPORTED:
        if config.get(option):
            raise ValueError(f"{where} must not set {option}, got {config[option]!r}")
    parallel = config.get("is_parallel", False)
    if not config.get("original_ln_after", True):
        raise ValueError(f"{where} must set original_ln_after, got False")
    # A parallel adapter reads none of the two.
    for option, refused in (("original_ln_before", True), ("residual_before_ln", "post_add")):
        if not parallel and config.get(option) == refused:
            raise ValueError(f"{where} must not set {option} to {refused!r}: SerialAdapter reads the sublayer's output")
    activation = str(config.get("non_linearity")).lower()
    if "version" not in outer:
        activation = BEFORE_VERSIONS.get(activation, activation)
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"{where} must have a non_linearity of {', '.join(ACTIVATIONS)}, got {config.get('non_linearity')!r}"
        )
    scale = config.get("scaling", 1.0)
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise ValueError(f"{where} must have a number scaling, got {scale!r}")
    return name, _Shared(ParallelAdapter if parallel else SerialAdapter, ACTIVATIONS[activation], float(scale))


def _matched(
    path: Path, tensors: Mapping[str, Tensor], places: list[_Place], name: str, prefix: str
) -> list[tuple[nn.Parameter, Tensor]]:
    """Each parameter with its value, after every check. The base model's own prefix may stand or not, on both sides."""

    def without_prefix(key: str) -> str:
        return key.removeprefix(f"{prefix}.") if prefix else key

    given = {without_prefix(key): key for key in tensors}
    wanted = {}
    for place in places:
        for suffix, linear, part in _parts(place.adapter):
            key = f"{place.path}.adapters.{name}.{suffix}"
            wanted[without_prefix(key)] = key, linear, part
    if len(given) < len(tensors):
        raise ValueError(f"load_adapter: {path} must hold each tensor once, holds some with and without '{prefix}.'")
    for short in sorted(given.keys() - wanted.keys()):
        raise ValueError(
            f"load_adapter: {path}: key {given[short]!r} must name an adapter of the model, which has none there"
        )
    values = []
    for short, (key, linear, part) in wanted.items():
        if short not in given:
            raise ValueError(f"load_adapter: {path} must hold {key!r}, which it lacks")
        value, parameter = tensors[given[short]], getattr(linear, part)
        shape = (linear.out_features, linear.in_features) if part == "weight" else (linear.out_features,)
        if tuple(value.shape) != shape or not value.is_floating_point():
            raise ValueError(
                f"load_adapter: {path}: {key} must be floating {shape}, got {value.dtype} {tuple(value.shape)}"
            )
        if parameter is not None:
            values.append((parameter, value))
        elif value.any():
            raise ValueError(f"load_adapter: {path}: {key} must be zero, since the model's adapter has no bias")
    return values
