"""Faults that are put into the decode kernel for tokens of several adapters on purpose, each seen by the emulator."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from peft_kernels._core.rows import Rows
from tests.lora import simt_decode_rows
from tests.lora.simt_decode_rows import Case, expected, make_exact
from tests.simt import build, faults
from tests.simt.faults import Fault

pytestmark = [pytest.mark.cpu_only, pytest.mark.thorough]

PLAIN = "__nv_bfloat16, __nv_bfloat16"
# Of four tiles that could be chosen three are, two of W, splits of each, a last chunk that is cut off, and more units
# than blocks. Slots of several tokens and of one, one amidst them that nobody has, one of rank 0, and tokens without.
SPLITS, GRID = (3, 4), 5
SLOTS = (1, 5, -1, 0, 1, 3, 6, 2, -1, 5, 1, 6, 0)
RANKS = (20, 33, 0, 64, 40, 7, 40)
FAULTS = {
    "no fault": Fault("", "", PLAIN),
    "the first token's slot is all tokens'": Fault(
        "slot = params.slot[lane * params.slot_stride]", "slot = params.slot[0]", PLAIN
    ),
    "the first slot's scale is all slots'": Fault(
        "params.layer.scale[slot * params.scale_stride]", "params.layer.scale[0]", PLAIN
    ),
    "the rank is that of the next slot": Fault(
        "params.table[kRank * params.table_stride + slot]",
        "params.table[kRank * params.table_stride + (slot + 1) % params.slots]",
        PLAIN,
    ),
    "the factors begin where the next slot's do": Fault(
        "params.table[kFirst * params.table_stride + slot]",
        "params.table[kFirst * params.table_stride + (slot + 1) % params.slots]",
        PLAIN,
    ),
    "a token without a slot has the first one": Fault(
        "const bool is_slot = slot >= 0 && slot < params.slots;",
        "slot = slot < 0 ? 0 : slot; const bool is_slot = true;",
        PLAIN,
    ),
    "a token without an adapter has an update": Fault("if (sPlan.rank[token] > 0) {", "{", PLAIN),
    "a slot is counted with each of its tokens": Fault("      counted = 0;\n", "", PLAIN),
    "a slot is counted with none of its tokens": Fault("== slot && token < lane)", "== slot)", PLAIN),
    "slots begin where the one before does": Fault(
        "begin += other < slot ? rows : 0;", "begin += other + 1 < slot ? rows : 0;", PLAIN
    ),
    "the last tile of chosen rows is dropped": Fault(
        "if (first >= chosen) {", "if (first + kTileRows >= chosen) {", PLAIN
    ),
    "tiles that nobody chose are waited for": Fault(
        "shape.down_splits, tiles(sPlan.chosen));", "shape.down_splits, tiles(shape.r));", PLAIN
    ),
    "S is not waited for": Fault(
        "    wait_for(layer, unit_of_s(shape, 0), shape.down_splits, tiles(sPlan.chosen));\n", "", PLAIN
    ),
    "one tile of S is waited for": Fault("shape.down_splits, tiles(sPlan.chosen));", "shape.down_splits, 1);", PLAIN),
    "the first split of S is waited for": Fault("wait_for(layer, unit_of_s(shape, 0),", "wait_for(layer, 0,", PLAIN),
    "earlier splits of W are not waited for": Fault(
        "  wait_for(layer, index - unit.split, 1, unit.split);\n", "", PLAIN
    ),
    "earlier splits of A are not waited for": Fault(
        "  wait_for(params.layer, index - unit.split, 1, unit.split);\n", "", PLAIN
    ),
    "the plan is read before it is made": Fault("      __syncthreads();  // the plan\n", "", PLAIN),
    "S of others' rows is stored": Fault(
        "if (rank >= 0 && rank < sPlan.rank[token]) {", "if (rank >= 0 && rank < params.s_stride) {", PLAIN
    ),
    "S is in the order of the tokens": Fault(
        "sPlan.place[params.order[lane * params.order_stride]] = lane;", "sPlan.place[lane] = lane;", PLAIN
    ),
    "S is in the inverse order": Fault(
        "sPlan.place[params.order[lane * params.order_stride]] = lane;",
        "sPlan.place[lane] = params.order[lane * params.order_stride];",
        PLAIN,
    ),
    "a token takes S of a whole block": Fault(
        "return {begin > 0 ? begin : 0, at_most(end, kRankBlock)};", "return {0, kRankBlock};", PLAIN
    ),
    "a token's ranks end with their block": Fault(
        "for (int chosen = 0; chosen < sPlan.chosen; chosen += kRankBlock)",
        "for (int chosen = 0; chosen < 1; chosen += kRankBlock)",
        PLAIN,
    ),
    "B's columns are those of the chosen rows' numbers": Fault(
        "row_of_a(chosen + i, params.shape.m) * params.b_stride_r", "(chosen + i) * params.b_stride_r", PLAIN
    ),
    "A's rows are those of the chosen rows' numbers": Fault(
        "row_of_a(at_most(rows.first + index, rows.end - 1), m) * rows.stride",
        "at_most(rows.first + index, rows.end - 1) * rows.stride",
        PLAIN,
    ),
    "B's next columns come while others read the ones before": Fault(
        "      __syncthreads();  // all have read the block before\n", "", PLAIN
    ),
    "S is multiplied before all of it has come": Fault(
        "    stage_own_s(sS, thread, params, chosen);\n    __syncthreads();\n",
        "    stage_own_s(sS, thread, params, chosen);\n",
        PLAIN,
    ),
}


@pytest.fixture(scope="module")
def faulty() -> Path:
    """One program with every faulty version of the kernel."""
    return build.build(faults.source("lora/decode_rows.cuh", simt_decode_rows.TEST, FAULTS))


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_seen(faulty: Path, fault: str) -> None:
    version = faulty, list(FAULTS).index(fault)
    case = Case(SLOTS, RANKS, n=70, k=1096)
    tensors = make_exact(case)

    def exact(schedules: int) -> None:
        got = simt_decode_rows.run(case, tensors, *SPLITS, GRID, schedules, spare=(1, 2), faulty=version)
        for one, other in zip(got, expected(case, tensors), strict=True):
            assert torch.equal(one.double(), other)

    def check() -> None:
        exact(1)
        exact(12)

    if fault.startswith("no fault"):
        check()
        return
    with pytest.raises(AssertionError):
        check()


def test_slots_are_worth_a_test() -> None:
    """An order that is not its own inverse, slots whose ranks cross tiles' edges, and a tile that nobody chooses."""
    order = Rows.of(torch.tensor(SLOTS), known=len(RANKS)).order.long()
    assert not torch.equal(order, torch.argsort(order))
    used = [RANKS[slot] for slot in sorted(set(SLOTS)) if slot >= 0]
    assert not {64, 128} & {sum(used[:end]) for end in range(len(used) + 1)}
    assert 128 < sum(used) <= 192 < Case(SLOTS, RANKS, n=1, k=8).most_chosen
