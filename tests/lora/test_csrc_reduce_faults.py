"""Faults that are put into the reduce kernel on purpose, each seen by the emulator."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from tests.lora import simt_reduce
from tests.lora.simt_reduce import Operands, Task
from tests.lora.test_csrc_reduce import assert_as_expected, draw, unit_rows, wild
from tests.simt import build, faults
from tests.simt.faults import Fault

pytestmark = [pytest.mark.cpu_only, pytest.mark.thorough]

BF16, FP32 = torch.bfloat16, torch.float32
PLAIN, NARROW = "reduce::Config<__nv_bfloat16, 32, false, false>", "reduce::Config<__nv_bfloat16, 32, false, true>"
EXACT = "reduce::Config<__nv_bfloat16, 32, true, true>"
# Each has units that three blocks share, and blocks that have several units.
TASKS = {
    PLAIN: Task(m=290, n=8, k=264, r=20, dtype=BF16, adapter_dtype=BF16, db=False, dbias=False, threshold=32768),
    NARROW: Task(m=290, n=24, k=8, r=40, dtype=BF16, adapter_dtype=BF16, da=False, ds=True, multiprocessors=5),
    EXACT: Task(m=35, n=24, k=8, r=35, dtype=BF16, adapter_dtype=FP32, da=False, ds=True, multiprocessors=5),
}
FAULTS = {
    **{f"no fault {number}": Fault("", "", config) for number, config in enumerate(TASKS)},
    "a float32 factor has two pieces": Fault("for (int i = 2; i >= 0; --i)", "for (int i = 1; i >= 0; --i)", EXACT),
    "a float32 factor loses its largest piece": Fault(
        "for (int i = 2; i >= 0; --i)", "for (int i = 2; i > 0; --i)", EXACT
    ),
    "an infinite element has a rest": Fault("rest == rest ? rest : 0.0f", "rest", EXACT),
    "a chunk's copies are not waited for": Fault("    wait_for_copies<C::kStages - 2>();\n", "", PLAIN),
    "one more group of copies is taken to be there": Fault("<C::kStages - 2>", "<C::kStages - 1>", PLAIN),
    "the last copies are not waited for": Fault("  wait_for_copies<0>();\n", "", PLAIN),
    "a stage is taken as soon as its own thread's copies are there": Fault(
        "    __syncthreads();  // this chunk", "    // this chunk", PLAIN
    ),
    "a stage is multiplied before all have made it ready": Fault(
        "params, work);\n    __syncthreads();\n    add_chunk(", "params, work);\n    add_chunk(", PLAIN
    ),
    "dS goes to the next rank": Fault("* params.r + rank]", "* params.r + (rank + 1) % params.r]", NARROW),
    "dS is without its factor": Fault("= factor * acc[tile][i];", "= acc[tile][i];", NARROW),
    "dS of the last chunk of a range is not made": Fault(
        "if (params.ds != nullptr && work.job == kUp) {\n        store_ds",
        "if (params.ds != nullptr && work.job == kUp && i + 1 < count) {\n        store_ds",
        NARROW,
    ),
    "dS of the next unit is made of this one's B": Fault("if (is_new && ", "if (i == 0 && ", NARROW),
    "a range loses its last chunk": Fault("    add_chunk(sums", "    if (i + 1 < count) add_chunk(sums", PLAIN),
    "a range is one chunk too long": Fault(
        "first_chunk(blockIdx.x + 1) - begin)",
        "first_chunk(blockIdx.x + 1) - begin) + (blockIdx.x + 1 < gridDim.x)",
        PLAIN,
    ),
    "rows past the end are added": Fault("first + row < params.m && bytes > 0", "bytes > 0", PLAIN),
    "partial sums are added in order of arrival": Fault(
        "plan.slot(other, work.unit)",
        "plan.slot(first + (other + cta - 2 * first) % (last - first + 1), work.unit)",
        PLAIN,
    ),
    "the last partial sum is not added": Fault("other <= last", "other < last", PLAIN),
    "the own sums are added twice": Fault("  sums = {};\n#pragma unroll 1", "#pragma unroll 1", PLAIN),
    "a unit begins with the sums of the one before": Fault("      sums = {};\n    }\n", "    }\n", PLAIN),
    "the ticket is taken before all have left their sums": Fault(
        "  __syncthreads();\n  if (threadIdx.x == 0) {\n    *sIsLast", "  if (threadIdx.x == 0) {\n    *sIsLast", PLAIN
    ),
    "threads go on before they know whether the block is the last": Fault(
        "  __syncthreads();\n  if (*sIsLast == 0)", "  if (*sIsLast == 0)", PLAIN
    ),
    "the last but one takes itself for the last": Fault("last - first + 1)", "last - first)", PLAIN),
    "two units share a slot": Fault("{ return cta + unit; }", "{ return cta; }", PLAIN),
    "every block of ranks makes dbias": Fault("job.sums != nullptr && work.rank == 0", "job.sums != nullptr", NARROW),
    "dbias has dB's factor": Fault("static_cast<T>(sums.bias[i]", "static_cast<T>(factor * sums.bias[i]", NARROW),
    "x has the mask of the row below": Fault("C::kRows + row, draws_of", "C::kRows + row + 1, draws_of", PLAIN),
    "x has the mask of the first columns": Fault("work.column / kDecisionsPerCall + thread.lane", "thread.lane", PLAIN),
}


@pytest.fixture(scope="module")
def faulty() -> Path:
    """One program with every faulty version of the kernel."""
    kept = ("lora/dropout.h",)
    return build.build(faults.source("lora/reduce.cuh", simt_reduce.TEST, FAULTS, kept))


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_seen(faulty: Path, fault: str) -> None:
    task, version = TASKS[FAULTS[fault].config], (faulty, list(FAULTS).index(fault))
    keep_scale = 2.0 if task.threshold else 1.0

    def check(task: Task, operands: Operands, schedules: int) -> None:
        got = simt_reduce.run(task, operands, 0.5, keep_scale, schedules, faulty=version)
        assert_as_expected(task, operands, keep_scale, got)

    def check_all() -> None:
        check(task, draw(task, integers=True), schedules=1)
        if FAULTS[fault].config == EXACT:
            small = dataclasses.replace(task, m=16, n=16, k=16)
            check(small, unit_rows(small), schedules=1)
            operands = unit_rows(small)
            operands.s[3, 1] = torch.inf
            db = simt_reduce.run(small, operands, faulty=version).db
            assert db is not None and db[3, 1] == torch.inf  # the oracle's, and no nan
        simt_reduce.run(task, wild(task), schedules=6, faulty=version)

    if fault.startswith("no fault"):
        check_all()
        return
    with pytest.raises(AssertionError):
        check_all()
