"""Compile the launches of a family, with no GPU; Triton must not interpret, hence a process of its own:

python tests/codegen/aot.py lora 90          prints one JSON object per compiled kernel
python tests/codegen/aot.py lora 80 0/3      of a third of the launches alone, always the same, and at least one
"""

from __future__ import annotations

import importlib
import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks import aot


def main(family: str, arch: int, share: str = "0/1") -> None:
    launches = importlib.import_module(f"tests.codegen.{family}_launches")
    aot.target(arch)
    seen = set()
    first, step = map(int, share.split("/"))
    # Shuffled, since neighbours differ in what alternates.
    every = list(launches.launches())
    random.Random(0).shuffle(every)
    for name, launch in every[first % len(every) :: step]:
        for kernel in aot.record_compiles(launch):
            if kernel.hash in seen:
                continue
            seen.add(kernel.hash)
            row = {"launch": name, "kernel": kernel.metadata.name, "arch": arch, **aot.inspect(kernel)}
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])
