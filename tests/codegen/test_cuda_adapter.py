"""Machine code of the bottleneck adapter's kernel for Hopper, in the extension as it was built."""

from __future__ import annotations

import pytest

from tests.codegen import cubin

pytestmark = pytest.mark.cpu_only

BF16, FP16 = 0, 1  # sm90::HalfType


@pytest.fixture(scope="module", params=[(half, width) for half in (BF16, FP16) for width in (64, 128)], ids=str)
def kernel(request: pytest.FixtureRequest) -> tuple[int, cubin.Kernel]:
    half, width = request.param
    (found,) = cubin.kernels("90a", rf"7adapter.*forward_sm90_kernel.*HalfTypeE{half}ELi{width}E")
    return width, found


def test_nothing_is_spilled(kernel: tuple[int, cubin.Kernel]) -> None:
    _, code = kernel
    assert (code.stack, code.local, code.count("LDL"), code.count("STL")) == (0, 0, 0, 0)


def test_registers(kernel: tuple[int, cubin.Kernel]) -> None:
    """Two blocks would fit a multiprocessor with any number; these are what the products and their operands need."""
    width, code = kernel
    assert code.registers <= {64: 128, 128: 168}[width]


def test_products_are_of_the_tensor_cores(kernel: tuple[int, cubin.Kernel]) -> None:
    """One for each 16 columns of h, and four in each copy of the loop over chunks of x."""
    width, code = kernel
    down = code.count("HGMMA") - width // 16
    assert down > 0 and down % 4 == 0
    assert code.count("HMMA") == 0


def test_matrices_move_by_the_copy_engine(kernel: tuple[int, cubin.Kernel]) -> None:
    """What is loaded and stored otherwise is biases, the scale, and z."""
    _, code = kernel
    assert code.count("UTMALDG") > 0 and code.count("UTMASTG") == 1
    assert all(name in ("LDG.E.U16", "LDG.E.U16.CONSTANT", "LDG.E", "LDG.E.CONSTANT") for name in _named(code, "LDG"))
    assert set(_named(code, "STG")) == {"STG.E"}


def test_the_cluster_meets_twice(kernel: tuple[int, cubin.Kernel]) -> None:
    _, code = kernel
    assert (code.count("UCGABAR_ARV"), code.count("UCGABAR_WAIT")) == (2, 2)


def test_peers_are_read_and_written_in_wide_pieces(kernel: tuple[int, cubin.Kernel]) -> None:
    """Shared memory of another block is reached by generic addresses: partial sums in 16 bytes, h in 8."""
    _, code = kernel
    assert code.count("LD") == code.opcodes["LD.E.128"] >= 8
    assert code.count("ST") == code.opcodes["ST.E.64"] > 0


def test_stores_are_published_to_the_copy_engine(kernel: tuple[int, cubin.Kernel]) -> None:
    _, code = kernel
    assert code.count("FENCE.VIEW.ASYNC.S") > 0


def _named(code: cubin.Kernel, prefix: str) -> list[str]:
    return [name for name in code.opcodes if name == prefix or name.startswith(f"{prefix}.")]
