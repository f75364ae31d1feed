"""``python -m tests.on_gpu first|all|tests|bench|sanitize [--out DIR] [--budget-s N]``: what a GPU is asked to do.

DIR/<device>/<table>/ has the state, the logs and the summary of the parts; tests, measurements and verdicts lie beside
it. A second call goes on where the first one stopped; status 75 says that there is more to do, 1 that a part failed.
``machine`` and ``build`` are parts of these.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.on_gpu import cache, parts
from tests.on_gpu.runner import Runner

NOT_HERE = 3


def main(arguments: list[str] | None = None) -> int:
    """Run a table of parts, or one of the two that are written here."""
    parser = argparse.ArgumentParser(prog="python -m tests.on_gpu", description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=(*parts.TABLES, "machine", "build"))
    parser.add_argument("--out", type=Path, default=parts.ROOT / "benchmarks" / "results", help="folder of the records")
    parser.add_argument("--budget-s", type=float, metavar="N", help="end after N seconds")
    parser.add_argument("--cache", type=Path, default=cache.FOLDER, help="Triton's cache, or DIR.tar.xz beside it")
    options = parser.parse_args(arguments)
    if options.what == "machine":
        return machine()
    if options.what == "build":
        return build()
    out = options.out.resolve()
    header = asked()
    device = parts.slug(header["device"])
    os.environ.setdefault("PEFT_KERNELS_CACHE_DIR", str(out / device / "qualification"))
    if "TRITON_CACHE_DIR" not in os.environ and cache.bring(options.cache):
        os.environ["TRITON_CACHE_DIR"] = str(options.cache.resolve())
    table = parts.TABLES[options.what](out, device)
    folder = out / device / options.what
    status = Runner(table, folder, header, options.budget_s).run()
    print(f"status {status}; {folder / 'summary.md'}")
    return status


def asked() -> dict[str, Any]:
    """What results belong to, as a process of its own says it: this one must hold no device that its parts need.

    The extension is no part of it, because it is built on the way.
    """
    code = "import json; from tests import slices; print(json.dumps(slices.where()[0]))"
    answer = subprocess.run([sys.executable, "-c", code], cwd=parts.ROOT, capture_output=True, text=True, check=False)
    if answer.returncode != 0:
        raise SystemExit(f"torch cannot be asked for its device: {answer.stderr[-2000:]}")
    header = json.loads(answer.stdout.splitlines()[-1])
    header["versions"].pop("extension")
    return header


def machine() -> int:
    """Print what is here: programs, libraries, the device."""
    for name in ("make", "git", "gcc", "g++", "nvcc", "ninja", "nvidia-smi", "compute-sanitizer"):
        print(f"{name}: {shutil.which(name)}")
    print(f"{os.cpu_count()} processors, {platform.platform()}, TRITON_CACHE_DIR={os.environ.get('TRITON_CACHE_DIR')}")
    if shutil.which("nvidia-smi"):
        subprocess.run(["nvidia-smi"], check=False)
    header = asked()
    print(json.dumps(header))
    return 0 if header["device"] != "cpu" else NOT_HERE


def build() -> int:
    """Build the extension where there is an nvcc; elsewhere take the one that is there, if it has CUDA kernels."""
    if shutil.which("nvcc") or (os.environ.get("CUDA_HOME") and Path(os.environ["CUDA_HOME"], "bin", "nvcc").exists()):
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        environment = {**os.environ, "PEFT_KERNELS_REQUIRE_CUDA": "1"}
        return subprocess.run(command, cwd=parts.ROOT, env=environment, check=False).returncode
    code = "from peft_kernels._core import extension; print(extension.why_not() or extension.build_record())"
    print("there is no nvcc; the extension that is here, of whatever sources:", flush=True)
    subprocess.run([sys.executable, "-c", code], cwd=parts.ROOT, check=False)
    return NOT_HERE


if __name__ == "__main__":
    raise SystemExit(main())
