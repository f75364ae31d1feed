"""Count the variants of a family's kernels that lengths of all kinds ask for; nothing is compiled and nothing runs.

python tests/codegen/variants.py lora        prints a JSON object: the columns of each kernel's variants that differ

Triton's own binder makes the keys, so its rules are those of the version that is installed. It must not interpret,
hence a process of its own.
"""

from __future__ import annotations

import functools
import json
import random
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from torch import Tensor

from benchmarks import aot

BF16 = torch.bfloat16
LLAMA_3_8B = ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336))  # (N, K) of the projections
make = functools.partial(torch.empty, device="meta")

# One key for each variant: what of it stands in each column.
Variants = dict[str, set[tuple[tuple[str, str], ...]]]


def lengths(largest: int) -> list[int]:
    """Also one, and a small multiple of 16, which few of the random ones are."""
    return [1, 16, *random.Random(0).choices(range(1, largest + 1), k=400)]


def lora() -> Iterator[Callable[[], object]]:
    for m in lengths(8192):
        for n, k in LLAMA_3_8B:
            yield functools.partial(_lora, m, n, k, r=16)


def adapter() -> Iterator[Callable[[], object]]:
    for m in lengths(8192):
        yield functools.partial(_adapter, m, width=4096, r=64)


def prefix() -> Iterator[Callable[[], object]]:
    for s in lengths(4096):
        yield functools.partial(_prefix, 4, s, s)
    for length in range(1, 2049):
        yield functools.partial(_prefix, 1, 1, length)


def wide() -> Iterator[Callable[[], object]]:
    for s in lengths(4096):
        for b in (1, 4):
            yield functools.partial(_prefix, b, s, s, "wide")


def prompt() -> Iterator[Callable[[], object]]:
    for length in lengths(4096):
        yield functools.partial(_prompt, 8, length)


FAMILIES = {"lora": lora, "adapter": adapter, "prefix": prefix, "wide": wide, "prompt": prompt}


def _matrix(rows: int, cols: int, by_columns: bool) -> Tensor:
    return make(cols, rows, dtype=BF16).t() if by_columns else make(rows, cols, dtype=BF16)


def _lora(m: int, n: int, k: int, r: int, by_columns: bool = False) -> None:
    from peft_kernels.lora.linear import problem as lora_linear
    from peft_kernels.lora.linear import triton_impl

    inputs = lora_linear.Inputs(
        x=_matrix(m, k, by_columns),
        weight=make(n, k, dtype=BF16),
        lora_a=make(r, k, dtype=BF16),
        lora_b=make(n, r, dtype=BF16),
        scale=0.5,
        bias=None,
        dropout_p=0.0,
        seed=None,
    )
    problem = lora_linear.make_problem(inputs)
    _, s = triton_impl.forward(problem, inputs)
    needs = lora_linear.Needs(x=True, weight=False, lora_a=True, lora_b=True, bias=False)
    triton_impl.backward(problem, inputs, s, _matrix(m, n, by_columns), needs)


def _adapter(m: int, width: int, r: int, by_columns: bool = False) -> None:
    from peft_kernels.adapter import problem as bottleneck_adapter
    from peft_kernels.adapter import triton_impl

    inputs = bottleneck_adapter.Inputs(
        x=_matrix(m, width, by_columns),
        down_weight=make(r, width, dtype=BF16),
        up_weight=make(width, r, dtype=BF16),
        down_bias=make(r, dtype=BF16),
        up_bias=make(width, dtype=BF16),
        residual=None,
        serial=True,
        activation="relu",
        scale=1.0,
    )
    problem = bottleneck_adapter.make_problem(inputs)
    _, z = triton_impl.forward(problem, inputs)
    needs = bottleneck_adapter.Needs(*[True] * len(bottleneck_adapter.Needs._fields))
    triton_impl.backward(problem, inputs, z, _matrix(m, width, by_columns), needs)


