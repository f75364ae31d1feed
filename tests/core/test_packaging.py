"""What the package says of itself, and that what checks it in three places checks the same."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

tomllib = pytest.importorskip("tomllib", reason="Python has it since 3.11")

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.cpu_only


@pytest.fixture
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pinned() -> dict[str, str]:
    """The newest version of each package that this Python's tests run with."""
    lines = "".join(
        (ROOT / "requirements" / name).read_text() for name in ("constraints.txt", "torch.txt")
    ).splitlines()
    each = [Requirement(line) for line in lines if not line.startswith("#")]
    return {
        canonicalize_name(one.name): max((part.version for part in one.specifier), key=Version)
        for one in each
        if one.marker is None or one.marker.evaluate()
    }


def requirements(project: dict) -> list[Requirement]:
    """All that is asked for."""
    asked = [*project["dependencies"], *(each for extra in project["optional-dependencies"].values() for each in extra)]
    return [Requirement(each) for each in asked]


def test_every_requirement_has_a_version_that_the_tests_run_with(project: dict) -> None:
    versions = pinned()
    for requirement in requirements(project):
        assert {part.operator for part in requirement.specifier} & {">=", "=="}, requirement.name
        assert requirement.specifier.contains(versions[canonicalize_name(requirement.name)]), requirement.name


def test_the_least_releases_are_those_that_errors_name_and_that_are_tested(project: dict) -> None:
    from peft_kernels.integrations import versions

    least = {
        each.name: part.version for each in requirements(project) for part in each.specifier if part.operator == ">="
    }
    tested = {name: (ROOT / "requirements" / f"{name}.txt").read_text() for name in ("oldest", "oldest-constraints")}
    for library in ("peft", "transformers"):
        assert versions.OLDEST[library] == least[library]
        for name, text in tested.items():
            assert f"\n{library}=={least[library]}.0\n" in text, name


def test_metadata(project: dict) -> None:
    assert project["authors"] and project["license"] == "Apache-2.0"
    assert len(set(project["classifiers"])) == len(project["classifiers"])
    # None is known that exists.
    assert "urls" not in project
    assert (ROOT / project["readme"]).is_file() and all((ROOT / name).is_file() for name in project["license-files"])


def test_the_source_distribution_has_what_it_names() -> None:
    for line in (ROOT / "MANIFEST.in").read_text().splitlines():
        kind, *names = line.split()
        if kind != "global-exclude":
            assert all((ROOT / name).exists() for name in names), line


def test_hooks_and_lint_check_the_same_files() -> None:
    """pre-commit by a pattern, the Makefile by what it finds."""
    if shutil.which("make") is None or shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("this test runs in a repository, with git and make")
    config = (ROOT / ".pre-commit-config.yaml").read_text()
    (pattern,) = re.findall(r"id: clang-format\n(?:.*\n)*?        files: (\S+)\n", config)
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    command = [
        "make",
        "--silent",
        "--eval=print-sources: ; @echo $(CSRC) $(EMULATOR)",
        "print-sources",
        "PYTHON=python3",
    ]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert {path for path in tracked if re.search(pattern, path)} == set(found) & set(tracked)
    lint = (ROOT / "Makefile").read_text().partition("\nlint:")[2].partition("\n\n")[0]
    assert re.findall(r"mypy ([\w ]+)", lint) == re.findall(r"mypy ([\w ]+)", config)


def test_the_workflow_calls_what_developers_call() -> None:
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    expected = [".ci/run", "make thorough", "make codegen", "make ${{ matrix.target }}", "make quick"]
    assert re.findall(r"- run: (.*)", workflow) == expected
    (targets,), (pythons,) = (re.findall(rf"{name}: \[(.*)\]\n", workflow) for name in ("target", "python"))
    makefile = (ROOT / "Makefile").read_text()
    assert all(f"\n{target}: " in makefile for target in targets.split(", "))
    promised = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', (ROOT / "pyproject.toml").read_text())
    assert sorted([*(version.strip('"') for version in pythons.split(", ")), "3.11"]) == promised
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o100
