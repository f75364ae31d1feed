"""Each family stands on each floor under one name. Families come from the tree; checklist: docs/adding_a_family.md."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "peft_kernels"
NO_ROOMS = {"_core", "integrations", "__pycache__"}

# A room has all of its files: one that is missing is named here, instead of making the family invisible to discovery.
FAMILIES = sorted(
    folder.name
    for folder in PACKAGE.iterdir()
    if folder.is_dir() and folder.name not in NO_ROOMS and any(folder.glob("*.py"))
)

FLOORS = (
    "python_ref/{family}.py",
    "peft_kernels/{family}/__init__.py",
    "peft_kernels/{family}/problem.py",
    "peft_kernels/{family}/config.py",
    "peft_kernels/{family}/torch_impl.py",
    "peft_kernels/{family}/triton_fwd.py",
    "peft_kernels/{family}/triton_bwd.py",
    "peft_kernels/{family}/triton_impl.py",
    "peft_kernels/{family}/op.py",
    "tests/{family}/cases.py",
    "tests/{family}/test_reference.py",
    "tests/{family}/test_backends.py",
    "tests/{family}/test_op.py",
    "benchmarks/{family}.py",
    "docs/design/{family}.md",
)


def test_there_are_families() -> None:
    assert FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("floor", FLOORS)
def test_family_stands_on(floor: str, family: str) -> None:
    path = ROOT / floor.format(family=family)
    assert path.is_file()
    assert path.read_text().strip()


@pytest.mark.parametrize("family", FAMILIES)
def test_cuda_backend_has_both_halves(family: str) -> None:
    """A capability record needs kernels to speak for."""
    if (PACKAGE / family / "cuda_impl.py").exists():
        assert (ROOT / "csrc" / family / "bindings.cpp").is_file()


@pytest.mark.parametrize(
    ("pattern", "not_families"),
    [
        ("csrc/*/", {"core"}),
        ("docs/design/*.md", set()),
        ("tests/*/cases.py", set()),
        ("benchmarks/results/*/*.jsonl", set()),
    ],
)
def test_no_floor_has_a_name_of_its_own(pattern: str, not_families: set[str]) -> None:
    """What bears a family's name bears it letter for letter."""
    names = {path.parent.name if path.name == "cases.py" else path.stem for path in ROOT.glob(pattern)}
    assert names - not_families <= set(FAMILIES)
