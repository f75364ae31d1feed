"""Compile a kernel whose accumulators fit an sm_100's tensor memory, and one whose do not, with no GPU:

python tests/codegen/tensor_memory.py        prints one JSON object for each
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import triton
import triton.language as tl

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks import aot

ARCH, BLOCK_M, BLOCK_K = 100, 128, 64


@triton.jit
def three_products_kernel(x_ptr, w_ptr, y_ptr, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    rows, cols = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_N)[None, :]
    acc0 = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc1, acc2 = acc0, acc0
    for k in range(0, K, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + rows * K + offs_k[None, :])
        w = w_ptr + offs_k[:, None]
        acc0 = tl.dot(x, tl.load(w + cols * K), acc0)
        acc1 = tl.dot(x, tl.load(w + (cols + BLOCK_N) * K), acc1)
        acc2 = tl.dot(x, tl.load(w + (cols + 2 * BLOCK_N) * K), acc2)
    tl.store(y_ptr + rows * BLOCK_N + cols, acc0 * acc1 + acc2)


def main() -> None:
    aot.target(ARCH)
    for width in (64, 256):
        x = torch.empty(BLOCK_M, 1024, dtype=torch.bfloat16, device="meta")
        w = torch.empty(3 * width, 1024, dtype=torch.bfloat16, device="meta")
        y = torch.empty(BLOCK_M, width, device="meta")
        (kernel,) = aot.record_compiles(
            lambda x=x, w=w, y=y, width=width: three_products_kernel[(1,)](
                x, w, y, 1024, BLOCK_M, width, BLOCK_K, num_warps=8, num_stages=2
            )
        )
        row = {"launch": f"{width} columns", "kernel": kernel.metadata.name, "arch": ARCH, **aot.inspect(kernel)}
        print(json.dumps(row))


if __name__ == "__main__":
    main()
