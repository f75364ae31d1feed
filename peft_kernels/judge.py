"""Run a kernel's problems and judge its results; and the half of _core/child.py that does so in a child process."""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import json
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils.deterministic
from torch import Tensor

from peft_kernels import testing
from peft_kernels._core.child import NOT_HERE, Wanted
from peft_kernels._core.device import hardware
from peft_kernels._core.dispatch import Implementation
from peft_kernels._core.errors import UnsupportedError
from peft_kernels._core.operator import OPERATORS, Operator
from peft_kernels._core.qualification import Family
from peft_kernels._core.verdicts import CRASHED, RIGHT, UNCOMPILED, WRONG, Verdict, as_entry

# Results of few values scatter more than the budget allows: draws join until the smallest has about as many.
_ENOUGH_VALUES = 256
_MOST_DRAWS = 8

Results = dict[str, Tensor]


class Stopped(Exception):
    """A problem was not right, or could not be run; ``kind`` is None where that is no verdict."""

    def __init__(self, kind: str | None, reason: str) -> None:
        super().__init__(reason)
        self.kind, self.reason = kind, reason


def check_case(operator: Operator, implementation: Implementation, case: Any, device: torch.device) -> float:
    """Run one problem, forward and backward and twice, and hold it against the budget.

    Returns:
        The largest error of a result in units of the budget.

    Raises:
        AssertionError: a result is wrong, or differs between two runs.
        Stopped: it cannot be judged here.
    """
    qualification = implementation.qualification
    if qualification is None:
        raise Stopped(None, "it has no problems to be checked by")
    draws, count, seed = [], 1, 0
    while seed < count:
        call, dy = qualification.family.make(case, device, seed)
        reason = implementation.why_not(operator.make_problem(call))
        if reason is not None:
            raise Stopped(None, f"{NOT_HERE}: {reason}")
        ours = _twice(operator, implementation, call, dy)
        with _no_fault_of_the_kernel():
            draws.append((ours, *_expected(operator, qualification.family, call, dy, ours)))
        smallest = min((value.numel() for value in ours.values() if value.numel()), default=_ENOUGH_VALUES)
        count = min(_MOST_DRAWS, -(-_ENOUGH_VALUES // smallest))
        seed += 1
    return max(_compare(name, draws) for name in draws[0][1])


def _twice(operator: Operator, implementation: Implementation, call: Any, dy: Any) -> Results:
    """Results of a run, which a second one has to give again, bit for bit, and which leaves its inputs alone."""
    given = [x for x in operator.signature.spread((*call, dy)) if isinstance(x, Tensor)]
    before = [x.clone() for x in given]
    with _poisoned():
        first, second = (_run(operator, implementation, call, dy) for _ in range(2))
    if call[0].device.type == "cuda":
        torch.cuda.synchronize(call[0].device)
    for old, new in zip(before, given, strict=True):
        testing.assert_bitwise_equal("an input after the call", new, old)
    for name, value in first.items():
        testing.assert_bitwise_equal(f"{name} of two runs", second[name], value)
    return first


def _run(operator: Operator, implementation: Implementation, call: Any, dy: Any) -> Results:
    """y, or all of several, what a backward pass is given, and all gradients; by the operator's own two functions."""
    problem, needs = operator.make_problem(call), operator.needs(*_there(operator, call))
    with torch.no_grad():
        results = operator.fresh(problem, call, implementation)
        kept = operator.keeps(results, operator.reads(needs))
        gradients = operator.differentiate(problem, call, kept, dy, needs, implementation)
    named = {"y": operator.visible(results)}
    named |= {name: value for name, value in zip(operator.kept, kept, strict=True) if name != "y"}
    named |= {f"d{name}": value for name, value in zip(needs._fields, gradients, strict=True)}
    return _each(named)


def _each(named: Mapping[str, Any]) -> Results:
    """The tensors that there are by name; of a tuple each by its number."""
    found: Results = {}
    for name, value in named.items():
        leaves = {f"{name}[{i}]": each for i, each in enumerate(value)} if isinstance(value, tuple) else {name: value}
        found |= {label: leaf for label, leaf in leaves.items() if leaf is not None}
    return found


def _there(operator: Operator, call: Any) -> Iterator[Any]:
    for value in (getattr(call, name) for name in operator.needs._fields):
        yield tuple(each is not None for each in value) if isinstance(value, tuple) else value is not None


def _expected(operator: Operator, family: Family, call: Any, dy: Any, ours: Results) -> tuple[Results, Results]:
    """By eager torch in the call's dtypes, and by the torch backend in float64."""
    differentiable = {name: _leaves(getattr(call, name)) for name in operator.needs._fields}
    y = family.eager(call._replace(**differentiable))
    wanted = _each({f"d{name}": value for name, value in differentiable.items()})
    gradients: Sequence[Tensor] = ()
    # At y it is dy. Handing dy over would make torch import its compiler, which takes longer than the problems.
    if wanted:
        pairs = zip(y, dy, strict=True) if operator.several else [(y, dy)]
        loss = torch.stack([(each.double() * incoming.double()).sum() for each, incoming in pairs]).sum()
        gradients = torch.autograd.grad(loss, list(wanted.values()))
    reference = operator.implementations[-1]
    oracle = _run(operator, reference, family.exact(call), _map(Tensor.double, dy))
    # What is kept has no eager form; the torch backend keeps the same in these dtypes, or something else altogether.
    kept = {
        name: value
        for name, value in _run(operator, reference, call, dy).items()
        if name in operator.kept and name in ours and value.shape == ours[name].shape
    }
    for name, value in kept.items():
        # Where the torch backend has zeros may be elements that nobody writes, nor reads: else gradients would be nan.
        unwritten = ours[name].isnan() & (value == 0) & (oracle[name] == 0)
        kept[name], oracle[name] = (torch.where(unwritten, torch.nan, each) for each in (value, oracle[name]))
    found = _each({"y": _map(Tensor.detach, y)})
    return {**found, **kept, **dict(zip(wanted, gradients, strict=True))}, oracle


def _leaves(value: Any) -> Any:
    return _map(lambda x: x.detach().requires_grad_(), value)


def _map(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """A tensor, None or a tuple of such."""
    if isinstance(value, tuple):
        return tuple(None if each is None else function(each) for each in value)
    return None if value is None else function(value)


def _compare(name: str, draws: Sequence[tuple[Results, ...]]) -> float:
    if name not in draws[0][0]:
        raise AssertionError(f"{name} was not returned")
    ours, eager, oracle = (torch.stack([results[name] for results in column]) for column in zip(*draws, strict=True))
    return testing.assert_close(name, ours, eager, oracle).of_budget


@contextmanager
def _no_fault_of_the_kernel() -> Iterator[None]:
    """What torch's own code raises says nothing of a kernel, if the device is still alive."""
    try:
        yield
    except RuntimeError as error:
        if _is_device_lost(error):
            raise
        raise Stopped(None, f"torch could not say what is right ({_text(error)})") from error


@contextmanager
def _poisoned() -> Iterator[None]:
    """Fill every new allocation with nan or the largest integer, so that what nobody writes shows."""
    was_on = torch.are_deterministic_algorithms_enabled()
    only_warned = torch.is_deterministic_algorithms_warn_only_enabled()
    settings: Any = torch.utils.deterministic
    filled = settings.fill_uninitialized_memory
    # torch's public function for it imports the compiler, which takes longer than the problems.
    torch._C._set_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch._C._set_deterministic_algorithms(was_on, warn_only=only_warned)
        settings.fill_uninitialized_memory = filled


def check_part(
    operator: Operator, implementation: Implementation, part: str, device: torch.device
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Run a part's problems.

    Yields:
        An event's name and what it says: "begin" and "end" for each problem, and at last "verdict", or "none" and why.
    """
    qualification, done, error, start = implementation.qualification, 0, 0.0, time.monotonic()
    assert qualification is not None
    for case in qualification.cases(part, hardware(device)):
        yield "begin", {"problem": str(case), "done": done, "error": error}
        try:
            with _precision(part):
                error = max(error, check_case(operator, implementation, case, device))
        except Exception as caught:
            stopped = _stopped(caught)
            seconds = time.monotonic() - start
            if stopped.kind is None:
                yield "none", {"reason": f"{stopped.reason} (at {case})"}
            else:
                verdict = Verdict(stopped.kind, done, error, seconds, str(case), stopped.reason)
                yield "verdict", {"verdict": as_entry(verdict)}
            if _is_device_lost(caught):
                raise
            return
        done += 1
        yield "end", {}
    yield "verdict", {"verdict": as_entry(Verdict(RIGHT, done, error, time.monotonic() - start))}


@contextmanager
def _precision(part: str) -> Iterator[None]:
    """What float32 products may be in a part of that name."""
    settings = torch.backends.cuda.matmul
    before = settings.allow_tf32
    settings.allow_tf32 = "tf32" in part
    try:
        yield
    finally:
        settings.allow_tf32 = before


def _stopped(error: Exception) -> Stopped:
    """What an exception says of the kernel."""
    text = _text(error)
    if isinstance(error, Stopped):
        return error
    if isinstance(error, AssertionError):
        return Stopped(WRONG, str(error))
    if isinstance(error, (torch.OutOfMemoryError, MemoryError, OSError, ImportError, UnsupportedError)):
        return Stopped(None, text)
    if "out of memory" in text or "busy or unavailable" in text:
        return Stopped(None, text)
    names = {cls.__name__ for cls in type(error).__mro__ if cls.__module__.split(".")[0] == "triton"}
    if (names and not names & {"InterpreterError", "AutotunerError"}) or "PassManager::run failed" in text:
        return Stopped(UNCOMPILED, text)
    return Stopped(CRASHED, text)


def _is_device_lost(error: BaseException) -> bool:
    """Whether no launch in this process works any more, whoever's it is."""
    return isinstance(error, RuntimeError) and "CUDA" in str(error) and not isinstance(error, torch.OutOfMemoryError)


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:400]


def child() -> None:
    """Answer one request from standard input, and leave when that closes, because then nobody waits."""
    emit = _emitter()
    request = json.loads(sys.stdin.readline())
    threading.Thread(target=_leave_with_the_parent, daemon=True).start()
    _bound(request["seconds"])
    device = torch.device(request["device"])
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        emit("nothing", reason=f"the child could not have the device ({_text(error)})")
        os._exit(0)
    emit("ready")
    for fields in request["wanted"]:
        wanted = Wanted(*fields)
        for event, content in _answers(wanted, device):
            emit(event, key=wanted.key, **content)
    os._exit(0)


def _answers(wanted: Wanted, device: torch.device) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        importlib.import_module(wanted.module)
        operator = OPERATORS[wanted.operator]
        implementation = next(each for each in operator.to_check if each.name == wanted.implementation)
    except (ImportError, LookupError, StopIteration) as error:
        yield "none", {"reason": f"{wanted.module} does not declare it ({_text(error)})"}
        return
    yield from check_part(operator, implementation, wanted.part, device)


def _emitter() -> Callable[..., None]:
    """What writes events for the parent; whatever else is printed joins the errors."""
    stream = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def emit(event: str, **content: Any) -> None:
        stream.write(json.dumps({"event": event, **content}) + "\n")
        stream.flush()

    return emit


def _leave_with_the_parent() -> None:
    while os.read(0, 4096):
        pass
    os._exit(4)


def _bound(seconds: float) -> None:
    """No core is dumped, a trap says where it was, and an alarm ends what holds the interpreter's lock for ever."""
    faulthandler.enable()
    if sys.platform == "win32":
        return
    import resource

    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.alarm(int(seconds) + 1)
