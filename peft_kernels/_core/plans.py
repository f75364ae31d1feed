"""What a call does, decided once for all calls that are like it: plans, and the keys by which they are found.

Checks run and a backend is chosen when a plan is made. A later call of the same key needs neither, because the key
holds all that they read: of a tensor its shape, dtype, device and layout, and on CUDA strides and alignment where the
operator asks for them; of other arguments their values; the backend in force, whether gradients are recorded, autocast,
and the generation of what ``auto`` chooses. Nothing of a tensor is kept. What raises makes no plan and raises again.

Calls that are not plain have no key, and are decided anew each time: tensor subclasses (fake ones too), nested tensors,
torch.func, tracers, and the modes of torch's dispatcher and of torch functions.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from operator import attrgetter, itemgetter
from types import NoneType
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, is_grad_enabled, nn
from torch._C import (
    _functorch,
    _get_tracing_state,
    _len_torch_dispatch_stack,
    _len_torch_function_stack,
)
from torch.autograd import forward_ad

from peft_kernels._core import dispatch
from peft_kernels._core.autocast import is_any_autocast
from peft_kernels._core.dispatch import Implementation
from peft_kernels._core.signature import Signature
from peft_kernels._core.triton_tools import dot_precision

Key = tuple[Hashable, ...]
Value = TypeVar("Value")

SIZE = 2048
"""Plans of one of a cache's two generations: of the last 2048 keys all are remembered, and at most twice as many."""

ALIGNMENT = 16
"""Bytes; what a kernel asks of an address is whether it is a multiple of this."""

_PLAIN = frozenset({Tensor, nn.Parameter, float, int, bool, str, torch.dtype, NoneType})
_facts = attrgetter("shape", "dtype", "device", "layout", "__class__")
_DEVICE = 2


class Plan(NamedTuple):
    """What a call does.

    Attributes:
        problem: as the operator's ``make_problem`` describes it.
        backend: that was in force.
        implementation: that runs it.
        native: runs a call by torch's own operators instead, under their own autograd; or None.
        records: whether gradients are recorded.
        is_timed: whether the clock decides about such calls.
        generation: of what ``auto`` chooses.
    """

    problem: Any
    backend: str
    implementation: Implementation
    native: Callable[[Any], Any] | None
    records: bool
    is_timed: bool
    generation: int

    def __str__(self) -> str:
        if self.native is not None:
            return "torch's own operators, recorded by autograd one by one; the host's time is most of this call's"
        if self.records:
            return f"forward and backward of the {self.implementation.title} backend, as one function of autograd"
        return f"forward of the {self.implementation.title} backend, without a graph"


def is_seen_into() -> bool:
    """Whether torch.func, a tracer or a mode has to see what is inside of calls, or changes what operations mean."""
    return (
        _functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or _len_torch_dispatch_stack() != 0
        or _len_torch_function_stack() != 0
        or _get_tracing_state() is not None
    )


