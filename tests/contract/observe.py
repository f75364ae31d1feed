"""What happens below a call: which implementation runs, which registered operators, what autograd saves."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode

from tests.contract.operators import Operator


@contextlib.contextmanager
def implementations_run(operator: Operator) -> Iterator[list[tuple[str, str]]]:
    """Pass of each function of an implementation that is called inside, and the implementation's name."""
    calls: list[tuple[str, str]] = []

    def recording(called: str, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def record(*arguments: Any) -> Any:
            calls.append((called, name))
            return function(*arguments)

        return record

    with contextlib.ExitStack() as stack:
        for implementation in operator.op.OPERATOR.implementations:
            for called in ("forward", "backward"):
                function = getattr(implementation, called)
                # In the frozen record itself, which others may have taken from wherever it is listed.
                object.__setattr__(implementation, called, recording(called, implementation.name, function))
                stack.callback(object.__setattr__, implementation, called, function)
        yield calls


def is_ours(function: Any) -> bool:
    return isinstance(function, torch._ops.OpOverload) and function.namespace == "peft_kernels"


class WrittenInPlace(TorchDispatchMode):
    """Names of the operations that are called inside and write into a tensor, and of the package's own."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[str] = []
        self.ours: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.is_mutable:
            self.written.append(str(func))
        if is_ours(func):
            self.ours.append(str(func))
        return func(*args, **(kwargs or {}))


class Recorder:
    """A backend of torch.compile that records the package's operators in a graph, with the arguments they get."""

    def __init__(self) -> None:
        self.calls: list[tuple[torch._ops.OpOverload, tuple[Any, ...]]] = []
        self.compiler = aot_autograd(fw_compiler=self._compile)

    def _compile(self, graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        calls = self.calls

        class Interpreter(torch.fx.Interpreter):
            def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                if is_ours(target):
                    calls.append((target, args))
                return super().call_function(target, args, kwargs)

        return make_boxed_func(Interpreter(graph).run)


@contextlib.contextmanager
def saved(known: Sequence[Tensor | None]) -> Iterator[tuple[dict[int, int], set[int]]]:
    """Bytes by storage of what autograd saves inside beside tensors that exist anyway, and which of those it saves."""
    pointers = {tensor.untyped_storage().data_ptr(): index for index, tensor in enumerate(known) if tensor is not None}
    added: dict[int, int] = {}
    kept: set[int] = set()

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() in pointers:
            kept.add(pointers[storage.data_ptr()])
        else:
            added[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield added, kept
