"""``python -m peft_kernels.qualify``: check the kernels on this machine, and put what is found on record.

With TRITON_INTERPRET=1 the machine is Triton's interpreter on CPU tensors. The exit status is 1 if a kernel
failed, and 3 if none did but some could not be checked. The backend ``auto`` does the same for what a call needs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence

import torch

from peft_kernels._core import child, records, triton_tools, verdicts
from peft_kernels._core.child import NOT_HERE, Limits, Outcome, Wanted
from peft_kernels._core.dispatch import Implementation
from peft_kernels._core.operator import OPERATORS, Operator
from peft_kernels._core.verdicts import RIGHT, Verdict

FAILED, UNKNOWN = 1, 3

# Whoever runs the command sees what it does, and can end it; a kernel that hangs still must not take for ever.
LIMITS = Limits(start_s=180.0, problem_s=300.0, total_s=6 * 3600.0)


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, show or forget; returns the exit status."""
    options = _parser().parse_args(arguments)
    device = _device(options.device)
    if isinstance(device, str):
        print(f"there is nothing to check: {device}", file=sys.stderr)
        return UNKNOWN
    machine = records.signature(device)
    if options.forget:
        verdicts.forget(machine)
        print(f"forgot the verdicts of {machine.gpu}")
        return 0
    chosen = list(_chosen(options, machine, device))
    outcome = Outcome() if options.show else _check(machine, chosen, device)
    _print_table(machine, chosen, outcome, options.show)
    return _status(machine, chosen, outcome)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m peft_kernels.qualify",
        description="Check the kernels on this machine, each in a child process, and put what is found on record. "
        "Without --quick or --full: all that have no verdict yet.",
    )
    parser.add_argument("--family", help="only this family (lora, adapter, ...) or operator (lora_linear, ...)")
    parser.add_argument("--device", type=int, help="index of the CUDA device; the current one if left out")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--quick", action="store_true", help="a few parts of each kernel, also those with a verdict")
    how.add_argument("--full", action="store_true", help="all parts, also those with a verdict")
    parser.add_argument("--show", action="store_true", help="check nothing; show what is on record")
    parser.add_argument("--forget", action="store_true", help="check nothing; drop this machine's verdicts")
    return parser


def _device(index: int | None) -> torch.device | str:
    """The device to check on, or why there is none."""
    if triton_tools.why_not_installed() is None and triton_tools.interpreting():
        return torch.device("cpu")
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        if index is not None and not 0 <= index < count:
            return f"--device must be below {count}, the number of CUDA devices, got {index}"
        return torch.device("cuda", torch.cuda.current_device() if index is None else index)
    return triton_tools.why_not_environment() or "torch sees no CUDA device"


def _chosen(options: argparse.Namespace, machine: records.Signature, device: torch.device) -> Iterator[Wanted]:
    known = verdicts.of(machine)
    for operator, implementation in _implementations(options.family):
        qualification = implementation.qualification
        reason = implementation.why_not_environment()
        if qualification is None or reason is not None:
            if reason is not None:
                print(f"{operator.name}/{implementation.name}: {reason}")
            continue
        parts = qualification.quick if options.quick else qualification.parts
        if device.type == "cpu" and any("bfloat16" in part for part in parts):
            # It multiplies the integers that it holds bfloat16 as, and cuts float32 where a GPU rounds.
            print(f"{operator.name}/{implementation.name}: Triton's interpreter cannot compute in bfloat16: left out")
            parts = tuple(part for part in parts if "bfloat16" not in part)
        for part in parts:
            wanted = verdicts.wanted_of(implementation.name, qualification, part)
            if options.quick or options.full or options.show or wanted.key not in known:
                yield wanted


def _implementations(family: str | None) -> Iterator[tuple[Operator, Implementation]]:
    names = {operator.name: operator.make_problem.__module__.split(".")[1] for operator in OPERATORS.values()}
    if family is not None and family not in (*names, *names.values()):
        raise SystemExit(f"--family must be one of {', '.join(sorted({*names, *names.values()}))}, got {family!r}")
    for name, operator in sorted(OPERATORS.items()):
        if family in (None, name, names[name]):
            yield from ((operator, each) for each in operator.to_check)


def _check(machine: records.Signature, chosen: Sequence[Wanted], device: torch.device) -> Outcome:
    """Check, one process at a time; each verdict is on record as soon as it is known."""
    if not chosen:
        return Outcome()
    folder, reason = records.directory()
    if folder is None:
        print(reason, file=sys.stderr)
        return child.check(chosen, device, LIMITS, _progress)
    with records.locked(verdicts.lock_path(folder, machine), LIMITS.start_s) as refusal:
        if refusal is not None and refusal.is_busy:
            print(refusal.reason, file=sys.stderr)
            return Outcome(unanswered={each.key: refusal.reason for each in chosen})
        return child.check(chosen, device, LIMITS, _progress, lambda key, entry: verdicts.store(machine, {key: entry}))


def _print_table(machine: records.Signature, chosen: Sequence[Wanted], outcome: Outcome, only_known: bool) -> None:
    known = _known(machine, outcome)
    rows = [("kernel", "verdict", "problems", "error", "seconds")]
    for each in chosen:
        verdict = known.get(each.key)
        if verdict is not None:
            numbers = str(verdict.problems), f"{verdict.error:.2f}", f"{verdict.seconds:.1f}"
            rows.append((each.key, verdict.kind, *numbers))
        elif not only_known:
            reason = outcome.unanswered.get(each.key, "")
            rows.append((each.key, NOT_HERE if reason.startswith(NOT_HERE) else "no verdict", "", "", ""))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    for each in chosen:
        verdict = known.get(each.key)
        if verdict is not None and verdict.kind != RIGHT:
            print(f"{each.key} {verdict}")
        elif verdict is None and each.key in outcome.unanswered:
            print(f"{each.key}: {outcome.unanswered[each.key]}")
    record = records.read(machine)
    print(f"errors are in units of the budget; on record for {machine.gpu}: {record.source}")


def _known(machine: records.Signature, outcome: Outcome) -> dict[str, Verdict]:
    return verdicts.of(machine) | {key: Verdict(**entry) for key, entry in outcome.verdicts.items()}


def _status(machine: records.Signature, chosen: Sequence[Wanted], outcome: Outcome) -> int:
    known = _known(machine, outcome)
    if any(known[each.key].kind != RIGHT for each in chosen if each.key in known):
        return FAILED
    return UNKNOWN if any(not reason.startswith(NOT_HERE) for reason in outcome.unanswered.values()) else 0


def _progress(done: int, total: int, name: str) -> None:
    if sys.stderr.isatty():
        verdicts.show_progress(done, total, name)
    else:
        print(f"{done} of {total} checked, at {name}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