class Keys:
    """The keys of an operator's calls.

    Args:
        signature: of the operator.
        addressed: arguments whose strides and addresses ``make_problem`` reads on CUDA.
    """

    def __init__(self, signature: Signature, addressed: Sequence[str]) -> None:
        self._leaves = signature.leaves if any(map(signature.is_tuple, signature.types)) else None
        self._addressed = tuple(addressed)
        # Of a scale no check and no choice reads the number: its type is enough.
        read = [place for place, name in enumerate(signature.types) if signature.is_value(name)]
        self._values: Callable[[Any], Hashable] = itemgetter(*read) if read else lambda call: None
        # Combinations of types that were seen to be plain, a few, as arguments are there or not: which are tensors.
        self._plain: dict[tuple[type, ...], Callable[[Any], tuple[Tensor, ...]]] = {}

    def __call__(self, call: Any, backend: str) -> Key | None:
        """The key of a call that is to run on a backend; None where it has none."""
        if is_seen_into():
            return None
        lengths, leaves = (), call
        if self._leaves is not None:
            lengths, *leaves = self._leaves(call)
        types = tuple(map(type, leaves))
        tensors_of = self._plain.get(types) or self._tensors_of(types)
        if tensors_of is None:
            return None
        tensors = tensors_of(leaves)
        try:
            facts: tuple[Any, ...] = tuple(map(_facts, tensors))
        except RuntimeError:  # a nested tensor has no shape
            return None
        if facts and _is_timed(facts[0][_DEVICE]):
            # What is fastest depends on which gradients there are, and what is right on what float32 products may do
            # and on whether torch has to give the same bits twice.
            facts += (*(tensor.requires_grad for tensor in tensors), dot_precision(torch.float32))
            facts += (torch.get_deterministic_debug_mode(),)
            facts += tuple(_address(getattr(call, name)) for name in self._addressed)
        state = backend, dispatch.generation, is_grad_enabled(), is_any_autocast()
        # With the types, because 1, 1.0 and True are one key to a dict.
        return (*state, lengths, types, self._values(call), facts)

    def _tensors_of(self, types: tuple[type, ...]) -> Callable[[Any], tuple[Tensor, ...]] | None:
        """What takes the tensors from leaves of these types, None where one of them is not plain."""
        if not _PLAIN.issuperset(types):
            return None
        places = [place for place, kind in enumerate(types) if issubclass(kind, Tensor)]
        several = itemgetter(*places) if len(places) > 1 else lambda leaves: tuple(leaves[place] for place in places)
        self._plain[types] = several
        return several


def _is_timed(device: torch.device) -> bool:
    return device.type == "cuda"


def _address(tensor: Any) -> Hashable:
    if isinstance(tensor, tuple):
        return tuple(map(_address, tensor))
    if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided:
        return None  # which is refused
    return tensor.stride(), tensor.data_ptr() % ALIGNMENT


class Cache(Generic[Value]):
    """Values by key, plans above all: what was asked for lately stays, the rest goes.

    Two dicts: a full one becomes the older one, whose plans are forgotten with the next unless they are asked for. A
    hit is one lookup, without a lock.
    """

    def __init__(self, size: int = SIZE) -> None:
        self._size, self._lock = size, threading.Lock()
        self._newer: dict[Key, Value] = {}
        self._older: dict[Key, Value] = {}

    def __len__(self) -> int:
        return len(self._newer.keys() | self._older.keys())

    def get(self, key: Key) -> Value | None:
        """The plan of a key, if it is still known."""
        plan = self._newer.get(key)
        if plan is None:
            plan = self._older.get(key)
            if plan is not None:
                self.put(key, plan)
        return plan

    def put(self, key: Key, plan: Value) -> None:
        """Remember a plan."""
        with self._lock:
            if len(self._newer) >= self._size:
                self._newer, self._older = {}, self._newer
            self._newer[key] = plan


class Recent:
    """The last plan of each of many callers whose calls differ in their tensors alone, such as the layers of a model.

    It is found without a key, in half the time, and on a CPU alone, where strides and addresses decide nothing.
    Who the caller is only says where to look: a plan is returned for tensors that are like those of its own call.
    """

    def __init__(self, size: int = SIZE) -> None:
        self._size = size
        self._plans: dict[int, tuple[Any, ...]] = {}

    def get(self, caller: int, tensors: tuple[Any, ...]) -> Plan | None:
        """The caller's last plan, if it is one for these tensors, as things stand; they may be anything."""
        facts, plan, backend, generation, records = self._plans.get(caller, _NOTHING)
        if (
            plan is None
            or generation != dispatch.generation
            or records is not is_grad_enabled()
            or is_seen_into()
            or is_any_autocast()
            or backend != dispatch.requested_backend(None)
        ):
            return None
        try:
            return plan if tuple(map(_facts, tensors)) == facts else None
        except (AttributeError, RuntimeError):  # no tensor at all, or a nested one, which has no shape
            return None

    def put(self, caller: int, tensors: tuple[Tensor, ...], plan: Plan) -> None:
        """Remember a plan that was found by its key."""
        if plan.problem.device.type == "cpu" and not is_any_autocast():
            if len(self._plans) >= self._size:
                self._plans = {}
            facts = tuple(map(_facts, tensors))
            self._plans[caller] = facts, plan, plan.backend, plan.generation, plan.records


_NOTHING = (None,) * 5
