"""What a machine with a GPU is asked to do, in the order in which the answers are worth most."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.on_gpu.runner import Part

ROOT = Path(__file__).parents[2]
PYTHON = sys.executable
# Problems of at most this many tokens are the decode kernel's; what a test's name begins with tells.
_DECODE = " or ".join(f"[{m}x" for m in range(1, 17))
# compute-sanitizer's status where the kernels are at fault, and its words where it cannot watch this device.
_AT_FAULT = 9
_NO_DEVICE = "Device not supported"
SANITIZED = ("tests/soak/test_sanitized.py", "tests/soak/test_soak.py", "-k", "sanitized or a_few_launches")
# How pytest's last line begins where every test was skipped.
_ALL_SKIPPED = r"\d+ skipped"
# Cheap to compile before dear.
FAMILIES = ("prompt", "lora", "adapter", "prefix")
HOURS = 3600.0


def first(out: Path, device: str) -> list[Part]:
    """Ten minutes on a machine that has never run this: does it build, is it right, is it fast; then all the rest.

    Args:
        out: folder of all records.
        device: the name of its folder in there.
    """
    return [
        Part("machine", (PYTHON, "-m", "tests.on_gpu", "machine"), 60, absent=(3,)),
        Part("build", (PYTHON, "-m", "tests.on_gpu", "build"), 300, 60, (3,), environment=_one_architecture()),
        Part("info", (PYTHON, "-m", "peft_kernels.info"), 60),
        *_cuda_kernels(out),
        _qualify(150),
        Part(
            "sample", (PYTHON, "-m", "benchmarks.sample", "--out", str(out)), 150, 40, (3,),
            shows=out / device / "sample" / "sample.md",
        ),
        *sanitizer(120),
        # Whatever bears a family's name: its folder, and what the contract asks of its operators.
        *(_tests(f"triton-{name}", out, f"tests/{name}", "tests/contract", "-k", name) for name in FAMILIES),
        _tests("tests", out, "tests"),
    ]  # fmt: skip


def everything(out: Path, device: str) -> list[Part]:
    """All tests and all benchmarks, however long they take."""
    return [
        Part("build", (PYTHON, "-m", "tests.on_gpu", "build"), 0.5 * HOURS, absent=(3,)),
        _qualify(6 * HOURS),
        _tests("tests", out, "tests", timeout_s=12 * HOURS),
        *benchmarks(out, device),
        *sanitizer(2 * HOURS),
    ]


def benchmarks(out: Path, device: str) -> list[Part]:
    """A few problems of each family without what takes long to compile, then all of them, then whole models."""
    families = (PYTHON, "-m", "benchmarks", *_on_record(out))
    models = (PYTHON, "-m", "benchmarks.end_to_end", *_on_record(out))
    without = ("--without", "peft_compiled", "--without", "eager_compiled")
    return [
        Part("bench-quick", (*families, "--quick", *without), 2 * HOURS, 60, goes_on=True),
        Part("bench", families, 12 * HOURS, 60, goes_on=True),
        Part("end-to-end", models, 6 * HOURS, 60, goes_on=True),
        Part("end-to-end-triton", (*models, "--backend", "triton"), 6 * HOURS, 60, goes_on=True),
    ]


def sanitizer(timeout_s: float) -> list[Part]:
    """A few launches of every kernel, under which each takes a hundred times as long.

    initcheck is not asked: flags of kernels whose blocks wait for each other are uninitialized by design.
    """
    program, tests = _program_of_cuda("compute-sanitizer"), (PYTHON, "-m", "pytest", *SANITIZED, "-q")
    return [
        Part(
            tool,
            (program, "--tool", tool, "--error-exitcode", str(_AT_FAULT), *tests, "--timeout", "1800"),
            timeout_s,
            least_s=30,
            absent=(_NO_DEVICE,),
            nothing=_ALL_SKIPPED,
            environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        )
        for tool in ("memcheck", "racecheck")
    ]


def sanitize(out: Path, device: str) -> list[Part]:
    """Nothing else."""
    return sanitizer(2 * HOURS)


def tests(out: Path, device: str) -> list[Part]:
    """All tests."""
    return [_tests("tests", out, "tests", timeout_s=12 * HOURS)]


def _program_of_cuda(name: str) -> str:
    """Where a program of the toolkit is, which need not be on PATH."""
    homes = (os.environ.get("CUDA_HOME"), "/usr/local/cuda")
    folders = [os.path.join(home, "bin") for home in homes if home]
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(folders)) or name


def _one_architecture() -> dict[str, str]:
    """Hopper's, which has most kernels and is what this is for; others are built by whoever names them."""
    return {"PEFT_KERNELS_CUDA_ARCHS": os.environ.get("PEFT_KERNELS_CUDA_ARCHS", "90a")}


def _cuda_kernels(out: Path) -> Iterator[Part]:
    """CUDA C++ alone, for which Triton compiles nothing: simple kernels before those whose blocks wait for each other,
    and what repeats and replays them last."""
    lora = "tests/lora/test_cuda_on_gpu.py"
    yield _cuda("decode", out, lora, "-k", f"test_error_budget and ({_DECODE})")
    others = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("tests/*/test_cuda_on_gpu.py"))
    yield from (_cuda(path.split("/")[1], out, path) for path in others if path != lora)
    yield _cuda("gemm", out, lora, "-k", f"test_error_budget and not ({_DECODE})")
    yield _cuda("repeated", out, lora)


def _cuda(name: str, out: Path, *selection: str) -> Part:
    """A kernel that hangs shows as a test's time limit, which ends the process."""
    command = (*_slices(out, *selection), "--timeout", "60", "--timeout-method", "thread")
    return Part(f"cuda-{name}", command, 240, 20, nothing=_ALL_SKIPPED, goes_on=True)


def _tests(name: str, out: Path, *selection: str, timeout_s: float = HOURS) -> Part:
    return Part(name, _slices(out, *selection), timeout_s, 30, nothing=_ALL_SKIPPED, goes_on=True)


def _slices(out: Path, *selection: str) -> tuple[str, ...]:
    return (
        PYTHON, "-m", "tests.slices", *selection, "-m", "not cpu_only", "--slices", str(out), "--budget-s", "{seconds}",
        "--continue-on-collection-errors", "-q", "-r", "fE", "--tb", "short",
    )  # fmt: skip


def _qualify(timeout_s: float) -> Part:
    """Each verdict is on record as soon as it is known, so that a limit costs one."""
    return Part("qualify", (PYTHON, "-m", "peft_kernels.qualify"), timeout_s, 30, (3,), goes_on=True)


def _on_record(out: Path) -> tuple[str, ...]:
    return ("--out", str(out), "--resume", "--budget-s", "{seconds}")


def slug(name: str) -> str:
    """As environment.slug, which takes torch to import."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


TABLES = {"first": first, "all": everything, "tests": tests, "bench": benchmarks, "sanitize": sanitize}
