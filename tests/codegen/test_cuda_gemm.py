"""Machine code of the Hopper GEMM: what must be there, and that nothing spills or is serialised."""

from __future__ import annotations

import re

import pytest

from peft_kernels._core import extension
from tests.codegen import cubin

pytestmark = pytest.mark.cpu_only

PATTERN = r"4lora.*gemm_sm90_kernelI"
ARCH = "90a"
# 65536 registers for 384 threads, in steps of 8; the warpgroups then hand theirs over.
REGISTERS_AT_ENTRY = 168


@pytest.fixture(scope="module")
def kernels() -> list[cubin.Kernel]:
    """bf16 and fp16, padded ranks 16, 32, 64 and 128, forward and backward."""
    if extension.why_not_importable() is None and ARCH not in extension.load().build_info()["archs"]:
        pytest.skip(f"the extension was not built for sm_{ARCH}")
    found = cubin.kernels(ARCH, PATTERN)
    assert len(found) == 16
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
    A or B beside those of one. Forward in float16 the rank product has accumulators of its own, 64 columns each."""
    for kernel in kernels:
        rank, kind = _rank(kernel), "F32.BF16" if "HalfTypeE0" in kernel.name else "F32"
        width = 256 if rank <= 64 else 192
        folded = "HalfTypeE0" in kernel.name or "DirectionE1" in kernel.name
        expected = {64: 0 if folded else width // 64 * rank // 16}
        expected[rank] = expected.get(rank, 0) + 4
        for columns, count in expected.items():
            assert kernel.opcodes[f"HGMMA.64x{columns}x16.{kind}"] == count, (kernel.name, columns)
        full = kernel.opcodes[f"HGMMA.64x{width}x16.{kind}"]
        by_w = full - 2 * rank // 16 if folded else full
        assert by_w >= 8 and by_w % 4 == 0, kernel.name
        assert kernel.count("HGMMA") == full + sum(expected.values()), kernel.name


def test_products_are_not_serialised(kernels: list[cubin.Kernel]) -> None:
    """Where the compiler cannot keep products in flight it waits after each."""
    for kernel in kernels:
        assert 2 * kernel.count("WARPGROUP.DEPBAR") < kernel.count("HGMMA"), kernel.name


def test_copy_engine_moves_operands_and_result(kernels: list[cubin.Kernel]) -> None:
    for kernel in kernels:
        chunks = 4 if _rank(kernel) <= 64 else 3
        assert kernel.count("UTMALDG.2D") >= 5, kernel.name
        assert kernel.count("UTMASTG.2D") == chunks, kernel.name
        assert kernel.count("STSM.16.M88.4") == 4 * chunks, kernel.name
        # A fence for y's chunks, for S and for the barriers in shared memory; for S on either side in global memory.
        assert kernel.count("FENCE.VIEW.ASYNC.S") >= chunks + 2, kernel.name
        assert kernel.count("FENCE.VIEW.ASYNC.G") >= 2, kernel.name


def test_flags_are_acquired_and_released(kernels: list[cubin.Kernel]) -> None:
    for kernel in kernels:
        assert kernel.count("LDG.E.64.STRONG.GPU") >= 1, kernel.name
        assert kernel.count("STG.E.64.STRONG.GPU") == 1, kernel.name
        assert kernel.count("MEMBAR") >= 1, kernel.name


def _rank(kernel: cubin.Kernel) -> int:
    match = re.search(r"HalfTypeE\dELi(\d+)E", kernel.name)
    assert match, kernel.name
    return int(match[1])
