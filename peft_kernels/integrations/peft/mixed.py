"""``mixed_batch``: which adapter each row of the batch uses, for all layers of a model, in training too.

Layers ask for the batch of the block that surrounds their call, in its thread. Checkpointing repeats calls later, in
backward passes behind the block and between those of other batches, so a checkpointed function takes its batch along:
where transformers and torch keep the function that checkpoints, there is one that binds the batch to what it is given.
A call that is checkpointed some other way, and would be repeated without its batch, is an error.
"""

from __future__ import annotations

import inspect
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from peft.tuners.lora.layer import LoraLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from peft_kernels._core.errors import UnsupportedError
from peft_kernels._core.rows import BASE, Rows
from peft_kernels.integrations.peft import bases
from peft_kernels.integrations.peft.banked import Banked
from peft_kernels.integrations.peft.by_row import ByRow, of_batch, plan_of, used_in
from peft_kernels.integrations.peft.eligibility import is_late
from peft_kernels.integrations.sites import Swapped, library_class

# Attributes in which a module keeps the function that checkpoints: transformers' models, torch's CheckpointWrapper.
_CHECKPOINTING = ("_gradient_checkpointing_func", "checkpoint_fn")

_warned: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()


class MixedBatch:
    """The adapters of a batch: what ``mixed_batch`` yields.

    Attributes:
        names: of each row of the batch; "__base__" is none.
        adapters: those that rows use, in the order of their slots.
    """

    def __init__(
        self, names: Sequence[str], offsets: Sequence[int | None] | None, layers: frozenset[int], device: torch.device
    ) -> None:
        self.by_row = ByRow.of(names, offsets)
        self.names, self.adapters = self.by_row.names, self.by_row.adapters
        self._layers, self._device = layers, device
        slots = [self.adapters.index(name) if name != BASE else -1 for name in self.names]
        self._traced = self.by_row._replace(plan=of_batch(slots, self.adapters, device))

    def rows(self, length: int | None = None, device: torch.device | str | None = None) -> Rows:
        """The plan of the batch's rows, for ``Rows.mean`` and this package's functions.

        Args:
            length: tokens of each batch row; None where there is no such dimension.
            device: by default that of the model's first LoRA layer.
        """
        found = self._device if device is None else torch.device(device)
        return plan_of(self.names, self.adapters, None, 1 if length is None else length, found)

    def bound(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, whose calls have this batch wherever and whenever they are made.

        For own calls of torch's checkpointing: ``checkpoint(batch.bound(block), x, use_reentrant=False)``.
        """
        return partial(_within, self, function)

    def is_of(self, layer: nn.Module) -> bool:
        """Whether the layer is one of the model's."""
        return id(layer) in self._layers

    def for_layer(self, x: Tensor) -> ByRow:
        """The same for a layer's call.

        Raises:
            ValueError: x has another number of rows than the batch.
            UnsupportedError: the call would be repeated without its batch.
        """
        if x.shape[0] != len(self.names):
            raise ValueError(f"mixed_batch: names must be as many as rows of x, got {len(self.names)} and {x.shape[0]}")
        if torch.compiler.is_compiling():
            return self._traced
        _check_bound()
        return self.by_row


class _Here(threading.local):
    batch: MixedBatch | None = None


class _Last:
    """The batch of the block that was entered last: torch.compile sees no thread's own."""

    batch: MixedBatch | None = None


_here, _last = _Here(), _Last()


def of(layer: nn.Module) -> MixedBatch | None:
    """The batch that surrounds a layer's call, if the layer is of its model."""
    batch = _last.batch if torch.compiler.is_compiling() else _here.batch
    return batch if batch is not None and batch.is_of(layer) else None


@contextmanager
def mixed_batch(
    model: nn.Module, names: Sequence[str], alora_offsets: Sequence[int | None] | None = None
) -> Iterator[MixedBatch]:
    """See ``peft_kernels.mixed_batch``."""
    layers = _layers(model, names)
    _check_names(model, layers, names)
    used = used_in(names)
    if alora_offsets is None and any(is_late(layer, name) for layer in layers for name in used):
        raise ValueError(
            "mixed_batch: aLoRA adapters need alora_offsets, of each row: how many of its last tokens begin with the "
            "invocation, None for none; peft.tuners.lora.variants.calculate_alora_offsets finds them"
        )
    if alora_offsets is not None and len(alora_offsets) != len(names):
        raise ValueError(
            f"mixed_batch: alora_offsets must be one for each name, got {len(alora_offsets)} and {len(names)}"
        )
    if torch.is_grad_enabled() and model.training:
        _warn_of_frozen(model, layers, used)
    _bind_checkpoints(model)
    # Some base layers have no weight.
    device = next((part.device for layer in layers for part in layer.lora_A.parameters()), torch.device("cpu"))
    batch = MixedBatch(names, alora_offsets, frozenset(map(id, layers)), device)
    with _current(batch):
        yield batch


@contextmanager
def _current(batch: MixedBatch) -> Iterator[None]:
    before = _here.batch, _last.batch
    _here.batch = _last.batch = batch
    try:
        yield
    finally:
        _here.batch, _last.batch = before


def _within(batch: MixedBatch, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if torch.compiler.is_compiling():
        # A graph repeats what it has traced.
        return function(*args, **kwargs)
    with _current(batch):
        return function(*args, **kwargs)


class _Binding:
    """A function that checkpoints others, which take the batch of their call along. Pickled as what it was made of."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        batch = None if torch.compiler.is_compiling() else _here.batch
        if batch is None:
            return self.function(function, *args, **kwargs)
        _check_bound()
        return self.function(batch.bound(function), *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Binding:
        return self

    def __reduce__(self) -> Any:
        return partial, (self.function,)


def _bind_checkpoints(model: nn.Module) -> None:
    for module in model.modules():
        for name in _CHECKPOINTING:
            function = module.__dict__.get(name)
            if callable(function) and not isinstance(function, _Binding):
                setattr(module, name, _Binding(function))


def unbind_checkpoints(model: nn.Module) -> None:
    """Undo what ``mixed_batch`` did to a model's modules."""
    for module in model.modules():
        for name in _CHECKPOINTING:
            function = module.__dict__.get(name)
            if isinstance(function, _Binding):
                setattr(module, name, function.function)


_CHECKPOINT = inspect.unwrap(checkpoint).__code__
_WITHIN = _within.__code__


def _check_bound() -> None:
    """Raise if the innermost call of torch's checkpointing around this one does not bind its function to the batch."""
    frame: Any = sys._getframe(1)
    while frame is not None and frame.f_code is not _WITHIN:
        if frame.f_code is _CHECKPOINT:
            raise UnsupportedError(
                "mixed_batch: a call is checkpointed, and would be repeated without its batch; switch checkpointing on "
                "before the block, or checkpoint batch.bound(function), batch being what mixed_batch yields"
            )
        frame = frame.f_back


def _layers(model: Any, names: Any) -> list[Any]:
    """The model's LoRA layers on these kernels.

    Raises:
        ValueError: there are none, or the arguments are no model and no names.
        UnsupportedError: others take part in the batch.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"mixed_batch: model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(names, str) or not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"mixed_batch: names must be a list of an adapter's name for each batch row, got {names!r}")
    if isinstance(model, nn.DataParallel):
        raise UnsupportedError("mixed_batch: not under nn.DataParallel, whose replicas see parts of the batch; use DDP")
    layers, used, others = [], set(names), []
    for name, module in model.named_modules():
        if isinstance(module, Swapped) and not isinstance(module, Banked) and bases.is_known(library_class(module)):
            layers.append(module)
        elif isinstance(module, (LoraLayer, AuxiliaryTrainingWrapper)) and _adapters_of(module) & (
            used | set(module.active_adapters)
        ):
            others.append(name)
    if not layers:
        raise ValueError("mixed_batch: no LoRA layer of the model is on these kernels; call peft_kernels.apply first")
    if others:
        raise UnsupportedError(
            f"mixed_batch: {len(others)} modules of these or of active adapters are no linear layers on these kernels, "
            f"and would not know of the batch ({', '.join(others[:3])}{', ...' if len(others) > 3 else ''}); apply's "
            "report says why"
        )
    return layers


def _adapters_of(module: Any) -> set[str]:
    if isinstance(module, LoraLayer):
        return {*module.lora_A, *module.lora_embedding_A}
    return set(module._adapters)


def _check_names(model: nn.Module, layers: list[Any], names: Sequence[str]) -> None:
    known = {name for layer in layers for name in layer.lora_A}
    for name in names:
        if name != BASE and name not in known:
            found = ", ".join(map(repr, sorted(known)))
            raise KeyError(f"mixed_batch: no adapter {name!r}; known are {found} and {BASE!r}")


def _warn_of_frozen(model: nn.Module, layers: list[Any], used: Sequence[str]) -> None:
    """Say once of each adapter that none of its parameters is trained."""
    warned = _warned.setdefault(model, set())
    for name in used:
        parts = (part for layer in layers if name in layer.lora_A for part in (layer.lora_A[name], layer.lora_B[name]))
        if name not in warned and not any(p.requires_grad for part in parts for p in part.parameters()):
            warned.add(name)
            text = f"mixed_batch: no parameter of adapter {name!r} requires grad, so that it does not train; PEFT "
            text += "freezes adapters that are not active, model.set_requires_grad([...]) makes them trainable"
            warnings.warn(text, stacklevel=4)
