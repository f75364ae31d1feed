"""``adapter_config.json`` of a LoRA adapter: what one says of each layer, and one that says what layers have."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from peft_kernels.integrations.adapter_files import AdapterFolder, number, short, typed
from peft_kernels.integrations.peft.adapter_folder import refuse_others, where_of
from peft_kernels.integrations.peft.patterns import Pattern
from peft_kernels.lora import FusedLoRALinear

_READ = (
    "r",
    "lora_alpha",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
    "init_lora_weights",
    "bias",
    "lora_dropout",
)
# What they concern is not in a file, or has no effect without another option, which is refused.
_WITHOUT_EFFECT = (
    "fan_in_fan_out",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "megatron_core",
    "qalora_group_size",
    "runtime_config",
    "ensure_weight_tying",
)
# Initialisations that leave the base weight alone: PEFT changes it for others, also when it loads.
_INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")

_Table = list[tuple[str, Pattern, Any]]


class LoraConfig(NamedTuple):
    """What a file's configuration says of each layer, by its path."""

    r: int
    alpha: float
    ranks: _Table
    alphas: _Table
    dropout: float
    use_rslora: bool
    targets: Targets

    def rank(self, name: str) -> int:
        """The rank of a layer."""
        return int(_look_up(self.ranks, name, self.r))

    def scaling(self, name: str) -> float:
        """The scaling of a layer."""
        return _look_up(self.alphas, name, self.alpha) / _divisor(self.rank(name), self.use_rslora)


class Targets(NamedTuple):
    """Which modules of a model PEFT gives an adapter.

    Attributes:
        modules: None if the file does not say.
        layers: indices, or None for all.
        containers: what may stand before an index; empty for anything.
    """

    modules: Pattern | tuple[str, ...] | None
    excluded: Pattern | tuple[str, ...]
    layers: tuple[int, ...] | None
    containers: tuple[str, ...]

    def include(self, name: str) -> bool | None:
        """Whether the module of a path is one, as PEFT finds it."""
        if self.modules is None:
            return None
        if is_named(self.excluded, name) or not is_named(self.modules, name):
            return False
        if self.layers is None or isinstance(self.modules, Pattern) or name in self.modules:
            return True
        # The first index in a path is the layer's; later ones count experts.
        starts = [rf"(?:^|.*?\.){container}" for container in self.containers] or [r".*?\.[^.]*"]
        found = next(filter(None, (re.match(rf"{start}\.(\d+)\.", name) for start in starts)), None)
        return found is not None and int(found[1]) in self.layers


def read_config(files: AdapterFolder) -> LoraConfig:
    """Check a configuration.

    Raises:
        ValueError: it has a value that is none, or asks for what FusedLoRALinear has no place for.
    """
    where, config = where_of(files), files.config
    refuse_others(files, (*_READ, *_WITHOUT_EFFECT))
    initialisation = config.get("init_lora_weights")
    if (initialisation.lower() if isinstance(initialisation, str) else initialisation) not in _INITIALISATIONS:
        raise ValueError(
            f"{where} must not set init_lora_weights to {short(initialisation)}, which changes the base "
            "weight; PEFT's save_pretrained(path_initial_model_for_weight_conversion=...) writes plain LoRA"
        )
    if config.get("bias", "none") not in ("none", "all", "lora_only"):
        raise ValueError(f"{where} must have a bias of none, all or lora_only, got {short(config['bias'])}")
    if not 0 <= number(where, "lora_dropout", config.get("lora_dropout", 0.0)) <= 1:
        raise ValueError(f"{where} must have a lora_dropout in [0, 1], got {short(config['lora_dropout'])}")
    return LoraConfig(
        _rank(where, "r", config.get("r")),
        number(where, "lora_alpha", config.get("lora_alpha")),
        _table(where, "rank_pattern", config, _rank),
        _table(where, "alpha_pattern", config, number),
        config.get("lora_dropout", 0.0),
        bool(typed(where, "use_rslora", config.get("use_rslora"), bool, None)),
        _targets(where, config),
    )


def _rank(where: str, key: str, value: object) -> int:
    if typed(where, key, value, int) < 1:
        raise ValueError(f"{where} must have a {key} of at least 1, got {short(value)}")
    return value  # type: ignore[return-value]


