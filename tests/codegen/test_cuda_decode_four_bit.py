"""Machine code of the decode kernel for weights of four bits, for all architectures that the extension has."""

from __future__ import annotations

import re
from typing import NamedTuple

import pytest

from tests.codegen import cubin, loops
from tests.codegen.loops import Instruction
from tests.codegen.test_cuda_decode import ARCHS, HALVES, MOST_REGISTERS

pytestmark = pytest.mark.cpu_only

# Of the loop over W, whose turn is 4 steps of 32 rows by 32 of k: 128 elements a lane.
CODES, ELEMENTS = 4, 128


class Kernel(NamedTuple):
    """A kernel, and its loop over W."""

    whole: cubin.Kernel
    turn: list[Instruction]

    @property
    def name(self) -> str:
        return self.whole.name


@pytest.fixture(scope="module", params=ARCHS)
def kernels(request: pytest.FixtureRequest) -> list[Kernel]:
    """bf16 and fp16, with adapters of that dtype and with float32 ones, for 8 tokens and for 16."""
    found = cubin.kernels(request.param, r"4lora.*decode_four_bit_kernelI")
    assert len(found) == 8
    return [Kernel(kernel, _turn(kernel)) for kernel in found]


def test_nothing_is_spilled_and_two_blocks_fit_a_multiprocessor(kernels: list[Kernel]) -> None:
    for kernel in kernels:
        spilled = kernel.whole.stack, kernel.whole.local, kernel.whole.count("LDL"), kernel.whole.count("STL")
        assert spilled == (0, 0, 0, 0), kernel.name
        assert kernel.whole.registers <= MOST_REGISTERS, kernel.name


def test_a_turn_loads_its_codes_16_bytes_at_a_time(kernels: list[Kernel]) -> None:
    """Each once, without a place in L1; x by 16 bytes for each 8 tokens of a step."""
    for kernel in kernels:
        assert _count(kernel.turn, r"LDG\.E\.NA\.128") == CODES, kernel.name
        assert _count(kernel.turn, r"LDG\.E\.128") == 4 * _tokens(kernel) // 8, kernel.name


def test_an_element_takes_a_lookup_and_a_product(kernels: list[Kernel]) -> None:
    """Beside four lookups of nested scales; elements are rounded in pairs."""
    for kernel in kernels:
        assert ELEMENTS <= _count(kernel.turn, r"LDS\b") <= ELEMENTS + 4, kernel.name
        assert ELEMENTS <= _count(kernel.turn, "FMUL") <= ELEMENTS + 4, kernel.name
        assert _count(kernel.turn, "F2FP") == ELEMENTS // 2, kernel.name
        # A product and a sum of a nested scale that were one operation would be rounded once.
        assert _count(kernel.turn, "FFMA") == 0, kernel.name


def test_products_are_of_the_tensor_cores(kernels: list[Kernel]) -> None:
    for kernel in kernels:
        assert _count(kernel.turn, HALVES) == 4 * 2 * 2 * _tokens(kernel) // 8, kernel.name


def test_the_next_codes_are_under_way_at_every_product(kernels: list[Kernel]) -> None:
    """Of 16 warps of 32 lanes 32 KiB a multiprocessor; 4.3 TB/s at 0.8 us ask for 26."""
    for kernel in kernels:
        under_way = loops.loads_under_way(kernel.turn, "LDG.E.NA.128", HALVES)
        assert min(under_way) * 16 * 32 * 16 >= 32 * 1024, (kernel.name, under_way)


def test_flags_are_acquired_and_released_and_what_they_hand_over_is_read_coherently(
    kernels: list[Kernel],
) -> None:
    """Words that may be older are those of scales, of the second level's table, and its offset."""
    for kernel in kernels:
        assert kernel.whole.count("LDG.E.64.STRONG.GPU") > 0, kernel.name
        assert kernel.whole.count("STG.E.64.STRONG.GPU") > 0, kernel.name
        assert kernel.whole.count("MEMBAR") > 0, kernel.name
        assert kernel.whole.count("LDG.E.CONSTANT") == 2 * (CODES + CODES) + 2, kernel.name
        assert kernel.whole.opcodes["LDG.E"] > 0, kernel.name


def _turn(kernel: cubin.Kernel) -> list[Instruction]:
    """The loop over W: the shortest that multiplies and has lanes change words."""
    found = (loop for loop in loops.loops(kernel.code) if _count(loop, HALVES) and _count(loop, r"SHFL\.BFLY"))
    return min(found, key=len)


def _count(loop: list[Instruction], pattern: str) -> int:
    return sum(re.match(pattern, one.name) is not None for one in loop)


def _tokens(kernel: Kernel) -> int:
    match = re.search(r"Li(\d+)EEEvNS0_\d+DecodeFourBitParamsE$", kernel.name)
    assert match, kernel.name
    return int(match[1])
