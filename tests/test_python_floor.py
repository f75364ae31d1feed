"""Every file is one for the oldest Python that pyproject.toml promises, and for the newer ones.

Grammar is asked of the parser here, everywhere; bytecode and the standard library's names are asked of those
interpreters themselves, where they are on PATH. None of it needs torch.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import floor_probe

ROOT = Path(__file__).parents[1]
FOLDERS = ("peft_kernels", "python_ref", "benchmarks", "examples", "tests")
FILES = sorted([*ROOT.glob("*.py"), *(path for name in FOLDERS for path in (ROOT / name).rglob("*.py"))])

OLDEST = (3, 10)
PYTHONS = ((3, 10), (3, 11), (3, 12), (3, 13), (3, 14))


def test_the_oldest_is_what_is_promised() -> None:
    """In one place each: for pip, for ruff, which then refuses newer grammar, and here."""
    text = (ROOT / "pyproject.toml").read_text()
    assert f'requires-python = ">={OLDEST[0]}.{OLDEST[1]}"' in text
    assert f'target-version = "py{OLDEST[0]}{OLDEST[1]}"' in text
    classified = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', text)
    assert [tuple(map(int, version.split("."))) for version in classified] == [v for v in PYTHONS if v < (3, 14)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_grammar(path: Path) -> None:
    ast.parse(path.read_text(), str(path), feature_version=OLDEST)


def test_the_parser_refuses_what_is_newer() -> None:
    with pytest.raises(SyntaxError, match=r"only supported in Python 3\.11|invalid syntax"):
        ast.parse("try:\n    pass\nexcept* ValueError:\n    pass", feature_version=OLDEST)


@pytest.mark.parametrize("version", PYTHONS, ids=lambda version: f"{version[0]}.{version[1]}")
def test_in_that_python(version: tuple[int, int]) -> None:
    command = f"python{version[0]}.{version[1]}"
    python = sys.executable if sys.version_info[:2] == version else shutil.which(command)
    if python is None:
        pytest.skip(f"there is no {command} on PATH")
    result = subprocess.run(
        [python, "-I", ROOT / "tests" / "floor_probe.py"],
        input=json.dumps([sorted(sys.stdlib_module_names), [str(path) for path in FILES]]),
        capture_output=True,
        text=True,
        check=False,
        # Where the command is pyenv's, which asks this for the version.
        env={**os.environ, "PYENV_VERSION": command.removeprefix("python")},
    )
    if result.returncode == 127 and not result.stdout:
        pytest.skip(f"{command} is a launcher that has no such version: {result.stderr.splitlines()[0]}")
    assert result.returncode == 0, result.stderr
    found, missing = json.loads(result.stdout)
    assert tuple(found) == version
    assert not missing


def test_the_probe_finds_what_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "file.py"
    path.write_text(
        "import os.path, json as j, absent, stranger\nfrom typing import Any, Nothing\nfrom os import path\n"
        "os.path\nos.nothing\nj.loads\nj.none\nstranger.x\n"
    )
    found = list(floor_probe.missing(str(path), {"os", "json", "typing", "absent"}))
    assert [line.rpartition(": ")[2] for line in found] == ["absent", "typing.Nothing", "os.nothing", "json.none"]
    path.write_text("x = (\n")
    (line,) = floor_probe.missing(str(path), ())
    assert line.startswith(f"{path}:1: ")
