"""Faults that are put into the decode kernel for weights of four bits on purpose, each seen by the emulator."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.lora import simt_decode, simt_decode_four_bit
from tests.lora.simt_decode_four_bit import Case, make, make_cancelling
from tests.simt import build, faults
from tests.simt.faults import Fault

pytestmark = [pytest.mark.cpu_only, pytest.mark.thorough]

PLAIN = "__nv_bfloat16, __nv_bfloat16"
FEW, MANY = 5, 13  # tokens, for which there is a kernel each
# Two tiles of A and of W, splits of each, several turns of a warp and a half one, and more units than blocks.
SPLITS, GRID, SCHEDULES = (2, 3), 5, 40
FAULTS = {
    "no fault": Fault("", "", PLAIN),
    "nibbles are swapped": Fault(
        "first = codes >> 2 & kPlaces, second = codes << 2", "first = codes << 2 & kPlaces, second = codes >> 2", PLAIN
    ),
    "a float32 scale is that of the next block": Fault("+ (chunk[i] >> shift))", "+ (chunk[i] >> shift ^ 1))", PLAIN),
    "a nested scale is that of the next block": Fault(
        "static_cast<const uint8_t*>(params.scales) + block)",
        "static_cast<const uint8_t*>(params.scales) + (block ^ 1))",
        PLAIN,
    ),
    "a block is a chunk": Fault("params.block_shift - kChunkShift", "0", PLAIN),
    "the second level has one block": Fault("block >> params.second_shift", "0", PLAIN),
    "the offset is forgotten": Fault(
        "return __fadd_rn(__fmul_rn(shared_floats(kCode)[scale[i]], second[i]), offset);",
        "return __fmul_rn(shared_floats(kCode)[scale[i]], second[i]);",
        PLAIN,
    ),
    "product and sum of a nested scale are rounded once": Fault(
        "__fadd_rn(__fmul_rn(shared_floats(kCode)[scale[i]], second[i]), offset)",
        "std::fma(shared_floats(kCode)[scale[i]], second[i], offset)",
        PLAIN,
    ),
    "a value is rounded before it is scaled": Fault(
        "halves_of<T>(one * scale, other * scale)",
        "halves_of<T>(floats_of<T>(halves_of<T>(one, one)).x * scale, other * scale)",
        PLAIN,
    ),
    "lanes keep their words": Fault("      exchange(words[i], thread.quad);\n", "", PLAIN),
    "pairs of lanes alone change words": Fault("bit < kTurnSteps; bit *= 2", "bit < 2; bit *= 2", PLAIN),
    "a turn has the scales of its first chunk": Fault("own, j * kSteps, kTurnSteps", "own, 0, kTurnSteps", PLAIN),
    "a lane has its own scale": Fault("__shfl_sync(0xffffffffu, own, j * kSteps, kTurnSteps)", "own", PLAIN),
    "a turn's second chunk is the next warp's": Fault(
        "thread.quad / kSteps * kWarpsOfK;", "thread.quad / kSteps;", PLAIN
    ),
    "a row has as many chunks as its range": Fault(
        "row * (shape.k / kChunkK)", "row * (range.end - range.begin)", PLAIN
    ),
    "codes end with the last tile": Fault(
        "at_most(tile * kTileRows + thread.first_row() + thread.group + 8 * i, shape.n - 1)",
        "tile * kTileRows + thread.first_row() + thread.group + 8 * i",
        PLAIN,
    ),
    "x stands still": Fault("gX[i] += kFurther;\n    }\n    left -= kFurther;", "}\n    left -= kFurther;", PLAIN),
    "tables are read before they are there": Fault(
        "  stage_tables(params);\n  __syncthreads();\n", "  stage_tables(params);\n", PLAIN
    ),
}


@pytest.fixture(scope="module")
def faulty() -> Path:
    """One program with every faulty version of the kernel."""
    return build.build(faults.source("lora/decode_four_bit.cuh", simt_decode_four_bit.TEST, FAULTS))


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_seen(faulty: Path, fault: str) -> None:
    version = faulty, list(FAULTS).index(fault)

    def check() -> None:
        for m, second in ((FEW, 0), (MANY, 4)):
            case = Case(m=m, n=70, k=1664, r=70, block=128, second=second)
            tensors, weight = make(case)
            y, s, _ = simt_decode_four_bit.run(case, tensors, weight, *SPLITS, GRID, faulty=version)
            expected = simt_decode.run(case.layer, tensors, *SPLITS, GRID)
            assert torch.equal(y, expected[0])
            assert torch.equal(s, expected[1])
        case = Case(m=3, n=33, k=128, r=1, second=2, bias=False)
        y, _, _ = simt_decode_four_bit.run(case, *make_cancelling(case), faulty=version)
        assert torch.equal(y, torch.zeros_like(y))
        # Blocks that begin with W.
        case = Case(m=FEW, n=130, k=256, r=1, second=4)
        tensors, weight = make(case)
        y, _, _ = simt_decode_four_bit.run(case, tensors, weight, grid=4, schedules=SCHEDULES, faulty=version)
        assert torch.equal(y, simt_decode.run(case.layer, tensors, grid=4)[0])

    if fault == "no fault":
        check()
        return
    with pytest.raises(AssertionError):
        check()
