"""The mask kernel's device body in the emulator, and faults that are put into it on purpose."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from peft_kernels.lora.kernels import dropout
from tests.simt import build, faults
from tests.simt.faults import Fault

pytestmark = pytest.mark.cpu_only

TEST = r"""
// The mask lies in a buffer from its byte `offset` on.
template <bool kAligned>
void test(const simt::Arguments& arguments) {
  simt::Buffer seed = arguments.input("seed");
  simt::Buffer mask("mask", static_cast<size_t>(arguments.integer("bytes")));
  simt::Take take = {arguments, {{"mask", mask.data<uint8_t>() + arguments.integer("offset")}, {"seed", seed.data()}}};
  DropoutMaskParams params = {};
  fields(take, params);
  if (mask::is_aligned(params) != kAligned) {
    throw simt::Error("the launcher would take the other kernel");
  }
  simt::run_schedules(arguments, {&seed}, {&mask}, [&](uint64_t schedule) {
    simt::Config config;
    config.grid = {static_cast<unsigned>(arguments.integer("grid_columns")),
                   static_cast<unsigned>(arguments.integer("grid_rows"))};
    config.block = {mask::kBlockGroups, mask::kBlockRows};
    config.seed = schedule;
    simt::launch(config, [&] { mask::mask_body<kAligned>(params); });
  });
}
"""
BLOCK_COLUMNS = 256
ALIGNED, BYTES = "true", "false"
FAULTS = {
    "no fault, aligned": Fault("", "", ALIGNED),
    "no fault, bytes": Fault("", "", BYTES),
    "decisions lie the other way round": Fault("<< (8 * j)", "<< (56 - 8 * j)", ALIGNED),
    "bytes past the last column are written": Fault("first_col + j < params.cols", "true", BYTES),
    "a block's columns begin where the one before begins": Fault(
        "(blockIdx.x) * kBlockGroups", "(blockIdx.x)", ALIGNED
    ),
    "the last rows are left out": Fault("row < params.rows; row", "row < params.rows - 1; row", BYTES),
    "blocks take their rows once": Fault("row += row_step", "row += params.rows", ALIGNED),
    "rows are walked as if there were one block": Fault("(gridDim.y) * kBlockRows", "(1) * kBlockRows * 4", BYTES),
    "rows count from the part's first": Fault("params.first_row + row,", "row,", ALIGNED),
    "rows are as long as they are aligned": Fault("row * params.cols", "row * ((params.cols + 7) / 8 * 8)", BYTES),
    "every lane is lane 0": Fault(", params.lane)", ", 0)", ALIGNED),
    "the threshold itself is dropped": Fault("0xFFFFu) >= threshold", "0xFFFFu) > threshold", BYTES),
}
# Part of a mask whose rows go on past 2^32: more columns than a block has, and rows that it walks to twice.
FIRST_ROW, ROWS = 2**32 - 20, 43
COLUMNS = {ALIGNED: 520, BYTES: 525}
GRID_ROWS = 2
LANE = 2**32 - 3
SEED = torch.tensor([-20240229])
# One of the draws is equal to it, and is kept.
EQUAL = 20481
# What outputs hold before a launch: simt::kPoison.
POISON = [0xC5, 0x7F, 0xC5]


@pytest.fixture(scope="module")
def program() -> Path:
    return build.build(faults.source("lora/dropout_mask.cuh", TEST, FAULTS, ("lora/params.h",)))


def check(program: Path, fault: str, threshold: int, offset: int) -> None:
    """Every decision is the recipe's, and no byte beside the mask is written."""
    config = FAULTS[fault].config
    columns = COLUMNS[config]
    size = ROWS * columns
    numbers = {
        "first_row": FIRST_ROW,
        "rows": ROWS,
        "cols": columns,
        "threshold": threshold,
        "offset": offset,
        "lane": LANE,
    }
    numbers |= {"grid_columns": -(-columns // BLOCK_COLUMNS), "grid_rows": GRID_ROWS, "bytes": size + offset}
    numbers["config"] = list(FAULTS).index(fault)
    outputs = {"mask": ((size + offset,), torch.uint8)}
    got = build.run(program, {"seed": SEED}, outputs, schedules=2, **numbers)["mask"]
    assert got[:offset].tolist() == POISON[:offset], "bytes before the mask were written"
    kept = dropout.keep_bits(SEED[0], FIRST_ROW, ROWS, columns, threshold, LANE) != 0
    assert torch.equal(got[offset:].view(ROWS, columns), kept.to(torch.uint8))


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_seen(program: Path, fault: str) -> None:
    def check_all() -> None:
        for threshold in (0, EQUAL, 65535):
            check(program, fault, threshold, 0)
        if FAULTS[fault].config == BYTES:
            check(program, fault, EQUAL, 3)

    if fault.startswith("no fault"):
        check_all()
        return
    with pytest.raises(AssertionError):
        check_all()
