"""``adapter_config.json`` of an adapter of AdapterHub's, read: what its adapters share, and where they are."""

from __future__ import annotations

from typing import NamedTuple

from peft_kernels.adapter import ParallelAdapter, SerialAdapter
from peft_kernels.integrations.adapter_files import AdapterFolder, number, short, typed
from peft_kernels.integrations.adapterhub.activations import ACTIVATIONS, BEFORE_VERSIONS

# The option for each sublayer.
OPTIONS = {"attention": "mh_adapter", "feed_forward": "output_adapter"}

# What a configuration may set; anything else must be absent or empty.
_READ = (
    *OPTIONS.values(),
    "is_parallel",
    "leave_out",
    "non_linearity",
    "original_ln_after",
    "original_ln_before",
    "reduction_factor",
    "residual_before_ln",
    "scaling",
)
# How weights were made, or nothing without an option that is refused.
_WITHOUT_EFFECT = (
    "adapter_residual_before_ln",
    "factorized_phm_W",
    "factorized_phm_rule",
    "hypercomplex_nonlinearity",
    "init_weights",
    "init_weights_seed",
    "inv_adapter_reduction_factor",
    "learn_phm",
    "phm_bias",
    "phm_c_init",
    "phm_dim",
    "phm_init_range",
    "phm_rank",
    "shared_W_phm",
    "shared_phm_rule",
)

Adapter = SerialAdapter | ParallelAdapter


class Shared(NamedTuple):
    """What all adapters of a file have in common, and where they are: at which sublayers, but for these layers."""

    name: str
    kind: type[Adapter]
    activation: str
    scale: float
    sublayers: tuple[str, ...]
    left_out: tuple[int, ...]


def read_config(files: AdapterFolder) -> Shared:
    """Check a configuration.

    Raises:
        ValueError: it has a value that is none, or asks for what these modules have no place for.
    """
    where, outer = f"load_adapter: {files.config_file}", files.config
    name, config = outer.get("name"), outer.get("config")
    if not isinstance(name, str) or not isinstance(config, dict):
        raise ValueError(
            f"{where} must have a name and an object config, got {short(name)} and a {type(config).__name__}"
        )
    for option in sorted(config.keys() - {*_READ, *_WITHOUT_EFFECT}):
        if config[option]:
            raise ValueError(f"{where} must not set {option}, got {short(config[option])}")
    parallel = typed(where, "is_parallel", config.get("is_parallel", False), bool)
    if config.get("original_ln_after", True) is not True:
        raise ValueError(f"{where} must set original_ln_after, got {short(config['original_ln_after'])}")
    # A parallel adapter reads none of the two.
    for option, taken in (("original_ln_before", (False,)), ("residual_before_ln", (True, False))):
        value = config.get(option, taken[0])
        if not parallel and not any(value is right for right in taken):
            raise ValueError(
                f"{where} must not set {option} to {short(value)}: SerialAdapter reads the sublayer's output"
            )
    activation = str(config.get("non_linearity")).lower()
    if "version" not in outer:
        activation = BEFORE_VERSIONS.get(activation, activation)
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"{where} must have a non_linearity of {', '.join(ACTIVATIONS)}, got {short(config.get('non_linearity'))}"
        )
    _check_widths(where, config.get("reduction_factor"))
    left_out = typed(where, "leave_out", config.get("leave_out"), list, None) or []
    return Shared(
        name,
        ParallelAdapter if parallel else SerialAdapter,
        ACTIVATIONS[activation],
        float(number(where, "scaling", config.get("scaling", 1.0))),
        tuple(s for s, option in OPTIONS.items() if typed(where, option, config.get(option), bool)),
        tuple(typed(where, "leave_out", layer, int) for layer in left_out),
    )


def _check_widths(where: str, factor: object) -> None:
    """The tensors tell the widths; this says that the reduction factors are numbers."""
    for value in (factor.values() or [None]) if isinstance(factor, dict) else [factor]:
        if number(where, "reduction_factor", value) <= 0:
            raise ValueError(f"{where} must have a reduction_factor above 0, got {short(value)}")
