"""``python -m benchmarks.tune FAMILY FUNCTION``: search the values near the one that a function of config.py returns.

Two steps, because a GPU's time is dear. ``--prune ARCH`` needs no GPU: it compiles every candidate for every problem of
the family's quick grid ahead of time and writes down, in ``--out``, which of them neither spill nor ask for more shared
memory than there is. Without it the candidates that the file leaves are checked against the oracle and timed side by
side on this machine's GPU. Both append lines of JSON; nothing is changed: a branch in config.py gets its measurement by
hand.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from benchmarks import aot, candidates, harness, record, tables, timing
from benchmarks.candidates import Candidate
from benchmarks.family import Family, Grid, Provider, discover
from peft_kernels._core import triton_tools
from peft_kernels._core.device import hardware
from peft_kernels._core.operator import OPERATORS

PROVIDER = "ours_triton"
FOLDER = "tuning"


def main(arguments: Sequence[str] | None = None) -> int:
    """Prune or time; the exit status is 1 if the value in force itself fails."""
    families = discover()
    options = _parser(sorted(families)).parse_args(arguments)
    family = families[options.family]
    config = config_of(family)
    choices = candidates.tunables(config)
    if options.function not in choices:
        raise SystemExit(f"{config.__name__} has no function {options.function!r} to tune; it has {', '.join(choices)}")
    tuner = Tuner(family, options.function, config, options.out)
    deadline = time.monotonic() + options.budget_s
    if options.prune is not None:
        return tuner.prune(options.prune, options.changes, deadline)
    if not torch.cuda.is_available():
        raise SystemExit("timing needs a GPU; --prune ARCH does not")
    return tuner.measure(options.changes, deadline)


def config_of(family: Family) -> ModuleType:
    """The config.py of the kernels that an operator runs, which stand in the folder of its function's family."""
    _, folder, *_ = OPERATORS[family.name].make_problem.__module__.split(".")
    return importlib.import_module(f"peft_kernels.{folder}.kernels.config")


def _parser(families: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__.splitlines()[0])
    parser.add_argument("family", choices=families)
    parser.add_argument("function", help="of the family's config.py, such as rank_product_config or reads_dy_once")
    parser.add_argument("--prune", type=int, choices=sorted(aot.HARDWARE), metavar="ARCH", help="compile only")
    parser.add_argument("--changes", type=int, default=2, help="fields in which a candidate may differ (default 2)")
    parser.add_argument("--out", type=Path, default=record.RESULTS, help="folder of the records")
    parser.add_argument("--budget-s", type=float, default=540.0, metavar="N", help="start no problem after N seconds")
    return parser


