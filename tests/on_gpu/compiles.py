"""Compile what a GPU would be asked to launch, on a machine that has none, into Triton's cache; nothing runs.

    TRITON_CACHE_DIR=DIR python -m pytest tests/lora -p tests.on_gpu.compiles [--share 0/2]    what tests ask for
    TRITON_CACHE_DIR=DIR python -m tests.on_gpu.compiles checks|soak|quick [--share 0/2]      what else does

Tensors are on the CPU and results are garbage: comparisons pass, so that a test goes on to its next launch, and what
fails all the same is of no account. Configs see the target's multiprocessors. Triton's binder makes the keys, as on a
GPU. `tests/on_gpu/cache.py` starts this.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

ARCH = 90
ASKED: Counter[str] = Counter()
"""Kernels by whether the cache had them: "hit" or "miss"; and what was launched but did not compile: "failed"."""


def install() -> None:
    """From here on this process compiles for the GPU, and launches nothing."""
    os.environ.pop("TRITON_INTERPRET", None)
    import triton
    from triton.runtime.jit import JITFunction

    import peft_kernels  # noqa: F401
    from benchmarks import aot
    from peft_kernels import testing
    from peft_kernels._core import triton_tools
    from peft_kernels.lora.kernels import masks
    from python_ref import compare

    aot.target(ARCH)
    triton_tools.why_not_device = lambda device: None
    triton_tools.why_not_environment = lambda: None
    kinds = masks.kinds
    masks.kinds = lambda device: (masks.TritonMask, *kinds(device))
    masks.why_not_triton = lambda device: None
    for module in (compare, testing):
        for name in [name for name in vars(module) if name.startswith("assert_")]:
            setattr(module, name, mock.MagicMock(name=name))
    triton.knobs.compilation.listener = _count
    run, launched = JITFunction.run, set()

    def compile_only(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            kernel = run(self, *args, **{**kwargs, "warmup": True})
        except Exception:
            ASKED["failed"] += 1
            raise
        if kernel.hash not in launched:
            launched.add(kernel.hash)
            _make_launcher(kernel)
        return kernel

    JITFunction.run = compile_only


def _count(*, cache_hit: bool, **_: object) -> None:
    ASKED["hit" if cache_hit else "miss"] += 1


def _make_launcher(kernel: Any) -> None:
    """Triton 3.6 has a C compiler make a module for each signature, which is in the cache too; later ones have one."""
    from triton.backends.nvidia import driver
    from triton.runtime import build

    if not hasattr(driver, "make_launcher"):
        return
    os.environ.setdefault("TRITON_LIBCUDA_PATH", _stub_of_libcuda())
    with mock.patch.object(build, "_load_module_from_path", lambda name, path: mock.MagicMock()):
        driver.CudaLauncher(kernel.src, kernel.metadata)


def _stub_of_libcuda() -> str:
    """A folder with a library of the driver's name, which the linker asks for and nobody loads."""
    folder = Path(tempfile.gettempdir(), f"stub-of-libcuda-{os.getuid()}")
    library = folder / "libcuda.so.1"
    if not library.exists():
        folder.mkdir(exist_ok=True)
        made = folder / f"{os.getpid()}.so"
        command = ["gcc", "-shared", "-x", "c", os.devnull, f"-Wl,-soname,{library.name}", "-o", str(made)]
        subprocess.run(command, check=True)
        made.replace(library)
    return str(folder)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.getgroup("compiles").addoption("--share", default="0/1", metavar="I/N", help="only these tests of N parts")


def pytest_configure() -> None:
    install()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out others' shares, and what needs a device beside Triton's launches."""
    mine = [item for item in items if _is_mine(config.getoption("--share"), item.nodeid) and "gpu" not in item.keywords]
    items[:] = mine


def pytest_terminal_summary(terminalreporter: Any) -> None:
    terminalreporter.write_line(said())


def said() -> str:
    return f"kernels asked for: {ASKED['hit']} in the cache, {ASKED['miss']} compiled, {ASKED['failed']} failed"


def _is_mine(share: str, name: str) -> bool:
    index, count = map(int, share.split("/"))
    return zlib.crc32(name.encode()) % count == index


def checks() -> Iterator[tuple[str, Callable[[], object]]]:
    """What `peft_kernels.qualify` launches."""
    import torch

    from benchmarks import aot
    from peft_kernels import judge
    from peft_kernels._core.operator import OPERATORS

    cpu = torch.device("cpu")

    def check(operator: Any, implementation: Any, part: str, case: Any) -> None:
        call, dy = implementation.qualification.family.make(case, cpu, 0)
        with judge._precision(part):
            judge._run(operator, implementation, call, dy)

    for operator in OPERATORS.values():
        for implementation in operator.to_check:
            if implementation.name == "cuda":
                continue
            qualification = implementation.qualification
            for part in qualification.parts:
                for case in qualification.cases(part, aot.HARDWARE[ARCH]):
                    name = f"{operator.name}/{implementation.name}/{part}/{case}"
                    yield name, lambda o=operator, i=implementation, p=part, c=case: check(o, i, p, c)


def soak() -> Iterator[tuple[str, Callable[[], object]]]:
    """What `tests/soak` launches ten thousand times."""
    import torch

    from tests.soak import problems

    for index in range(96):
        yield f"soak/{index}", lambda i=index: problems.draw(i, torch.device("cpu")).run("triton")


def quick() -> Iterator[tuple[str, Callable[[], object]]]:
    """What `benchmarks --quick` and `benchmarks.sample` launch; tensors have no memory."""
    from benchmarks import harness, sample
    from benchmarks.family import Grid, discover

    problems = [(family, problem) for family in discover().values() for problem in family.problems(Grid("cuda", True))]
    for family, problem in (*problems, *sample.PROBLEMS):
        (provider,) = (each for each in family.providers if each.name == "ours_triton")

        def launch(family: Any = family, problem: Any = problem, provider: Any = provider) -> None:
            inputs = _without_memory(family, problem)
            for mode in family.modes(problem):
                harness.closures(provider.make(problem, inputs), mode)()

        yield f"{family.name}/{problem}", launch


def _without_memory(family: Any, problem: Any) -> Any:
    import torch

    def empty(*shape: Any, **options: Any) -> torch.Tensor:
        return torch.empty(*shape, device="meta", dtype=options.get("dtype"))

    with mock.patch.object(torch, "randn", empty):
        inputs = family.make_inputs(problem, torch.device("cpu"), 0)
    return type(inputs)(
        *(x.to("meta").requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) and x.device.type != "meta" else x
          for x in inputs)
    )  # fmt: skip


SOURCES = {"checks": checks, "soak": soak, "quick": quick}


def main() -> int:
    """Compile a share of one source; what fails is named and stops nothing."""
    parser = argparse.ArgumentParser(prog="python -m tests.on_gpu.compiles", description=__doc__.splitlines()[0])
    parser.add_argument("source", choices=SOURCES)
    parser.add_argument("--share", default="0/1", metavar="I/N")
    options = parser.parse_args()
    install()
    import torch

    torch.set_num_threads(1)
    # Autocast does not know tensors without memory.
    with (
        mock.patch.object(torch, "is_autocast_enabled", lambda device_type: False),
        mock.patch.object(torch, "autocast", lambda device_type, enabled: contextlib.nullcontext()),
    ):
        for name, launch in SOURCES[options.source]():
            if _is_mine(options.share, name):
                try:
                    launch()
                except Exception as error:  # what is compiled counts, and one problem must not cost the others
                    print(f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:160]}")
    print(said())
    return 0


if __name__ == "__main__":
    sys.exit(main())
