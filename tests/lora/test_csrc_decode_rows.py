"""The decode kernel for tokens of several adapters in the emulator."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from torch import Tensor

from python_ref import compare
from tests.lora import cases, simt_decode, simt_decode_rows
from tests.lora.simt_decode_rows import Case, Tensors, eager, expected, make, make_exact
from tests.lora.test_cuda_decode import HALVES
from tests.simt import build

pytestmark = pytest.mark.cpu_only

# Few tokens and many; one slot for all, one each, none, in blocks and shuffled; slots that nobody has before, between
# and behind; ranks of 0, in one tile of chosen rows, in several, across their edges and those of blocks of ranks. With
# them splits of W and of A, and blocks: fewer than units, as many, and more.
SHAPES = (
    (Case(slots=(0,), ranks=(1,), n=33, k=8), (1, 1, 1)),
    (Case(slots=(1, -1), ranks=(3, 5, 2), n=64, k=56), (1, 1, 2)),
    (Case(slots=(2, 0, 2, -1, 1, 0, 2), ranks=(16, 7, 0), n=63, k=72), (2, 2, 3)),
    (Case(slots=(5, 4, 3, 2, 1, 0, 7, 6), ranks=(16, 16, 8, 40, 1, 0, 33, 64), n=130, k=1096), (3, 5, 7)),
    (Case(slots=(3, -1, 1, 9, 1, -1, 3, 7, 7), ranks=(4,) * 10, n=1, k=512), (2, 4, 6)),
    (Case(slots=(-1,) * 6 + (0,) * 7, ranks=(64, 3), n=65, k=328), (5, 6, 30)),
    (Case(slots=tuple(range(16)), ranks=(16,) * 16, n=70, k=520), (4, 2, 5)),
    (Case(slots=(-1,) * 16, ranks=(16, 16), n=40, k=136), (1, 3, 4)),
    (Case(slots=tuple(15 - i for i in range(16)), ranks=(60, 9, 0, 64, 63) * 4, n=96, k=64), (2, 2, 3)),
    (Case(slots=(1,) * 13 + (0, 2, 1), ranks=(130, 70, 64), n=40, k=2888), (1, 1, 2)),
)
GRID = [
    (dataclasses.replace(case, dtype=dtype, adapter_dtype=adapter, bias=index % 2 == 0), split)
    for index, (case, split) in enumerate(SHAPES)
    for dtype, adapter in HALVES
]
MIXED = Case(slots=(2, 0, -1, 2, 1, 3, 0, 2, -1, 1, 2), ranks=(40, 9, 33, 0, 12), n=70, k=584)


@pytest.mark.parametrize(("case", "split"), GRID, ids=str)
def test_error_budget(case: Case, split: tuple[int, int, int]) -> None:
    draws = []
    for seed in range(max(1, min(8, 256 // (case.m * case.n)))):
        tensors = make(case, seed)
        got = simt_decode_rows.run(case, tensors, *split, schedules=2, first_seed=10 * seed)
        draws.append((got, eager(case, tensors), expected(case, tensors)))
    for index, name in enumerate(("y", "S")):
        ours, theirs, exact = (torch.cat([draw[which][index].flatten() for draw in draws]) for which in range(3))
        compare.assert_close(f"{case} {name}", ours, theirs, exact)


def test_exact_for_random_slots_shapes_splits_and_blocks() -> None:
    """Integers leave nothing to round; what no token uses, and memory that nobody has written, is nan."""
    draw = random.Random(0)
    for seed in range(80):
        dtype, adapter = draw.choice(HALVES)
        count, m = draw.randint(1, 16), draw.randint(1, 16)
        most = draw.choice((count, 1))  # of the slots that tokens have
        case = Case(
            slots=tuple(draw.choice((-1, draw.randrange(most), draw.randrange(most))) for _ in range(m)),
            ranks=(draw.randint(1, 64), *(draw.choice((0, draw.randint(1, 64))) for _ in range(count - 1))),
            n=draw.randint(1, 200),
            k=8 * draw.randint(1, draw.choice((90, 400))),
            dtype=dtype,
            adapter_dtype=adapter,
            bias=draw.random() < 0.5,
        )
        split = (draw.randint(1, 6), draw.randint(1, 6), draw.randint(1, 12))
        tensors, spare = make_exact(case, seed), (draw.randint(0, 3), draw.randint(0, 3))
        got = simt_decode_rows.run(case, tensors, *split, schedules=1, first_seed=seed, spare=spare)
        for name, one, exact in zip(("y", "S"), got, expected(case, tensors), strict=True):
            assert torch.equal(one.double(), exact), f"{name} {case} {split}"


@pytest.mark.parametrize("grid", [1, 2, 9, 25])
def test_every_schedule_and_grid_give_the_same_bits(grid: int) -> None:
    tensors = make(MIXED)
    first = simt_decode_rows.run(MIXED, tensors, splits=4, down_splits=3, grid=4)
    got = simt_decode_rows.run(MIXED, tensors, splits=4, down_splits=3, grid=grid, schedules=40, first_seed=100)
    for name, one, other in zip(("y", "S"), first, got, strict=True):
        compare.assert_bitwise_equal(name, one, other)


@pytest.mark.parametrize(("dtype", "adapter"), HALVES)
@pytest.mark.parametrize("m", [5, 13])
def test_a_token_has_the_bits_of_its_adapter_alone(m: int, dtype: torch.dtype, adapter: torch.dtype | None) -> None:
    """Those that the kernel of one adapter gives it with the same splits, whatever slots the others have."""
    case = Case((MIXED.slots * 2)[:m], MIXED.ranks, n=70, k=584, dtype=dtype, adapter_dtype=adapter)
    tensors = make(case)
    got = simt_decode_rows.run(case, tensors, splits=3, down_splits=2)
    for slot in range(5):
        tokens = [token for token in range(m) if case.slots[token] == slot]
        if tokens and case.ranks[slot] > 0:
            for name, ours, theirs in zip(("y", "S"), got, _alone(case, tensors, slot), strict=True):
                compare.assert_bitwise_equal(name, ours[tokens, : theirs.shape[1]], theirs[tokens])


def _alone(case: Case, tensors: Tensors, slot: int) -> tuple[Tensor, Tensor]:
    alone = cases.Case(
        case.m, case.n, case.k, case.ranks[slot], case.dtype, case.adapter_dtype, scale=float(tensors.scales[slot])
    )
    a, b = tensors.lora_a[case.of(slot)], tensors.lora_b[:, case.of(slot)].contiguous()
    given = cases.Tensors(tensors.x, tensors.weight, a, b, tensors.bias)
    return simt_decode.run(alone, given, splits=3, down_splits=2)


def test_tokens_without_an_adapter_have_the_bits_of_the_frozen_layer() -> None:
    """Those of a call whose tokens have none; so has a token whose slot's rank is 0, and one of no known slot."""
    case = dataclasses.replace(MIXED, slots=(2, 0, -1, 2, 1, 3, 5, -7, 1 << 30, 1, -(1 << 31)))
    tensors = make(case)
    y, _ = simt_decode_rows.run(case, tensors, splits=3, down_splits=2)
    nobody = dataclasses.replace(case, slots=(-1,) * case.m)
    frozen, _ = simt_decode_rows.run(nobody, make(nobody), splits=3, down_splits=2)
    base = [token for token, slot in enumerate(case.slots) if not 0 <= slot < 3]
    assert len(base) == 6
    compare.assert_bitwise_equal("y", y[base], frozen[base])
    assert not (y == frozen).all(1)[[token for token in range(case.m) if token not in base]].any()


