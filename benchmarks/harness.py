"""One problem after another: check every provider, time them in turns, weigh them, record."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

import torch
import torch._functorch.config

from benchmarks import environment, record
from benchmarks.family import Call, Family, Mode, Provider
from benchmarks.memory import peak_bytes
from benchmarks.roofline import Ceilings, measure_ceilings, roofline_us
from benchmarks.timing import Timing, set_count, time_on_cuda, time_on_host

# Microseconds that one provider's measurement in one mode should last, and repetitions that it must have.
TARGET_US = {"cuda": 150_000.0, "cpu": 500_000.0}
LEAST_REPETITIONS = {"cuda": 20, "cpu": 15}
QUICK_SHARE = 0.4

# A product of torch's own has about this error in bfloat16 by a factor of four; anything above is another function.
_UNACCEPTABLE_ERROR = 0.02
_LEFT_OUT = "left out with --without"
# What two records share that speak of the same code and libraries.
_SAME = ("commit", "dirty", "sources", "versions")

MORE = 75
"""Exit status of a run that a budget ended."""


@dataclass(frozen=True)
class Session:
    """What all records of a run share, and the names of the providers that it leaves out."""

    device: torch.device
    quick: bool
    ceilings: Ceilings
    header: Mapping[str, Any]
    without: frozenset[str] = frozenset()

    @property
    def device_slug(self) -> str:
        return environment.slug(self.header["device"]["name"])

    @property
    def cache_bytes(self) -> int:
        return int(self.header["device"]["cache_bytes"])

    @property
    def memory_bytes(self) -> int:
        return int(self.header["device"]["memory_bytes"])


@dataclass(frozen=True)
class Verdict:
    """What the check of one provider found: the errors of its tensors, or why it is not timed."""

    status: str
    reason: str | None
    errors: Mapping[str, float | None]


def start_session(device: torch.device, quick: bool, commit: str | None, without: Collection[str] = ()) -> Session:
    """Measure the ceilings and describe where the run takes place.

    Args:
        commit: recorded where the tree is no git checkout and cannot tell.
        without: providers to leave out.
    """
    ceilings = measure_ceilings(device, (torch.bfloat16, torch.float32))
    head, dirty = environment.commit()
    header = {
        "schema": record.SCHEMA,
        "run": _now(),
        "commit": head or commit,
        "dirty": dirty,
        "sources": environment.sources(),
        "device": environment.describe_device(device),
        "versions": environment.versions(),
        "ceilings": dataclasses.asdict(ceilings),
    }
    return Session(device, quick, ceilings, header, frozenset(without))


def measure_problem(family: Family, problem: Any, session: Session) -> list[dict[str, Any]]:
    """Return one record for each provider and mode.

    A provider that cannot run the problem is recorded as skipped, one that raises something else or gives a wrong
    result as failed; neither keeps the others from being timed.
    """
    sets = set_count(family.input_bytes(problem), session.cache_bytes, session.memory_bytes)
    inputs = [family.make_inputs(problem, session.device, seed) for seed in range(sets)]
    all_modes = family.modes(problem)
    torch._dynamo.reset()
    # A compiled backward pass otherwise frees what one graph that is walked many times needs again. Users do have that
    # memory back, so the memory pass compiles anew without this setting.
    with torch._functorch.config.patch(donated_buffer=False):
        verdicts = _examine_all(family, problem, inputs[0], session)
        runnable = [provider for provider in family.providers if verdicts[provider.name].status == "ok"]
        try:
            timings = {mode: _time(runnable, problem, inputs, mode, session) for mode in all_modes}
        except torch.OutOfMemoryError as error:
            reason = f"does not fit side by side with the others: {_text(error)}"
            verdicts |= {provider.name: Verdict("skipped", reason, {}) for provider in runnable}
            runnable, timings = [], {}
    torch._dynamo.reset()
    peaks = {
        (mode, provider.name): _weigh(provider.make(problem, inputs[0]), mode, session.device)
        for mode in all_modes
        for provider in runnable
    }

    records = []
    for mode in all_modes:
        for provider in family.providers:
            verdict = verdicts[provider.name]
            line = {
                **session.header,
                "family": family.name,
                "date": _now(),
                "problem": dataclasses.asdict(problem),
                "provider": provider.name,
                "role": provider.role,
                "mode": mode,
                "status": verdict.status,
                "reason": verdict.reason,
            }
            if verdict.status == "ok":
                line |= _measured(family, problem, provider, mode, timings[mode][provider.name], session.ceilings)
                line |= {"peak_memory_bytes": peaks[mode, provider.name], "error": dict(verdict.errors)}
            records.append(line)
    return records


def remaining(problems: Sequence[Any], recorded: Sequence[Mapping[str, Any]], session: Session) -> list[Any]:
    """The problems that no run has recorded of this commit, these sources and versions; those of a run that left out a
    provider are among them, if this session does not leave it out too."""
    done, short = set(), set()
    for line in recorded:
        if is_of(line, session):
            run = line["run"], record.key(line)
            done.add(run)
            if line["reason"] == _LEFT_OUT and line["provider"] not in session.without:
                short.add(run)
    whole = {key for _, key in done - short}
    return [problem for problem in problems if record.key({"problem": dataclasses.asdict(problem)}) not in whole]


def is_of(line: Mapping[str, Any], session: Session) -> bool:
    """Whether a record is of the code and the libraries of this session."""
    return all(line.get(name) == session.header.get(name) for name in _SAME)


def within_budget(
    problems: Sequence[Any], budget_s: float | None, now: Callable[[], float] = time.monotonic
) -> Iterator[Any]:
    """Yield problems until the next one, if it took as long as the longest so far, would end after the budget."""
    began = now()
    longest = 0.0
    for problem in problems:
        started = now()
        if budget_s is not None and started - began + longest > budget_s:
            return
        yield problem
        longest = max(longest, now() - started)


def closures(call: Call, mode: Mode) -> Callable[[], object]:
    """What is timed. Nothing is accumulated into ``.grad``: an addition into it would be the same for everybody.

    forward: inference, without a graph.  both: forward with a graph, then backward.  backward: alone, through one graph
    that is made here and kept.
    """
    if mode == "forward":
        return functools.partial(_forward, call)
    if mode == "both":
        return functools.partial(_both, call)
    y = call.apply()
    return functools.partial(torch.autograd.grad, y, call.wrt, call.dy, retain_graph=True)


def _forward(call: Call) -> torch.Tensor:
    with torch.no_grad():
        return call.apply()


def _both(call: Call) -> tuple[torch.Tensor, ...]:
    y = call.apply()
    return (y, *torch.autograd.grad(y, call.wrt, call.dy)) if call.wrt else (y,)


def _examine_all(family: Family, problem: Any, inputs: Any, session: Session) -> dict[str, Verdict]:
    check = family.checker(problem, inputs)
    return {
        provider.name: Verdict("skipped", _LEFT_OUT, {})
        if provider.name in session.without
        else _examine(provider, problem, inputs, session.device, check)
        for provider in family.providers
    }


def _examine(
    provider: Provider,
    problem: Any,
    inputs: Any,
    device: torch.device,
    check: Callable[[Provider], Mapping[str, float | None]],
) -> Verdict:
    reason = provider.why_not(problem, device)
    if reason is not None:
        return Verdict("skipped", reason, {})
    try:
        _both(provider.make(problem, inputs))
        errors = check(provider)
    except provider.refusals as error:
        return Verdict("skipped", _text(error), {})
    except torch.OutOfMemoryError as error:
        return Verdict("skipped", _text(error), {})
    except Exception as error:  # one broken provider must not cost the others' measurements; the run's status tells
        return Verdict("failed", _text(error), {})
    if not all(error is None or error < _UNACCEPTABLE_ERROR for error in errors.values()):
        return Verdict("failed", f"wrong result: relative errors {dict(errors)}", {})
    return Verdict("ok", None, errors)


def _time(
    providers: Sequence[Provider], problem: Any, inputs: Sequence[Any], mode: Mode, session: Session
) -> dict[str, Timing]:
    kind = session.device.type
    target = TARGET_US[kind] * (QUICK_SHARE if session.quick else 1.0)
    least = max(3, int(LEAST_REPETITIONS[kind] * (QUICK_SHARE if session.quick else 1.0)))
    measure = time_on_cuda if kind == "cuda" else time_on_host
    with timing_stream(session.device):
        calls = {
            provider.name: [closures(provider.make(problem, one), mode) for one in inputs] for provider in providers
        }
        return measure(calls, target, least)


@contextmanager
def timing_stream(device: torch.device) -> Iterator[None]:
    """A stream of its own on a GPU, because the default one cannot be captured; on a CPU nothing."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.synchronize(device)
    with torch.cuda.stream(torch.cuda.Stream(device)):
        yield
        torch.cuda.synchronize(device)


def _weigh(call: Call, mode: Mode, device: torch.device) -> int:
    if mode != "backward":
        run = closures(call, mode)
        run()
        return peak_bytes(run, device)
    _both(call)
    outputs: list[torch.Tensor] = []

    def backward() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(outputs[0], call.wrt, call.dy)

    return peak_bytes(backward, device, before=lambda: outputs.append(call.apply()))


def _measured(
    family: Family, problem: Any, provider: Provider, mode: Mode, timing: Timing, ceilings: Ceilings
) -> dict[str, Any]:
    work = family.work(problem, mode, provider)
    least_us = roofline_us(work, family.dtype(problem), ceilings)
    fields = dataclasses.asdict(timing)
    note = fields.pop("note")
    return {
        **fields,
        "timing_note": note,
        "bytes": work.bytes,
        "flops": work.flops,
        "roofline_us": least_us,
        "roofline_fraction": least_us / timing.median_us,
    }


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
