"""Each family stands on each floor under one name, each operator too. Names come from the tree; checklist:
docs/adding_a_family.md.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import peft_kernels as pk
from peft_kernels._core.operator import OPERATORS as DECLARED
from peft_kernels.four_bit_weight import problem as four_bit_weight

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "peft_kernels"
NO_FAMILIES = {"_core", "integrations", "__pycache__"}

# A file that is missing is named here, instead of making a family invisible to discovery.
FAMILIES = sorted(
    folder.name
    for folder in PACKAGE.iterdir()
    if folder.is_dir() and folder.name not in NO_FAMILIES and any(folder.glob("*.py"))
)

# A family's first operator may stand in the family's own folder; further ones have a folder each.
OPERATORS = sorted(path.parent.relative_to(ROOT) for name in FAMILIES for path in (PACKAGE / name).rglob("problem.py"))

OF_A_FAMILY = (
    "python_ref/{family}.py",
    "peft_kernels/{family}/__init__.py",
    "peft_kernels/{family}/kernels/config.py",
    "peft_kernels/{family}/kernels/triton_fwd.py",
    "peft_kernels/{family}/qualification.py",
    "tests/{family}/cases.py",
    "tests/{family}/test_reference.py",
    "tests/{family}/test_backends.py",
    "tests/{family}/test_op.py",
    "tests/codegen/{family}_launches.py",
    "benchmarks/{family}.py",
    "docs/design/{family}.md",
)
# None of a family whose operators have no gradients.
OF_A_BACKWARD_PASS = ("peft_kernels/{family}/kernels/triton_bwd.py",)
OF_AN_OPERATOR = ("problem.py", "torch_impl.py", "composite.py", "triton_impl.py", "op.py")


def test_there_are_families() -> None:
    assert FAMILIES
    assert {path.parts[1] for path in OPERATORS} == set(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("floor", OF_A_FAMILY)
def test_family_stands_on(floor: str, family: str) -> None:
    path = ROOT / floor.format(family=family)
    assert path.is_file()
    assert path.read_text().strip()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("floor", OF_A_BACKWARD_PASS)
def test_family_with_gradients_stands_on(floor: str, family: str) -> None:
    prefix = f"peft_kernels.{family}."
    declared = [each for each in DECLARED.values() if each.make_problem.__module__.startswith(prefix)]
    assert declared
    path = ROOT / floor.format(family=family)
    assert path.is_file() == any(each.has_gradients for each in declared)


@pytest.mark.parametrize("operator", OPERATORS, ids=str)
@pytest.mark.parametrize("floor", OF_AN_OPERATOR)
def test_operator_stands_on(floor: str, operator: Path) -> None:
    path = ROOT / operator / floor
    assert path.is_file()
    assert path.read_text().strip()


@pytest.mark.parametrize("operator", OPERATORS, ids=str)
def test_cuda_backend_has_both_halves(operator: Path) -> None:
    """A capability record needs kernels to speak for."""
    if (ROOT / operator / "cuda_impl.py").exists():
        assert (ROOT / "csrc" / operator.parts[1] / "bindings.cpp").is_file()


@pytest.mark.parametrize(
    ("pattern", "not_families"),
    [
        ("csrc/*/", {"core"}),
        ("docs/design/*.md", set()),
        ("tests/*/cases.py", set()),
        ("tests/codegen/*_launches.py", set()),
    ],
)
def test_no_floor_has_a_name_of_its_own(pattern: str, not_families: set[str]) -> None:
    """What bears a family's name bears it letter for letter."""
    names = {
        path.parent.name if path.name == "cases.py" else path.stem.removesuffix("_launches")
        for path in ROOT.glob(pattern)
        # Before Python 3.11 a glob for folders finds files too.
        if path.is_dir() == pattern.endswith("/")
    }
    assert names - not_families <= set(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_kernels_are_named_by_what_they_compute(family: str) -> None:
    """The folder says whose they are."""
    text = "".join(path.read_text() for path in (PACKAGE / family / "kernels").glob("*.py"))
    kernels = re.findall(r"^def (\w+_kernel)\(", text, re.MULTILINE)
    assert kernels
    assert not [name for name in kernels if name.startswith(family)]


@pytest.mark.parametrize("package", ["_core", "integrations", *FAMILIES])
def test_every_file_stands_on_its_package_s_map(package: str) -> None:
    folder = PACKAGE / package
    files = {path.name for path in folder.rglob("*.py") if package != "integrations" or path.parent == folder}
    text = (folder / "__init__.py").read_text()
    assert not [name for name in files - {"__init__.py"} if name not in text]


def test_records_bear_operators_names() -> None:
    """A record outlives the folders of its day, so it is named after the public function that it timed."""
    names = {path.stem for path in ROOT.glob("benchmarks/results/*/*.jsonl")}
    assert all(callable(getattr(pk, name, None)) or name == four_bit_weight.NAME for name in names)