def _table(where: str, option: str, config: Mapping[str, Any], check: Any) -> _Table:
    patterns = typed(where, option, config.get(option), dict, None) or {}
    return [
        (key, Pattern(f"{where}: {option}", key, at_a_dot=True), check(where, f"{option}[{key!r}]", value))
        for key, value in patterns.items()
    ]


def _look_up(table: _Table, name: str, default: float) -> float:
    """PEFT's rule: the first pattern that matches, or else the key that is the path itself."""
    for _, pattern, value in table:
        if pattern.match(name):
            return value
    return next((value for key, _, value in table if key == name), default)


def _targets(where: str, config: Mapping[str, Any]) -> Targets:
    modules, indices = names_or_pattern(where, "target_modules", config), config.get("layers_to_transform")
    containers = names_or_pattern(where, "layers_pattern", config, literal=True)
    indices = typed(where, "layers_to_transform", [indices] if isinstance(indices, int) else indices, list, None)
    for index in indices or ():
        typed(where, "layers_to_transform", index, int)
    return Targets(
        modules,
        names_or_pattern(where, "exclude_modules", config) or (),
        tuple(indices) if indices else None,
        containers or (),
    )


def names_or_pattern(where: str, option: str, config: Mapping[str, Any], literal: bool = False) -> Any:
    """The names in an option, or its pattern where it is one string."""
    value = typed(where, option, config.get(option), str, list, None)
    if isinstance(value, str) and not literal:
        # PEFT's word for what depends on the model; it writes the names instead.
        return None if value.lower() == "all-linear" else Pattern(f"{where}: {option}", value)
    names = (value,) if isinstance(value, str) else tuple(value or ()) if value is not None else None
    for name in names or ():
        if not isinstance(name, str) or (literal and not re.fullmatch(r"[\w.]*", name)):
            raise ValueError(f"{where} must have names in {option}, got {short(name)}")
    return names


def is_named(modules: Pattern | tuple[str, ...], name: str) -> bool:
    if isinstance(modules, Pattern):
        return modules.fullmatch(name)
    return any(name == module or name.endswith(f".{module}") for module in modules)


def make_config(layers: Mapping[str, FusedLoRALinear], adapter: str, others: Iterable[str]) -> dict[str, Any]:
    """The options that say what layers have, by path, in an adapter.

    Args:
        others: paths of the model's other modules.

    Raises:
        ValueError: one configuration cannot express it, or a scaling is no finite number.
    """
    shared = {(layer.lora_dropout, layer.use_rslora) for layer in layers.values()}
    if len(shared) > 1:
        raise ValueError(f"save_adapter: layers must share dropout and use_rslora, got {sorted(shared)}")
    ((dropout, use_rslora),) = shared
    ranks = {name: layer.lora_A[adapter].shape[0] for name, layer in layers.items()}
    alphas = {
        name: _alpha(name, layer.scaling[adapter], _divisor(ranks[name], use_rslora)) for name, layer in layers.items()
    }
    r, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    ends = {name[start:] for name in others for start in _starts(name)}
    return {
        "peft_type": "LORA",
        # A name in a list is that of every module whose path ends so.
        "target_modules": "|".join(map(re.escape, sorted(layers))) if ends & layers.keys() else sorted(layers),
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != r},
        "alpha_pattern": {f"^{re.escape(name)}": value for name, value in alphas.items() if value != alpha},
        "lora_dropout": dropout,
        "use_rslora": use_rslora,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }


def _starts(name: str) -> list[int]:
    return [0, *(match.end() for match in re.finditer(r"\.", name))]


def _alpha(name: str, scaling: object, divisor: float) -> float:
    """The number that gives the scaling back when it is divided, an integer if there is one."""
    product = number("save_adapter: a layer", f"{name}.scaling", scaling) * divisor
    near = (round(product), product, math.nextafter(product, math.inf), math.nextafter(product, -math.inf))
    return next((alpha for alpha in near if alpha / divisor == scaling), product)


def _divisor(r: int, use_rslora: bool) -> float:
    return math.sqrt(r) if use_rslora else r
