"""Machine code of the reduce kernel, for every architecture that the extension was built for."""

from __future__ import annotations

import re

import pytest

from tests.codegen import cubin

pytestmark = pytest.mark.cpu_only

PATTERN = r"4lora.*reduce_rows_kernelI"
ARCHS = ("80", "86", "89", "90a", "100")
REGISTERS = 65536 // 256  # of a thread, where a block of 256 has a multiprocessor to itself


@pytest.fixture(scope="module", params=ARCHS)
def kernels(request: pytest.FixtureRequest) -> list[cubin.Kernel]:
    """bf16 and fp16: ranks up to 32, and up to 128; with dS; with float32 adapters."""
    arch = request.param
    found = cubin.kernels(arch, PATTERN)
    assert len(found) == 8
    return found


def test_nothing_is_spilled(kernels: list[cubin.Kernel]) -> None:
    for kernel in kernels:
        assert (kernel.stack, kernel.local, kernel.count("LDL"), kernel.count("STL")) == (0, 0, 0, 0), kernel.name


def test_blocks_fit_a_multiprocessor(kernels: list[cubin.Kernel]) -> None:
    """Two of low ranks, which keep as many copies under way as one of high ranks."""
    for kernel in kernels:
        ranks, exact, narrow = _config(kernel)
        most = REGISTERS // 2 if ranks == 32 and not exact and not narrow else REGISTERS - 1
        assert kernel.registers <= most, kernel.name


def test_rows_are_copied_past_the_registers(kernels: list[cubin.Kernel]) -> None:
    """x's rows of a chunk, four or two a warp, and S's, before the loop and in it."""
    for kernel in kernels:
        rows = 2 if _config(kernel)[0] == 128 else 4
        vectors = sum(count for name, count in kernel.opcodes.items() if re.match(r"LDGSTS.*\.128", name))
        assert vectors >= 2 * (rows + 1), (kernel.name, vectors)
        assert kernel.count("LDGDEPBAR") >= 2, kernel.name


def test_products_are_of_the_tensor_cores(kernels: list[cubin.Kernel]) -> None:
    """For each 16 rows of a chunk and 16 columns of the warp one of 16 x 8 for each 8 ranks, and one for dbias."""
    for kernel in kernels:
        ranks, exact, narrow = _config(kernel)
        steps = 1 if ranks == 128 else 2
        halves = kernel.count("HMMA.16816.F32.BF16") + kernel.count("HMMA.16816.F32")
        tf32 = kernel.count("HMMA.1688.F32.TF32")
        if exact:
            assert tf32 >= 6 * (steps * 2 * ranks // 8 + 16) and halves >= steps * 2, (kernel.name, tf32, halves)
        else:
            assert tf32 == 0 and halves >= steps * 2 * (ranks // 8 + 1) + 16 * narrow, (kernel.name, halves)


def test_rows_are_transposed_on_their_way(kernels: list[cubin.Kernel]) -> None:
    for kernel in kernels:
        assert kernel.count("LDSM.16.MT88.4") >= 2, kernel.name
        assert kernel.count("LDSM.16.M88.4") >= 16 * _config(kernel)[2], kernel.name


def test_tickets_are_acquired_and_released(kernels: list[cubin.Kernel]) -> None:
    for kernel in kernels:
        assert kernel.count("ATOMG.E.CAS.64.STRONG.GPU") + kernel.count("ATOM.E.CAS.64.STRONG.GPU") >= 1, kernel.name
        assert kernel.count("MEMBAR") >= 1, kernel.name


def test_what_other_blocks_write_is_read_coherently(kernels: list[cubin.Kernel]) -> None:
    """Partial sums are vectors of four; a load marked constant could return older ones."""
    for kernel in kernels:
        assert not any(re.match(r"LDG.*128.*CONSTANT", name) for name in kernel.opcodes), kernel.name
        assert kernel.opcodes["LDG.E.128"] > 0, kernel.name


def _config(kernel: cubin.Kernel) -> tuple[int, bool, bool]:
    """Ranks, whether float32 adapters are exact, whether dS can be made."""
    match = re.search(r"Li(32|128)ELb([01])ELb([01])E", kernel.name)
    assert match is not None, kernel.name
    return int(match[1]), match[2] == "1", match[3] == "1"
