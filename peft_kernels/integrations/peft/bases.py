"""What makes a LoRA layer's frozen product: this package, from a weight that it can read, or the base module itself.

``PLAIN``: the base is an ``nn.Linear`` or ``Conv1D`` that nobody has touched; product and update are one operation.
``GIVEN``: anything else. The base module is called as PEFT calls it, with its hooks and its own autograd, and the
update is added to what it returns.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peft_kernels._core.dispatch import backend_of_graph, requested_backend
from peft_kernels.integrations import calls
from peft_kernels.integrations.hooks import OwnMethods, is_hooked
from peft_kernels.integrations.sites import library_class

PLAIN, GIVEN = "plain", "given"

# PEFT's classes whose forward is ``lora.Linear``'s but for the rounding of sums. By name: most of them exist only where
# the library of their weights is installed.
_SAME_FORWARD = ("gptq.GPTQLoraLinear", "te.TeLinear", "torchao.TorchaoLoraLinear", "inc.IncLoraLinear")
# The same, which leave all casts to CUDA's autocast where that is on.
_FOLLOW_AUTOCAST = (
    "bnb.Linear8bitLt",
    "bnb.Linear4bit",
    "awq.AwqLoraLinear",
    "hqq.HqqLoraLinear",
    "eetq.EetqLoraLinear",
    "aqlm.AqlmLoraLinear",
)
# Those whose forward takes ``adapter_names`` beside PEFT's lora.Linear, and aLoRA's offsets with them.
_TAKE_NAMES = ("torchao.TorchaoLoraLinear", "inc.IncLoraLinear", "bnb.Linear8bitLt", "bnb.Linear4bit")
# The same without offsets.
_TAKE_NAMES_ALONE = ("hqq.HqqLoraLinear",)
_PACKAGE = "peft.tuners.lora."

# Attributes under which PEFT's layers have the base module; they call the first that there is.
_ATTRIBUTES = ("quant_linear_module", "base_layer")


def kind(layer: Any) -> str:
    """Of a layer's base, as things stand."""
    base = layer.base_layer
    if library_class(layer) is not PeftLinear or type(base) not in (nn.Linear, Conv1D) or is_hooked(base):
        return GIVEN
    is_plain = calls.is_plain(base.weight) and (base.bias is None or calls.is_plain(base.bias))
    return PLAIN if is_plain else GIVEN


def is_left_to_peft(x: Tensor) -> bool:
    """Whether PEFT's own sum runs on a given base: on a CPU, where it takes less of the host's time and no more of any
    other, unless a backend is forced.
    """
    if not x.is_cpu:
        return False
    backend = backend_of_graph(None) if torch.compiler.is_compiling() else requested_backend(None)
    return backend.startswith("auto")


def is_known(cls: type[nn.Module]) -> bool:
    """Whether it is a class of PEFT's whose layers have such a base."""
    return cls is PeftLinear or _name(cls) in _SAME_FORWARD or _name(cls) in _FOLLOW_AUTOCAST


def is_four_bit(cls: type[nn.Module]) -> bool:
    """Whether it is PEFT's class of layers on bitsandbytes' 4-bit weights, which ``four_bit.py`` can read."""
    return _name(cls) == "bnb.Linear4bit"


def is_decoded_by_peft(layer: Any) -> bool:
    """Whether PEFT's DoRA has the norms of a given base from a weight of its own, or of bitsandbytes' 4 bits.

    Of 8 bits too, but by code that changes the layer's state: on a CPU PEFT's own second call fails.
    """
    cls = library_class(layer)
    if is_four_bit(cls):
        return True
    return cls is PeftLinear and isinstance(layer.get_base_layer(), (nn.Linear, Conv1D))


def follows_autocast(layer: Any) -> bool:
    """Whether PEFT's layer casts nothing now, because CUDA's autocast is on."""
    return torch.is_autocast_enabled() and _name(library_class(layer)) in _FOLLOW_AUTOCAST


def takes_names(layer: Any, with_offsets: bool = False) -> bool:
    """Whether PEFT's layer takes ``adapter_names``, of aLoRA adapters too."""
    name = _name(library_class(layer))
    return name in ("layer.Linear", *_TAKE_NAMES) or (name in _TAKE_NAMES_ALONE and not with_offsets)


def replaced(layer: Any) -> str | None:
    """The name of a method of the layer's class that another tool replaced, if one did."""
    cls: Any = library_class(layer)
    return None if cls is PeftLinear else _methods(cls).replaced()


def name_of(layer: Any) -> str:
    """The base module's class, for reasons."""
    return type(layer.base_layer).__name__


def cast_of(x: torch.dtype, adapter: torch.dtype) -> torch.dtype:
    """The dtype in which an update takes x outside of autocast: PEFT casts to the adapter's, float32 needs no cast."""
    return x if adapter == torch.float32 and x in (torch.bfloat16, torch.float16) else adapter


def call(layer: Any, x: Tensor) -> Any:
    """What the base module makes of an input, by a call of its own."""
    return layer._modules[_attribute(layer)](x)


def with_output(layer: Any, y: Any) -> Any:
    """A layer of PEFT's with the same adapters, whose base has y for an answer, whatever it is asked.

    PEFT's forward on it goes on from where the base module was called, which is not called twice.
    """
    cls = library_class(layer)
    copied = cls.__new__(cls)
    vars(copied).update(vars(layer))
    vars(copied)["_modules"] = {**layer._modules, _attribute(layer): lambda *args, **kwargs: y}
    return copied


@cache
def _methods(cls: Any) -> OwnMethods:
    names = ("forward", "_cast_input_dtype", "_check_forward_args", "_mixed_batch_forward")
    return OwnMethods(*((cls, name) for name in names if hasattr(cls, name)))


def _name(cls: type[nn.Module]) -> str:
    return f"{cls.__module__}.{cls.__qualname__}".removeprefix(_PACKAGE)


def _attribute(layer: Any) -> str:
    return next(name for name in _ATTRIBUTES if name in layer._modules)