@dataclasses.dataclass(frozen=True)
class Tuner:
    """One function of one family's config.py."""

    family: Family
    function: str
    config: Any
    out: Path

    def prune(self, arch: int, changes: int, deadline: float) -> int:
        """Compile every candidate for every problem that is not in the file yet."""
        if triton_tools.interpreting():
            raise SystemExit("unset TRITON_INTERPRET: the interpreter compiles nothing")
        aot.target(arch)
        path = self._pruned(arch)
        done = {_key(line["problem"]) for line in _load(path)}
        failed = False
        for problem in self._problems():
            if _key(dataclasses.asdict(problem)) in done or time.monotonic() > deadline:
                continue
            with _without_a_gpu():
                call = self._call(problem, _meta(self.family.make_inputs(problem, torch.device("cpu"), 0)))
                lines = list(self._compiled(problem, call, changes, arch))
            record.append_lines(path, lines)
            left = sum(not line["reasons"] for line in lines)
            print(f"{tables.label(dataclasses.asdict(problem))}: {left} of {len(lines)} candidates left", flush=True)
            failed |= bool(lines) and bool(lines[0]["reasons"])
        return int(failed)

    def measure(self, changes: int, deadline: float) -> int:
        """Check and time the candidates of each problem side by side."""
        device = torch.device("cuda", torch.cuda.current_device())
        session = harness.start_session(device, quick=True, commit=None)
        pruned = _load(self._pruned(hardware(device).arch))
        if not pruned:
            print("no compiles on record for this architecture: every candidate is tried, where --prune saves most")
        left = {(_key(line["problem"]), line["candidate"]) for line in pruned if not line["reasons"]}
        path = self.out / session.device_slug / FOLDER / f"{self.family.name}-{self.function}.jsonl"
        failed = False
        for problem in self._problems():
            if time.monotonic() > deadline:
                break
            wanted = [
                candidate
                for candidate in candidates.candidates(getattr(self.config, self.function), changes)
                if not candidate or not left or (_key(dataclasses.asdict(problem)), candidates.label(candidate)) in left
            ]
            lines = self._timed(problem, wanted, session)
            record.append_lines(path, lines)
            print(_table(dataclasses.asdict(problem), lines), flush=True)
            failed |= bool(lines) and lines[0]["status"] != "ok"
        return int(failed)

    def _problems(self) -> list[Any]:
        return self.family.problems(Grid("cuda", quick=True))

    def _pruned(self, arch: int) -> Path:
        return self.out / f"sm_{arch}" / FOLDER / f"{self.family.name}-{self.function}.jsonl"

    def _call(self, problem: Any, inputs: Any) -> Callable[[], object]:
        """A step of training, or a forward pass where the family has nothing else for this problem."""
        mode = "both" if "both" in self.family.modes(problem) else "forward"
        return harness.closures(self._provider().make(problem, inputs), mode)

    def _provider(self) -> Provider:
        return next(provider for provider in self.family.providers if provider.name == PROVIDER)

    def _compiled(self, problem: Any, call: Callable[[], object], changes: int, arch: int) -> Iterator[dict[str, Any]]:
        """A line for each candidate; none where the problem never asks the function."""
        inspected: dict[str, dict[str, Any]] = {}
        for candidate in candidates.candidates(getattr(self.config, self.function), changes):
            rows, reasons = [], []
            with candidates.in_force(self.config, self.function, candidate) as seen:
                try:
                    for kernel in aot.record_compiles(call):
                        if kernel.hash not in inspected:
                            inspected[kernel.hash] = {"kernel": kernel.metadata.name, **aot.inspect(kernel)}
                        rows.append(inspected[kernel.hash])
                except Exception as error:  # whatever the compiler raises is the reason against this candidate
                    reasons.append(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
            if not seen and not reasons:
                return
            if candidate and all(own == new for own, new in seen) and not reasons:
                continue
            reasons += [f"{row['kernel']}: {text}" for row in rows for text in aot.complaints(row, arch)]
            yield {
                "problem": dataclasses.asdict(problem),
                "candidate": candidates.label(candidate),
                "configs": [str(new) for new in dict.fromkeys(new for _, new in seen)],
                "registers": max((row["registers"] for row in rows), default=None),
                "shared": max((row["shared"] for row in rows), default=None),
                "reasons": list(dict.fromkeys(reasons)),
            }

    def _timed(self, problem: Any, wanted: Sequence[Candidate], session: harness.Session) -> list[dict[str, Any]]:
        """Records of the candidates, the value in force first; none where the problem never asks the function."""
        sets = timing.set_count(self.family.input_bytes(problem), session.cache_bytes, session.memory_bytes)
        inputs = [self.family.make_inputs(problem, session.device, seed) for seed in range(sets)]
        check = self.family.checker(problem, inputs[0])
        statuses, calls = {}, {}
        for candidate in wanted:
            name = candidates.label(candidate)
            with candidates.in_force(self.config, self.function, candidate) as seen:
                try:
                    check(self._provider())
                    statuses[name] = "ok"
                except Exception as error:  # a candidate may be wrong or not run at all; the record says so
                    statuses[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            if not seen and statuses[name] == "ok":
                return []
            if statuses[name] == "ok":
                calls[name] = [self._inside(candidate, self._call(problem, one)) for one in inputs]
        with harness.timing_stream(session.device):
            times = timing.time_on_cuda(calls, harness.TARGET_US["cuda"] * harness.QUICK_SHARE, least=8)
        common = {**session.header, "family": self.family.name, "function": self.function}
        return [
            {
                **common,
                "problem": dataclasses.asdict(problem),
                "candidate": name,
                "status": status,
                **(dataclasses.asdict(times[name]) if name in times else {}),
            }
            for name, status in statuses.items()
        ]

    def _inside(self, candidate: Candidate, call: Callable[[], object]) -> Callable[[], object]:
        def run() -> object:
            with candidates.in_force(self.config, self.function, candidate):
                return call()

        return run


@contextlib.contextmanager
def _without_a_gpu() -> Iterator[None]:
    """Let the Triton backend take meta tensors, which it then compiles for; autocast does not know their device."""
    with (
        mock.patch.object(triton_tools, "why_not_device", lambda device: None),
        mock.patch.object(torch, "is_autocast_enabled", lambda device_type: False),
        mock.patch.object(torch, "autocast", lambda device_type, enabled: contextlib.nullcontext()),
    ):
        yield


def _meta(inputs: Any) -> Any:
    """The same shapes, strides and demands for gradients, without storage; a tensor that stands twice stays one."""
    moved: dict[int, Tensor] = {}

    def move(tensor: Tensor) -> Tensor:
        if id(tensor) not in moved:
            moved[id(tensor)] = tensor.detach().to("meta").requires_grad_(tensor.requires_grad)
        return moved[id(tensor)]

    return tree_map_only(Tensor, move, inputs)


def _key(problem: Any) -> str:
    return json.dumps(problem, sort_keys=True)


def _load(path: Path) -> list[dict[str, Any]]:
    return [line for _, line in record.read_lines(path)] if path.exists() else []


def _table(problem: dict[str, Any], lines: Sequence[dict[str, Any]]) -> str:
    """The fastest first, each with its time over that of the value in force."""
    timed = sorted((line for line in lines if line["status"] == "ok"), key=lambda line: line["median_us"])
    own = next((line["median_us"] for line in timed if line["candidate"] == candidates.label(())), None)
    rows = [
        [line["candidate"], f"{line['median_us']:.1f}", "-" if own is None else f"{line['median_us'] / own:.3f}"]
        for line in timed
    ]
    failed = [f"  {line['candidate']}: {line['status']}" for line in lines if line["status"] != "ok"]
    table = tables.aligned(["candidate", "median us", "of as is"], rows)
    return "\n".join([f"\n{tables.label(problem)}", table, *failed])


if __name__ == "__main__":
    sys.exit(main())
