"""``python -m benchmarks [family] [--device D] [--quick] [--out DIR] [--resume] [--budget-s N]``: time and record."""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# The profiler, which weighs memory on a CPU, otherwise reports each of its starts and stops, at a level above that of
# its errors. The variable is read when torch is loaded.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")

import torch

from benchmarks import harness, record, tables
from benchmarks.family import Family, Grid, discover


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmarks.

    Returns:
        The exit status: 75 if a budget ended them, else 1 if a provider failed or gave a wrong result, also in what
        --resume goes by, else 0.
    """
    families = discover()
    options = _parser(families).parse_args(arguments)
    if options.resume and options.out is None:
        raise SystemExit("--resume goes by the records in --out DIR")
    chosen = [families[options.family]] if options.family else list(families.values())
    kind = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)
    if kind == "cpu":
        print("on a CPU: the torch backend against the unfused baselines, on a reduced grid")
        # Records of two machines, and of one that others use, are compared by a core's time.
        torch.set_num_threads(options.threads)
    session = harness.start_session(device, options.quick, options.commit, options.without)
    _print_header(session)

    # In turns, so that a budget cuts each family's last problems.
    by_family = ([(family, problem) for problem in _problems(family, session, options)] for family in chosen)
    jobs = [job for turn in itertools.zip_longest(*by_family) for job in turn if job is not None]
    done = 0
    failed = options.resume and any(_has_failed(family, session, options) for family in chosen)
    for family, problem in harness.within_budget(jobs, options.budget_s):
        records = harness.measure_problem(family, problem, session)
        done += 1
        failed |= any(line["status"] == "failed" for line in records)
        print(f"\n[{done}/{len(jobs)}] {family.name}: {tables.label(records[0]['problem'])}")
        print(tables.terminal_table(records), flush=True)
        if options.out is not None:
            record.append(record.path(options.out, session.device_slug, family.name), records)
    if done < len(jobs):
        print(f"\nbudget spent: {len(jobs) - done} of {len(jobs)} problems left; --resume goes on with them")
        return harness.MORE
    return int(failed)


def _parser(families: dict[str, Family]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Time every provider side by side.")
    parser.add_argument("family", nargs="?", choices=sorted(families), help="one family; all if not given")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="CUDA if not given, and where there is none a CPU")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="threads on a CPU; 1 if not given")
    parser.add_argument("--quick", action="store_true", help="a few problems, fewer repetitions")
    parser.add_argument("--out", type=Path, metavar="DIR", help="append records to DIR/<device>/<family>.jsonl")
    parser.add_argument("--resume", action="store_true", help="leave out what DIR has of these sources and versions")
    parser.add_argument("--budget-s", type=float, metavar="N", help="start no problem that would end after N seconds")
    names = sorted({provider.name for family in families.values() for provider in family.providers})
    parser.add_argument(
        "--without", action="append", default=[], choices=names, help="leave a provider out; repeatable"
    )
    parser.add_argument("--commit", help="what to record as the commit where the tree is no git checkout")
    return parser


def _problems(family: Family, session: harness.Session, options: argparse.Namespace) -> list[Any]:
    problems = family.problems(Grid(session.device.type, options.quick))
    return harness.remaining(problems, _recorded(family, session, options), session) if options.resume else problems


def _recorded(family: Family, session: harness.Session, options: argparse.Namespace) -> list[dict[str, Any]]:
    path = record.path(options.out, session.device_slug, family.name)
    return record.load(path) if path.exists() else []


def _has_failed(family: Family, session: harness.Session, options: argparse.Namespace) -> bool:
    lines = _recorded(family, session, options)
    return any(line["status"] == "failed" and harness.is_of(line, session) for line in lines)


def _print_header(session: harness.Session) -> None:
    device, versions = session.header["device"], session.header["versions"]
    rates = ", ".join(f"{name} {rate / 1e12:.2f}" for name, rate in session.ceilings.matmul_flops_per_s.items())
    print(f"{device['name']}, torch {versions['torch']}, triton {versions['triton']}, peft {versions['peft']}")
    print(f"ceilings: copy {session.ceilings.copy_bytes_per_s / 1e12:.3f} TB/s, products {rates} TFLOP/s", flush=True)


if __name__ == "__main__":
    sys.exit(main())