def _prefix(b: int, s: int, length: int, path: str = "own") -> None:
    """As a model has them: heads in the last dimension but one of memory; a decoding step has no backward pass.

    Another path is of the forward pass, and only where it is taken.
    """
    from peft_kernels.prefix import pieces, triton_impl
    from peft_kernels.prefix import problem as prefix_attention

    h, h_kv, p, d = 32, 8, 20, 128
    q = make(b, s, h, d, dtype=BF16).transpose(1, 2)
    k = make(b, length, h_kv, d, dtype=BF16).transpose(1, 2)
    given = make(h_kv, p, d, dtype=BF16)
    inputs = prefix_attention.Inputs(
        q=q,
        k=k,
        v=k,
        prefix_k=given,
        prefix_v=given,
        causal=True,
        scale=prefix_attention.default_scale(d),
        key_padding_mask=make(b, length, dtype=torch.bool) if b > 1 else None,
    )
    problem = prefix_attention.make_problem(inputs)
    if path != pieces.OWN and pieces.why_not_possible(path, problem) is not None:
        return
    y, stats = triton_impl.forward(problem, inputs, path)
    if b > 1 and path == pieces.OWN:
        needs = prefix_attention.Needs(*[True] * len(prefix_attention.Needs._fields))
        triton_impl.backward(problem, inputs, y, stats, make(b, s, h, d, dtype=BF16).transpose(1, 2), needs)


def _prompt(b: int, length: int) -> None:
    from peft_kernels.prompt import problem as prompt_tuning
    from peft_kernels.prompt import triton_impl

    d, p = 4096, 20
    inputs = prompt_tuning.Inputs(token_embeddings=make(b, length, d, dtype=BF16), prompts=make(1, p, d, dtype=BF16))
    problem = prompt_tuning.make_problem(inputs)
    y = triton_impl.forward(problem, inputs)
    triton_impl.backward(problem, y, prompt_tuning.Needs(*[True] * len(prompt_tuning.Needs._fields)))


def record(launches: Iterator[Callable[[], object]]) -> Variants:
    """Run launchers, with every kernel call turned into the key under which Triton would look for a compiled kernel."""
    from triton.runtime.jit import JITFunction

    variants: Variants = defaultdict(set)

    def only_bind(self: Any, *args: Any, grid: object, warmup: bool, **kwargs: Any) -> None:
        *_, binder = self.device_caches[0]
        bound, specialization, options = binder(*args, **kwargs)
        columns = dict(zip(bound, map(str, specialization), strict=True)) | {k: str(v) for k, v in options.items()}
        variants[self.__name__].add(tuple(columns.items()))

    with mock.patch.object(JITFunction, "run", only_bind):
        for launch in launches:
            launch()
    return variants


def differing(variants: Variants) -> dict[str, dict[str, Any]]:
    """How many variants each kernel has, and the columns in which they differ."""
    found = {}
    for kernel, keys in variants.items():
        columns = defaultdict(set)
        for key in keys:
            for name, value in key:
                columns[name].add(value)
        several = {name: sorted(values)[:4] for name, values in columns.items() if len(values) > 1}
        found[kernel] = {"variants": len(keys), "columns": several}
    return found


def by_columns() -> Iterator[Callable[[], object]]:
    """Activations and gradients stored by columns: masks over M are then as wide as vectors of them."""
    for m in (16, 8192):
        yield functools.partial(_lora, m, 4096, 4096, r=16, by_columns=True)
        yield functools.partial(_adapter, m, width=4096, r=64, by_columns=True)


def main(family: str) -> None:
    aot.target(90)
    if family == "by_columns":
        variants = record(by_columns())
        print(json.dumps({kernel: sorted({dict(key)["M"] for key in keys}) for kernel, keys in variants.items()}))
        return
    print(json.dumps(differing(record(FAMILIES[family]()))))


if __name__ == "__main__":
    main(*sys.argv[1:])
