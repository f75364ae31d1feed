"""``python -m benchmarks.sample [--out DIR]``: a few problems that say within two minutes how the kernels stand.

The fused product at a training step of two shapes, decoding, and an adapter: each provider's time over that of the
family's limit or, where it has none, of its first baseline. Timed forward alone, by the harness, and recorded one
folder down from the records of whole grids. Status 3 where there is no GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# As in __main__: read when torch is loaded.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")

import torch

from benchmarks import adapter, harness, lora, record, tables
from benchmarks.family import Family

NAME = "sample"
NO_GPU = 3

BF16 = {"dtype": "bfloat16", "adapter_dtype": "bfloat16"}
PROBLEMS: tuple[tuple[Family, Any], ...] = (
    (lora.FAMILY, lora.Problem("sample", "square", m=8192, n=4096, k=4096, r=16, p=0.0, **BF16)),
    (lora.FAMILY, lora.Problem("sample", "deep", m=4096, n=4096, k=14336, r=16, p=0.0, **BF16)),
    (lora.FAMILY, lora.Problem("sample", "one token", m=1, n=4096, k=4096, r=16, p=0.0, **BF16)),
    (lora.FAMILY, lora.Problem("sample", "16 tokens", m=16, n=4096, k=4096, r=16, p=0.0, **BF16)),
    (adapter.FAMILY, adapter.Problem(m=8192, k=4096, r=64, activation="gelu", form="serial", **BF16)),
)
# Compiling takes longer than everything else; the clock's choice and torch's backend are other questions.
WITHOUT = ("peft_compiled", "eager_compiled", "ours_auto", "ours_torch")


def main(arguments: Sequence[str] | None = None) -> int:
    """Time and print; the exit status is 1 if a provider failed or gave a wrong result."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sample", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, metavar="DIR", help=f"write DIR/<device>/{NAME}/, records and {NAME}.md")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("there is no GPU to time anything on")
        return NO_GPU
    device = torch.device("cuda", torch.cuda.current_device())
    session = harness.start_session(device, quick=True, commit=None, without=WITHOUT)
    return measure(session, options.out, PROBLEMS)


def measure(session: harness.Session, out: Path | None, problems: Sequence[tuple[Family, Any]]) -> int:
    """Time the problems; each is on record and in the table as soon as it is timed."""
    texts, failed = [], False
    for family, problem in problems:
        lines = harness.measure_problem(dataclasses.replace(family, modes=lambda _: ("forward",)), problem, session)
        failed |= any(line["status"] == "failed" for line in lines)
        texts.append(f"{family.name}: {tables.label(lines[0]['problem'])}\n\n```\n{ratios(lines)}\n```\n")
        print(texts[-1], flush=True)
        if out is not None:
            folder = out / session.device_slug / NAME
            record.append(folder / f"{family.name}.jsonl", lines)
            (folder / f"{NAME}.md").write_text("\n".join(texts))
    return int(failed)


def ratios(lines: Sequence[Mapping[str, Any]]) -> str:
    """Lay out one problem's records: microseconds, and the first one's time over each, which is a speed."""
    timed = [line for line in lines if line["status"] == "ok"]
    rows = []
    for line in lines:
        if line["status"] == "ok":
            speed = timed[0]["median_us"] / line["median_us"]
            rows.append(
                [line["provider"], f"{line['median_us']:.1f}", f"{speed:.3f}", f"{line['roofline_fraction']:.2f}"]
            )
        else:
            rows.append([line["provider"], "-", "-", f"{line['status']}: {line['reason']}"[:100]])
    first = timed[0]["provider"] if timed else "nothing"
    return tables.aligned(["provider", "us", f"speed, {first} = 1", "of the roofline"], rows)


if __name__ == "__main__":
    sys.exit(main())
