"""What the Hopper kernels and the emulator believe of operands, fragments and tensor maps is what CuTe says."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from peft_kernels._core import extension
from tests.codegen import cubin
from tests.simt import build
from tests.witness import cute

pytestmark = [pytest.mark.cpu_only, pytest.mark.thorough]

ARCH = "90a"


@pytest.fixture(scope="module")
def operands(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return cute.lines(tmp_path_factory.mktemp("operands"), "cute_operands.cpp", f"-I{build.EMULATOR}")


def _compared(lines: list[str]) -> list[str]:
    """What a program compared, after a look that it prints nothing else than that all is the same."""
    verdicts = [line.split(" ", 1) for line in lines if not line.startswith("config ")]
    assert not [line for line in lines if line.startswith("differs ")]
    assert {verdict for verdict, _ in verdicts} == {"same"}, verdicts
    return [what for _, what in verdicts]


def test_operands_and_accumulators(operands: list[str]) -> None:
    """Descriptors and their steps along k, every element's address, boxes whole and halved, products, swizzles."""
    compared = _compared(operands)
    assert len(compared) == len(set(compared))
    kinds = Counter(re.sub(r" (of )?\d+x.*", "", what) for what in compared)
    tiles = kinds["descriptors"]
    assert tiles >= 20
    assert {kinds[kind] for kind in ("elements", "boxes", "half boxes")} == {tiles}
    assert kinds["accumulators"] >= 15
    assert {"swizzles", *(f"operand in registers of 64x{ranks}" for ranks in (16, 32, 64, 128))} <= set(compared)
    for columns in (128, 192, 256):
        for suffix in ("", " transposed"):
            assert {f"descriptors of {columns}x64 128{suffix}", f"accumulators of {columns}x64 128{suffix}"} <= set(
                compared
            )


def test_every_kernel_has_its_tiles_compared(operands: list[str]) -> None:
    """Tiles follow from a kernel's template arguments, so that a new one must be among those of the program."""
    if extension.why_not_importable() is None and ARCH not in extension.load().build_info()["archs"]:
        pytest.skip(f"the extension was not built for sm_{ARCH}")
    filter_names = shutil.which("c++filt")
    assert filter_names is not None, "g++ is here, but c++filt, of the same binutils as its linker, is not on PATH"
    mangled = "\n".join(kernel.name for kernel in cubin.kernels(ARCH, "sm90_kernel"))
    names = subprocess.run([filter_names], input=mangled, capture_output=True, text=True, check=True).stdout
    built = {match[1] for match in re.finditer(r"gemm_sm90_kernel<(.*?>) ?>", names)}
    built |= {f"adapter {match[1]}" for match in re.finditer(r"forward_sm90_kernel<.*, (\d+)>", names)}
    assert len(built) >= 18
    assert built == {line.removeprefix("config ") for line in operands if line.startswith("config ")}


def test_tensor_maps(tmp_path: Path) -> None:
    """Every argument of cuTensorMapEncodeTiled but a hint, from the launchers' own functions."""
    flags = (
        "-DCUTLASS_ENABLE_DIRECT_CUDA_DRIVER_CALL=1",
        # CuTe makes tensor maps for nvcc of CUDA 12 and newer alone.
        "-D__CUDACC_VER_MAJOR__=13",
        "-D__CUDACC_VER_MINOR__=0",
        "-Wno-unused-parameter",
        "-Wno-unused-variable",
        # Launchers, which call CUDA's runtime, are compiled but not kept.
        "-ffunction-sections",
        "-Wl,--gc-sections",
    )
    compared = Counter(_compared(cute.lines(tmp_path, "cute_tensor_maps.cpp", *flags)))
    of = Counter(what.split(":")[0] for what in compared.elements())
    for direction in ("forward", "backward"):
        assert [of[f"gemm {direction} {name}"] for name in ("x", "w", "down", "up", "s_half", "y")] == [4] * 6
    adapter = [of[f"adapter {name}"] for name in ("x", "down_weight", "up_weight", "residual", "y")]
    assert adapter == [2] * 5
    assert of["half of w"] == 6
