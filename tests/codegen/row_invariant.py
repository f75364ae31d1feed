"""What decides in which order a compiled kernel sums a row, for several numbers of rows; Triton must not interpret:

python tests/codegen/row_invariant.py 90        prints a JSON object: for each kernel of a launch, its products by M
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from benchmarks import aot
from tests.codegen import lora_launches

ROWS = (1, 16, 17, 300)
_PRODUCT = re.compile(r"\b(tt\.dot|ttng\.warp_group_dot|ttng\.tc_gen5_mma)\b[^:]*: (.*?)( loc\(|$)")
_LAYOUT = re.compile(r"^(#\w+) = (.*)$", re.MULTILINE)


def products(text: str) -> list[str]:
    """The products of a kernel in Triton's GPU dialect, in order, with the layouts of their operands spelled out."""
    layouts = dict(_LAYOUT.findall(text))
    found = []
    for line in text.splitlines():
        match = _PRODUCT.search(line)
        if match is not None:
            spelled = re.sub(r"#\w+", lambda name: layouts.get(name[0], name[0]), match[2])
            found.append(f"{match[1]}: {spelled}")
    return found


def main(arch: int) -> None:
    aot.target(arch)
    by_kernel: dict[str, dict[str, list[list[str]]]] = {}
    for dtype, adapter in ((torch.bfloat16, torch.bfloat16), (torch.float32, torch.float32)):
        for m in ROWS:
            for kernel in aot.record_compiles(
                lambda dtype=dtype, adapter=adapter, m=m: lora_launches._launch(
                    dtype, adapter, 16, 0.1, 256, m, row_invariant=True
                )
            ):
                name = f"{dtype} {kernel.metadata.name}"
                by_kernel.setdefault(name, {}).setdefault(str(m), []).append(products(kernel.asm["ttgir"]))
    print(json.dumps(by_kernel))


if __name__ == "__main__":
    main(int(sys.argv[1]))