def test_replays_need_their_flags_zeroed() -> None:
    """A launch with the nonce of the one before takes its flags for its own, unless they are zeroed in between."""
    tensors = make(MIXED)
    repeats = {"splits": 3, "down_splits": 2, "grid": 8, "schedules": 20, "repeat_nonce": True}
    first = simt_decode_rows.run(MIXED, tensors, splits=3, down_splits=2)
    got = simt_decode_rows.run(MIXED, tensors, zero_flags=True, **repeats)
    for name, one, other in zip(("y", "S"), first, got, strict=True):
        compare.assert_bitwise_equal(name, one, other)
    with pytest.raises(build.SimtError, match=r"bits of . differ between schedules"):
        simt_decode_rows.run(MIXED, tensors, **repeats)


@pytest.mark.parametrize("m", [5, 16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_adapters_lose_no_bit(dtype: torch.dtype, m: int) -> None:
    """A token that is 1 in one place takes its A's column there: in three pieces, to the last bit."""
    slots = tuple(token % 3 for token in range(m))
    case = Case(slots, ranks=(20, 64, 7), n=8, k=64, dtype=dtype, adapter_dtype=torch.float32, bias=False)
    tensors = make(case)
    _, s = simt_decode_rows.run(case, tensors._replace(x=torch.eye(m, case.k, dtype=dtype)))
    for token, slot in enumerate(slots):
        compare.assert_bitwise_equal("S", s[token, : case.ranks[slot]], tensors.lora_a[case.of(slot), token])


@pytest.mark.parametrize("what", ["x", "lora_a", "lora_b", "scales"])
def test_nan_of_an_adapter_reaches_its_tokens_alone(what: str) -> None:
    """And one of x its token."""
    tensors = make(MIXED)
    clean = simt_decode_rows.run(MIXED, tensors, splits=2, down_splits=2)
    touched = [token for token, slot in enumerate(MIXED.slots) if slot == 2]
    if what == "x":
        touched = [3]
        tensors.x[3, 70] = torch.nan
    elif what == "lora_a":
        tensors.lora_a[MIXED.of(2)] = torch.nan
    elif what == "lora_b":
        tensors.lora_b[:, MIXED.of(2)] = torch.nan
    else:
        tensors.scales[2] = torch.nan
    y, s = simt_decode_rows.run(MIXED, tensors, splits=2, down_splits=2)
    others = [token for token in range(MIXED.m) if token not in touched]
    assert y[touched].isnan().all()
    for name, one, other in zip(("y", "S"), clean, (y, s), strict=True):
        compare.assert_bitwise_equal(name, one[others], other[others])
