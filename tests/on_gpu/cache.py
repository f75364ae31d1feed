"""``python -m tests.on_gpu.cache make|pack|check``: Triton's cache for a GPU, made where there is none, to be carried.

    make     compile what tests, checks and quick benchmarks would ask for; a second call goes on
    pack     DIR.tar.xz of it
    check    ask for all of it again, and say how much was there

Keys of the cache depend on neither the path nor the host, but on the sources, the version of Triton and that of Python.
What lies under a key is found by absolute paths, in files named ``__grp__``: `bring` writes them for where the cache
lies. Only what a launch needs is kept: cubins, metadata, launchers.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.on_gpu.runner import MORE

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "build" / "triton-cache"
# What records of finished tests lie in; no part of the pack.
PROGRESS = "progress"
_MARK = "brought.json"
_GROUP = "__grp__"
# Others' intermediate results, which nobody reads at a launch.
_LEFT_OUT = (".source", ".ttir", ".ttgir", ".llir", ".ptx")
TESTS = tuple(f"tests/{name}" for name in ("prompt", "lora", "adapter", "prefix", "contract", "core"))
SOURCES = ("checks", "quick", "soak")


def bring(folder: Path) -> bool:
    """Make a cache ready where it lies, and what a pack beside it adds; returns whether there is one."""
    pack, mark = packed(folder), folder / _MARK
    brought = hashlib.sha256(pack.read_bytes()).hexdigest() if pack.exists() else None
    known = json.loads(mark.read_text()) if mark.exists() else {}
    if brought not in (None, known.get("pack")):
        with tarfile.open(pack) as file:
            file.extractall(folder, filter="data")
    elif not folder.exists():
        return False
    now = {"at": str(folder.resolve()), "pack": brought}
    if now != known:
        _relocate(folder.resolve())
        mark.write_text(json.dumps(now))
    return True


def packed(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.tar.xz")


def _relocate(folder: Path) -> None:
    """Name the files of each kernel that are here where they are."""
    for group in folder.glob(f"*/{_GROUP}*"):
        names = json.loads(group.read_text())["child_paths"]
        here = {name: str(group.parent / name) for name in names if (group.parent / name).exists()}
        group.write_text(json.dumps({"child_paths": here}))


def pack(folder: Path) -> Path:
    """Write the pack of a cache; like lies beside like, which is what compresses."""
    files = [
        path
        for path in folder.glob("*/*")
        if path.is_file() and path.parent.name != PROGRESS and path.suffix not in _LEFT_OUT
    ]
    files.sort(key=lambda path: (path.suffix, path.name, path.parent.name))
    target = packed(folder)
    made = target.with_suffix(".part")
    with tarfile.open(made, "w:xz", preset=6) as file:
        for path in files:
            file.add(path, path.relative_to(folder).as_posix())
    made.replace(target)
    print(f"{target}: {len(files)} files, {target.stat().st_size / 2**20:.1f} MiB")
    return target


def make(folder: Path, workers: int, budget_s: float | None, paths: Sequence[str], sources: Sequence[str]) -> int:
    """Compile in processes side by side; returns 75 where the budget ended some of it."""
    bring(folder)
    folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    more = False
    jobs = [("source", name) for name in sources] + [("tests", path) for path in paths]
    for kind, name in jobs:
        left = None if budget_s is None else budget_s - (time.monotonic() - began)
        if left is not None and left < 5:
            return MORE
        processes = []
        for share in range(workers):
            command = _of_source(name) if kind == "source" else _of_tests(folder, name, share, left)
            processes.append(_start(folder, [*command, "--share", f"{share}/{workers}"]))
        # A share's other statuses are those of tests whose results are garbage; what counts is in the cache.
        says = [process.communicate()[0].splitlines() for process in processes]
        more |= any(process.returncode == MORE for process in processes)
        for text in says:
            found = [line for line in text if line.startswith("kernels asked for")]
            print(f"{name}: {found[-1] if found else 'budget spent' if kind == 'tests' else text[-3:]}", flush=True)
    count = sum(1 for _ in folder.glob("*/*.cubin"))
    print(f"{folder}: {count} kernels after {time.monotonic() - began:.0f} s")
    return MORE if more else 0


def _of_source(name: str) -> list[str]:
    return [sys.executable, "-m", "tests.on_gpu.compiles", name]


def _of_tests(folder: Path, path: str, share: int, left: float | None) -> list[str]:
    """In slices, whose records make a second call go on."""
    plugins = ["-p", "tests.on_gpu.compiles", "-p", "tests.slices", "--slices", str(folder / PROGRESS / str(share))]
    budget = [] if left is None else ["--budget-s", f"{left:.0f}"]
    options = ["-m", "not cpu_only", "-q", "--tb", "no", "-r", "N", "--continue-on-collection-errors", "-n", "0"]
    return [sys.executable, "-m", "pytest", path, *plugins, *budget, *options, "-p", "no:cacheprovider"]


def _start(folder: Path, command: list[str]) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder.resolve()), "TRITON_STORE_BINARY_ONLY": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Make, pack or check."""
    parser = argparse.ArgumentParser(prog="python -m tests.on_gpu.cache", description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("make", "pack", "check"))
    parser.add_argument("paths", nargs="*", help=f"of tests; {' '.join(TESTS)} if not given")
    parser.add_argument("--cache", type=Path, default=FOLDER, metavar="DIR")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, metavar="N")
    parser.add_argument("--budget-s", type=float, metavar="N", help="end after N seconds; a second call goes on")
    parser.add_argument("--source", action="append", choices=SOURCES, help="repeatable; all if not given")
    options = parser.parse_args(arguments)
    if options.what == "pack":
        pack(options.cache)
        return 0
    sources = SOURCES if options.source is None else tuple(options.source)
    if options.what == "check":
        if not bring(options.cache):
            raise SystemExit(f"there is neither {options.cache} nor {packed(options.cache)}")
        return make(options.cache, options.workers, options.budget_s, options.paths, sources)
    status = make(options.cache, options.workers, options.budget_s, options.paths or TESTS, sources)
    pack(options.cache)
    return status


if __name__ == "__main__":
    raise SystemExit(main())
