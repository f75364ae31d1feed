"""Machine code of the decode kernels, for every architecture that the extension was built for."""

from __future__ import annotations

import re

import pytest

from tests.codegen import cubin, loops

pytestmark = pytest.mark.cpu_only

# Of one adapter, and of one for each token.
PATTERNS = (r"4lora.*decode_kernelI", r"4lora.*decode_rows_kernelI")
ARCHS = ("80", "86", "89", "90a", "100")
# __launch_bounds__(256, 2) leaves each thread 128 of a multiprocessor's 65536 registers.
MOST_REGISTERS = 65536 // (2 * 256)
HALVES = "HMMA.16816"
# steps_ahead in csrc/lora/decode_config.h, by tokens.
STEPS_AHEAD = {8: 4, 16: 3}
# Bytes of W to a multiprocessor, by tokens. 4.3 TB/s at 0.8 us ask for 26 KiB. For 16 tokens it would be 64 KiB if the
# compiler did not sink some loads below products that they could stand above.
UNDER_WAY = {8: 64 * 1024, 16: 32 * 1024}


@pytest.fixture(scope="module", params=[(arch, pattern) for pattern in PATTERNS for arch in ARCHS], ids="-".join)
def kernels(request: pytest.FixtureRequest) -> list[cubin.Kernel]:
    """bf16 and fp16, with adapters of that dtype and with float32 ones, for 8 tokens and for 16."""
    found = cubin.kernels(*request.param)
    assert len(found) == 8
    return found


def test_nothing_is_spilled(kernels: list[cubin.Kernel]) -> None:
    for kernel in kernels:
        assert (kernel.stack, kernel.local, kernel.count("LDL"), kernel.count("STL")) == (0, 0, 0, 0), kernel.name


def test_two_blocks_fit_a_multiprocessor(kernels: list[cubin.Kernel]) -> None:
    for kernel in kernels:
        assert kernel.registers <= MOST_REGISTERS, kernel.name


def test_weights_are_loaded_16_bytes_at_a_time(kernels: list[cubin.Kernel]) -> None:
    """For each step four loads of rows, without a place in L1, and one of x for each 8 tokens."""
    for kernel in kernels:
        wide = {name: count for name, count in kernel.opcodes.items() if re.match(r"LDG\.E\.(NA\.)?128", name)}
        rows = sum(count for name, count in wide.items() if ".NA." in name)
        assert rows >= 4 * STEPS_AHEAD[_tokens(kernel)] and rows % 4 == 0, (kernel.name, wide)
        assert sum(wide.values()) - rows >= _tokens(kernel) // 8, (kernel.name, wide)


def test_products_are_of_the_tensor_cores(kernels: list[cubin.Kernel]) -> None:
    """For each step two of 16 k and each 16 rows by 8 tokens; float32 rows take TF32 products of three pieces."""
    for kernel in kernels:
        steps = STEPS_AHEAD[_tokens(kernel)]
        products = 2 * 2 * _tokens(kernel) // 8
        assert kernel.count("HMMA.16816.F32.BF16") + kernel.count("HMMA.16816.F32") >= steps * products, kernel.name
        assert (kernel.count("HMMA.1688.F32.TF32") >= 6 * products) == _has_wide_adapters(kernel), kernel.name


def test_next_rows_are_under_way_while_rows_are_multiplied(kernels: list[cubin.Kernel]) -> None:
    """In the loop over W, at every product: loads that were asked for and that nothing has waited for yet."""
    for kernel in kernels:
        bodies = [loop for loop in loops.loops(kernel.code) if any(one.name.startswith(HALVES) for one in loop)]
        inner = min(bodies, key=len)
        under_way = loops.loads_under_way(inner, "LDG.E.NA.128", HALVES)
        assert len(under_way) >= 16, kernel.name
        # 16 warps of 32 lanes with 16 bytes each.
        assert min(under_way) * 16 * 32 * 16 >= UNDER_WAY[_tokens(kernel)], (kernel.name, under_way)


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


def _tokens(kernel: cubin.Kernel) -> int:
    match = re.search(r"Li(\d+)EEEvNS0_\d+Decode(Rows)?ParamsE$", kernel.name)
    assert match, kernel.name
    return int(match[1])


def _has_wide_adapters(kernel: cubin.Kernel) -> bool:
    return re.search(r"fLi\d+EEEvNS0_\d+Decode(Rows)?ParamsE$", kernel.name) is not None
