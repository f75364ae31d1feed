"""Host-side questions about the extension's kernels: where they run, what they can read 16 bytes at a time."""

from __future__ import annotations

import pytest
import torch

from peft_kernels._core import cuda_tools, extension
from peft_kernels._core.device import Hardware

CUDA = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("arch", "archs", "ptx", "runs"),
    [
        (80, ("80",), None, True),
        (86, ("80",), None, True),  # a later minor version
        (80, ("86",), None, False),  # an earlier one
        (90, ("80", "89"), None, False),  # another major version
        (90, ("80", "90a"), None, True),
        (90, ("90",), None, True),
        (100, ("90a",), None, False),
        (103, ("100",), None, True),
        (103, ("100a",), None, False),
        (120, ("80", "90a", "100"), None, False),
        (120, ("80", "90a", "100"), "100", True),  # by the driver's compiler
        (75, ("80",), "80", False),
    ],
)
def test_runs_on(arch: int, archs: tuple[str, ...], ptx: str | None, runs: bool) -> None:
    assert cuda_tools.runs_on(arch, archs, ptx) == runs


@pytest.fixture
def present(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An extension built for sm_80 and sm_90a, and a device of sm_90."""
    monkeypatch.setattr(extension, "why_not", lambda: None)
    monkeypatch.setattr(extension, "build_record", lambda: {"archs": ["80", "90a"], "ptx": None})
    monkeypatch.setattr(cuda_tools, "hardware", lambda device: Hardware(arch=90, sm_count=132))
    cuda_tools._why_not_compiled.cache_clear()
    yield monkeypatch
    cuda_tools._why_not_compiled.cache_clear()


def test_where_kernels_run(present: pytest.MonkeyPatch) -> None:
    assert cuda_tools.why_not_device(CUDA, 80) is None
    assert "got tensors on cpu" in (cuda_tools.why_not_device(torch.device("cpu"), 80) or "")
    assert cuda_tools.why_not_device(CUDA, 100) == "it needs sm_100 or newer, got sm_90"
    present.setattr(cuda_tools, "hardware", lambda device: Hardware(arch=100, sm_count=148))
    assert cuda_tools.why_not_device(CUDA, 80) == (
        'the extension was built for sm_80, sm_90a, this is sm_100; PEFT_KERNELS_CUDA_ARCHS="100" builds it for that'
    )
    present.setattr(extension, "why_not", lambda: "it was never built")
    assert cuda_tools.why_not_device(CUDA, 80) == "it was never built"


def test_unreadable_record_is_a_reason(present: pytest.MonkeyPatch) -> None:
    def unreadable() -> None:
        raise ValueError("no JSON")

    present.setattr(extension, "build_record", unreadable)
    assert "its build record is unreadable (no JSON)" in (cuda_tools.why_not_device(CUDA, 80) or "")


def test_rows_aligned() -> None:
    rows = torch.zeros(6, 32, dtype=torch.bfloat16)
    assert cuda_tools.rows_aligned(rows, rows[:, :16], rows[:1], rows.view(2, 3, 32), rows[:1].expand(4, 32), rows[0])
    flat = torch.zeros(200, dtype=torch.bfloat16)
    for wrong in (
        rows.t(),
        rows[:, ::2],
        rows[:, 1:17],
        flat[1:193].view(6, 32),
        flat[:180].view(6, 30),
        flat.as_strided((4, 8), (9, 1)),
    ):
        assert not cuda_tools.rows_aligned(rows, wrong)
    # Of one row the stride is nobody's.
    assert cuda_tools.rows_aligned(flat.as_strided((1, 8), (9, 1)), flat.as_strided((2, 1, 8), (16, 9, 1)))
    assert cuda_tools.rows_aligned(torch.zeros(3, 4)) and not cuda_tools.rows_aligned(torch.zeros(3, 6))
