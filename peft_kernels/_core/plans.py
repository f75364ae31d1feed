"""What a call does, decided once for all calls that are like it: plans, and the keys by which they are found.

Checks run and a backend is chosen when a plan is made. A later call of the same key needs neither, because the key holds
all that they read: of a tensor its shape, dtype, device and layout, and on CUDA strides and alignment where the operator
asks for them; of other arguments their values; the backend in force, whether gradients are recorded, autocast, and the
generation of what ``auto`` chooses. Nothing of a tensor is kept. What raises makes no plan and raises again.

Calls that are not plain have no key, and are decided anew each time: tensor subclasses (fake ones too), nested tensors,
torch.func, tracers, and the modes of torch's dispatcher and of torch functions.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterable
from types import NoneType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._C import (
    _functorch,
    _get_tracing_state,
    _is_any_autocast_enabled,
    _len_torch_dispatch_stack,
    _len_torch_function_stack,
)
from torch.autograd import forward_ad

from peft_kernels._core import dispatch
from peft_kernels._core.dispatch import Implementation

Key = tuple[Hashable, ...]

SIZE = 2048
"""Plans of one of a cache's two generations: of the last 2048 keys all are remembered, and at most twice as many."""

ALIGNMENT = 16
"""Bytes; what a kernel asks of an address is whether it is a multiple of this."""

_TENSORS = frozenset({Tensor, nn.Parameter})
_VALUES = frozenset({float, int, bool, str, NoneType})


class Plan(NamedTuple):
    """What a call does.

    Attributes:
        problem: as the operator's ``make_problem`` describes it.
        implementation: that runs it.
        native: runs a call by torch's own operators instead, under their own autograd; or None.
        records: whether gradients are recorded.
    """

    problem: Any
    implementation: Implementation
    native: Callable[[Any], Any] | None
    records: bool

    def __str__(self) -> str:
        if self.native is not None:
            return "torch's own operators, recorded by autograd one by one; the host's time is most of this call's"
        if self.records:
            return f"forward and backward of the {self.implementation.name} backend, as one function of autograd"
        return f"forward of the {self.implementation.name} backend, without a graph"


class Keys:
    """The keys of an operator's calls.

    Args:
        fields: names of a call's fields.
        unread: those whose numbers no check and no choice reads, so that the type is enough.
        addressed: those whose strides and addresses ``make_problem`` reads on CUDA.
    """

    def __init__(self, fields: Iterable[str], unread: Iterable[str], addressed: Iterable[str]) -> None:
        unread, addressed = frozenset(unread), frozenset(addressed)
        self._fields = tuple((name in unread, name in addressed) for name in fields)

    def __call__(self, call: Any, backend: str) -> Key | None:
        """The key of a call that is to run on a backend; None where it has none."""
        if (
            _functorch.peek_interpreter_stack() is not None
            or forward_ad._current_level >= 0
            or _len_torch_dispatch_stack() != 0
            or _len_torch_function_stack() != 0
            or _get_tracing_state() is not None
        ):
            return None
        facts: list[Hashable] = [backend, dispatch.generation, torch.is_grad_enabled(), _is_any_autocast_enabled()]
        for value, (unread, addressed) in zip(call, self._fields):  # noqa: B905 (as many; on the way of every call)
            kind = type(value)
            if kind in _TENSORS:
                if value.is_nested:  # has no shape
                    return None
                facts += (value.shape, value.dtype, value.device, value.layout)
                if addressed and value.is_cuda:
                    facts += _address(value)
            elif kind in _VALUES:
                # With the type: 1, 1.0 and True are one key to a dict.
                facts += (kind,) if unread else (kind, value)
            elif kind is tuple:
                facts.append(len(value))
                for each in value:
                    if each is None:
                        facts.append(None)
                    elif type(each) not in _TENSORS or each.is_nested:
                        return None
                    else:
                        facts += (each.shape, each.dtype, each.device, each.layout)
                        if addressed and each.is_cuda:
                            facts += _address(each)
            else:
                return None
        return tuple(facts)


def _address(tensor: Tensor) -> tuple[Hashable, ...]:
    # A sparse tensor has neither; it is refused by its layout.
    return (tensor.stride(), tensor.data_ptr() % ALIGNMENT) if tensor.layout is torch.strided else ()


class Cache:
    """Plans by key: what was asked for lately stays, the rest goes.

    Two dicts: a full one becomes the older one, whose plans are forgotten with the next unless they are asked for. A hit
    is one lookup, without a lock.
    """

    def __init__(self, size: int = SIZE) -> None:
        self._size, self._lock = size, threading.Lock()
        self._newer: dict[Key, Plan] = {}
        self._older: dict[Key, Plan] = {}

    def __len__(self) -> int:
        return len(self._newer.keys() | self._older.keys())

    def get(self, key: Key) -> Plan | None:
        """The plan of a key, if it is still known."""
        plan = self._newer.get(key)
        if plan is None:
            plan = self._older.get(key)
            if plan is not None:
                self.put(key, plan)
        return plan

    def put(self, key: Key, plan: Plan) -> None:
        """Remember a plan."""
        with self._lock:
            if len(self._newer) >= self._size:
                self._newer, self._older = {}, self._newer
            self._newer[key] = plan
