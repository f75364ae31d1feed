"""Machine code of the decode kernel, for every architecture that the extension was built for."""

from __future__ import annotations

import re

import pytest

from peft_kernels._core import extension
from tests.codegen import cubin

pytestmark = pytest.mark.cpu_only

PATTERN = r"4lora.*decode_kernelI"
ARCHS = ("80", "86", "89", "90a", "100")
# __launch_bounds__(256, 2) leaves each thread 128 of a multiprocessor's 65536 registers.
MOST_REGISTERS = 65536 // (2 * 256)


@pytest.fixture(scope="module", params=ARCHS)
def kernels(request: pytest.FixtureRequest) -> list[cubin.Kernel]:
    """bf16 and fp16, with adapters of that dtype and with float32 ones."""
    arch = request.param
    if extension.why_not_importable() is None and arch not in extension.load().build_info()["archs"]:
        pytest.skip(f"the extension was not built for sm_{arch}")
    found = cubin.kernels(arch, PATTERN)
    assert len(found) == 4
    return found


def test_nothing_is_spilled(kernels: list[cubin.Kernel]) -> None:
    for kernel in kernels:
        assert (kernel.stack, kernel.local, kernel.count("LDL"), kernel.count("STL")) == (0, 0, 0, 0), kernel.name


def test_two_blocks_fit_a_multiprocessor(kernels: list[cubin.Kernel]) -> None:
    for kernel in kernels:
        assert kernel.registers <= MOST_REGISTERS, kernel.name


def test_weights_are_loaded_16_bytes_at_a_time(kernels: list[cubin.Kernel]) -> None:
    """Eight loads of rows and four of x stand in the loop, the rows' without a place in L1."""
    for kernel in kernels:
        wide = {name: count for name, count in kernel.opcodes.items() if re.match(r"LDG\.E\.(NA\.)?128", name)}
        rows = sum(count for name, count in wide.items() if ".NA." in name)
        assert rows >= 8 and rows % 8 == 0, (kernel.name, wide)
        assert sum(wide.values()) - rows >= 4, (kernel.name, wide)


def test_products_are_of_the_tensor_cores(kernels: list[cubin.Kernel]) -> None:
    """Two of 16 k for each of four subtiles and two steps; float32 rows take TF32 products of three pieces."""
    for kernel in kernels:
        assert kernel.count("HMMA.16816.F32.BF16") + kernel.count("HMMA.16816.F32") >= 16, kernel.name
        wide_adapters = kernel.name.endswith("fEEvNS0_12DecodeParamsE")
        assert (kernel.count("HMMA.1688.F32.TF32") >= 48) == wide_adapters, kernel.name


def test_flags_are_acquired_and_released(kernels: list[cubin.Kernel]) -> None:
    for kernel in kernels:
        assert kernel.count("LDG.E.64.STRONG.GPU") > 0, kernel.name
        assert kernel.count("STG.E.64.STRONG.GPU") > 0, kernel.name
        assert kernel.count("MEMBAR") > 0, kernel.name


def test_what_other_blocks_write_is_read_coherently(kernels: list[cubin.Kernel]) -> None:
    """S and partial sums are words; a load marked constant could return older ones."""
    for kernel in kernels:
        assert kernel.count("LDG.E.CONSTANT") == 0, kernel.name
        assert kernel.opcodes["LDG.E"] > 0, kernel.name
