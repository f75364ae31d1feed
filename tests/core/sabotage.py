"""Implementations of `lora_linear` that are wrong in one way each, as a GPU can make a kernel: for a child process.

Whoever imports this writes its process into the file that SABOTAGE_STARTS names.
"""

from __future__ import annotations

import ctypes
import dataclasses
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from peft_kernels._core.device import Hardware
from peft_kernels._core.dispatch import Implementation
from peft_kernels._core.qualification import Qualification
from peft_kernels.lora import qualification
from peft_kernels.lora.linear import op, torch_impl
from peft_kernels.lora.qualification import Case

PART = "toy"
FIRST, SECOND = (Case(m, 40, 24, 8, torch.float32, torch.float32) for m in (45, 37))

Forward = tuple[Tensor, Tensor]


def _cases(part: str, hardware: Hardware) -> Sequence[Case]:
    return FIRST, SECOND


def _declare(
    name: str, forward: Callable[..., Any] = torch_impl.forward, backward: Callable[..., Any] = torch_impl.backward
) -> None:
    """Declare ``lora_linear`` once more under a name, with an implementation called "toy" before torch's."""
    toy = Implementation(
        "toy",
        forward,
        backward,
        qualification=Qualification(
            qualification.FAMILY._replace(operator=name), (PART,), lambda problem: (PART,), _cases, quick=(PART,)
        ),
    )
    dataclasses.replace(op.OPERATOR, name=name, implementations=(toy, torch_impl.IMPLEMENTATION))


def _at_second(what: Callable[[], object]) -> Callable[..., Forward]:
    """A forward pass that is right, but does something before it at the second problem."""

    def forward(problem: Any, inputs: Any) -> Forward:
        if problem.m == SECOND.m:
            what()
        return torch_impl.forward(problem, inputs)

    return forward


def _raising(make: Callable[[], Exception]) -> Callable[[], None]:
    def what() -> None:
        raise make()

    return what


def _last_tile(problem: Any, inputs: Any) -> Forward:
    y, s = torch_impl.forward(problem, inputs)
    y[32:, 32:] *= 1.001
    return y, s


def _unwritten_row(problem: Any, inputs: Any) -> Forward:
    right, s = torch_impl.forward(problem, inputs)
    y = torch.empty_like(right)
    y[:-1] = right[:-1]
    return y, s


def _wrong_s(problem: Any, inputs: Any) -> Forward:
    y, s = torch_impl.forward(problem, inputs)
    return y, s * 1.001


def _writes_input(problem: Any, inputs: Any) -> Forward:
    result = torch_impl.forward(problem, inputs)
    inputs.x[0, 0] += 1
    return result


def _unsteady(problem: Any, inputs: Any) -> Forward:
    y, s = torch_impl.forward(problem, inputs)
    y[0, 0] = torch.nextafter(y[0, 0], torch.tensor(float(next(_turns))))
    return y, s


_turns = iter([-1e9, 1e9] * 100)


def _wrong_da(*arguments: Any) -> Any:
    gradients = torch_impl.backward(*arguments)
    return gradients._replace(lora_a=gradients.lora_a * 1.001)


def _no_db(*arguments: Any) -> Any:
    return torch_impl.backward(*arguments)._replace(lora_b=None)


def _talks() -> None:
    print('{"event": "verdict", "key": "nonsense", "verdict": {}}')
    print("x" * 200_000, file=sys.stderr)


def _compile_error() -> Exception:
    try:
        from triton.compiler.errors import CompilationError
    except ImportError:
        return RuntimeError("PassManager::run failed")
    import ast

    return CompilationError("x = tl.dot(a, b)", ast.parse("x = 1").body[0], "no such thing")


_declare("sabotaged_right")
_declare("sabotaged_talking", _at_second(_talks))
_declare("sabotaged_last_tile", _last_tile)
_declare("sabotaged_unwritten_row", _unwritten_row)
_declare("sabotaged_s", _wrong_s)
_declare("sabotaged_input", _writes_input)
_declare("sabotaged_unsteady", _unsteady)
_declare("sabotaged_da", backward=_wrong_da)
_declare("sabotaged_db", backward=_no_db)
_declare("sabotaged_compile", _at_second(_raising(_compile_error)))
_declare("sabotaged_passes", _at_second(_raising(lambda: RuntimeError("PassManager::run failed"))))
_declare("sabotaged_memory", _at_second(_raising(lambda: torch.OutOfMemoryError("CUDA out of memory"))))
_declare("sabotaged_raise", _at_second(_raising(lambda: LookupError("no tile"))))
_declare("sabotaged_device", _at_second(_raising(lambda: RuntimeError("CUDA error: an illegal memory access"))))
_declare("sabotaged_abort", _at_second(os.abort))
_declare("sabotaged_segfault", _at_second(lambda: ctypes.string_at(0)))
_declare("sabotaged_exit", _at_second(lambda: os._exit(7)))
_declare("sabotaged_killed", _at_second(lambda: os.kill(os.getpid(), signal.SIGKILL)))
# Waits with the interpreter's lock and without it, as a launch and a synchronisation do.
_declare("sabotaged_hang", _at_second(lambda: ctypes.PyDLL(None).pause()))
_declare("sabotaged_wait", _at_second(threading.Event().wait))
_declare("sabotaged_slow", _at_second(lambda: time.sleep(0.05)))

if "SABOTAGE_STARTS" in os.environ:
    with open(os.environ["SABOTAGE_STARTS"], "a") as file:
        file.write(f"{os.getpid()}\n")
