"""Machine code of the Hopper GEMM: what must be there, and that nothing spills or is serialised."""

from __future__ import annotations

import re
from collections import Counter
from typing import NamedTuple

import pytest

from tests.codegen import cubin

pytestmark = pytest.mark.cpu_only

PATTERN = r"4lora.*gemm_sm90_kernelI"
ARCH = "90a"
# 65536 registers for 384 threads, in steps of 8; the warpgroups then hand theirs over.
REGISTERS_AT_ENTRY = 168


@pytest.fixture(scope="module")
def kernels() -> list[cubin.Kernel]:
    """bf16 and fp16, padded ranks 16, 32, 64 and 128, forward and backward, wide and narrow tiles, which are the
    same in fp16 forward at rank 128; with dropout, tiles of one width."""
    found = cubin.kernels(ARCH, PATTERN)
    assert len(found) == 31 + 16
    return found


def test_nothing_is_spilled(kernels: list[cubin.Kernel]) -> None:
    for kernel in kernels:
        assert (kernel.stack, kernel.local, kernel.count("LDL"), kernel.count("STL")) == (0, 0, 0, 0), kernel.name


def test_registers_are_handed_over(kernels: list[cubin.Kernel]) -> None:
    for kernel in kernels:
        assert kernel.registers == REGISTERS_AT_ENTRY, kernel.name
        assert kernel.count("USETMAXREG.DEALLOC") == kernel.count("USETMAXREG.TRY_ALLOC") == 1, kernel.name


def test_products_are_of_warpgroups(kernels: list[cubin.Kernel]) -> None:
    """By W in both loops over k, four of 16 k each, perhaps unrolled, and as wide by the ranks at the end of either; by
    A or B beside those of one. Forward in float16, and backward with dropout, the rank product has accumulators of its
    own, 64 columns each."""
    for kernel in kernels:
        variant, kind = _variant(kernel), "F32.BF16" if "HalfTypeE0" in kernel.name else "F32"
        rank, width = variant.rank, variant.width
        expected = Counter({rank: 4})
        if variant.folded:
            expected[width] += 2 * rank // 16
        else:
            expected[64] += width // 64 * rank // 16
        by_w = kernel.opcodes[f"HGMMA.64x{width}x16.{kind}"] - expected[width]
        assert by_w >= 8 and by_w % 4 == 0, kernel.name
        expected[width] += by_w
        for columns, count in expected.items():
            assert kernel.opcodes[f"HGMMA.64x{columns}x16.{kind}"] == count, (kernel.name, columns)
        assert kernel.count("HGMMA") == expected.total(), kernel.name


def test_elements_are_dropped_in_registers(kernels: list[cubin.Kernel]) -> None:
    """Forward x comes to registers once a step, backward each chunk of the rank product is there; for either, the lanes
    of a quad hand each other their decisions. Elsewhere nothing is loaded for it, and nothing exchanged."""
    for kernel in kernels:
        variant = _variant(kernel)
        loads = 4 if variant.drops and not variant.backward else 0
        draws = (variant.width // 64 if variant.backward else 1) if variant.drops else 0
        assert kernel.count("LDSM.16.M88.4") == loads, kernel.name
        assert kernel.count("SHFL.IDX") == 4 * draws, kernel.name
        from_registers = re.findall(r"HGMMA\.64x(\d+)x16\.\S+ R\d+, R\d+, gdesc", kernel.code)
        assert from_registers == [str(variant.rank)] * loads, kernel.name


def test_products_are_not_serialised(kernels: list[cubin.Kernel]) -> None:
    """Where the compiler cannot keep products in flight it waits after each."""
    for kernel in kernels:
        assert 2 * kernel.count("WARPGROUP.DEPBAR") < kernel.count("HGMMA"), kernel.name


def test_copy_engine_moves_operands_and_result(kernels: list[cubin.Kernel]) -> None:
    """W's and up's halves to both blocks of a cluster, or to the only one: a box, or one for each 64 columns."""
    for kernel in kernels:
        variant = _variant(kernel)
        chunks = variant.width // 64
        boxes = 2 * (chunks if variant.backward else 1)
        assert kernel.opcodes["UTMALDG.2D.MULTICAST"] == boxes, kernel.name
        assert kernel.opcodes["UTMALDG.2D"] >= 4, kernel.name
        assert kernel.count("UTMASTG.2D") == chunks, kernel.name
        assert kernel.count("STSM.16.M88.4") == 4 * chunks, kernel.name
        # A fence for y's chunks, for S and for the barriers in shared memory; for S on either side in global memory.
        assert kernel.count("FENCE.VIEW.ASYNC.S") >= chunks + 2, kernel.name
        assert kernel.count("FENCE.VIEW.ASYNC.G") >= 2, kernel.name


def test_stages_are_handed_back_without_a_fence(kernels: list[cubin.Kernel]) -> None:
    """Of the device: at the cluster's two barriers and the flag, not in the loops."""
    for kernel in kernels:
        assert kernel.count("MEMBAR.ALL.GPU") == 3, kernel.name


def test_flags_are_acquired_and_released(kernels: list[cubin.Kernel]) -> None:
    for kernel in kernels:
        assert kernel.count("LDG.E.64.STRONG.GPU") >= 1, kernel.name
        assert kernel.count("STG.E.64.STRONG.GPU") == 1, kernel.name
        assert kernel.count("MEMBAR") >= 1, kernel.name


class Variant(NamedTuple):
    rank: int
    width: int
    backward: bool
    folded: bool
    drops: bool


def _variant(kernel: cubin.Kernel) -> Variant:
    match = re.search(r"HalfTypeE(\d)ELi(\d+)ELNS\d_9DirectionE(\d)ELi(\d+)ELb(\d)E", kernel.name)
    assert match, kernel.name
    bf16, backward, drops = match[1] == "0", match[3] == "1", match[5] == "1"
    return Variant(int(match[2]), int(match[4]), backward, not drops if backward else bf16, drops)
