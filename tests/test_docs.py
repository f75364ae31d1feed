"""What the docs show runs, what they list is complete, and where their links lead is something.

Runs examples of docstrings, and each block of Python of the pages below, alone: whoever copies it has nothing else.
"""

from __future__ import annotations

import contextlib
import doctest
import importlib
import io
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import peft_kernels as pk

ROOT = Path(__file__).parents[1]
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in (ROOT / "peft_kernels").rglob("*.py")
    if ">>> " in path.read_text()
)

PAGES = ("README.md", "docs/examples.md", "docs/troubleshooting.md")
# Its blocks go on from one another, and tests/integrations/test_rules.py runs them.
RUN_ELSEWHERE = ("docs/integrations.md",)
# A block, and the output that is shown below it.
BLOCK = re.compile(r"^```python\n(.*?)^```(?:\n\n```text\n(.*?)^```)?", re.DOTALL | re.MULTILINE)
BLOCKS = [
    pytest.param(page, text.count("\n", 0, found.start()) + 1, found[1], found[2], id=f"{page}-{number}")
    for page in PAGES
    for text in [(ROOT / page).read_text()]
    for number, found in enumerate(BLOCK.finditer(text))
]


def documents() -> list[Path]:
    """Markdown files of the repository."""
    found = [
        *ROOT.glob("*.md"),
        *(path for folder in ("docs", "examples", "tests") for path in (ROOT / folder).rglob("*.md")),
    ]
    return sorted(found)


def test_there_are_examples() -> None:
    assert len(MODULES) >= 4
    assert len(BLOCKS) >= 12


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name: str) -> None:
    module = importlib.import_module(name)
    # What the package's users have imported when they read an example.
    names = {**vars(module), "torch": torch, "nn": nn}
    result = doctest.testmod(module, extraglobs=names)
    assert result.attempted and not result.failed


@pytest.mark.parametrize(("page", "line", "block", "output"), BLOCKS)
def test_blocks_run(page: str, line: int, block: str, output: str | None) -> None:
    for library in ("peft", "transformers", "trl", "datasets", "diffusers"):
        if re.search(rf"^(import|from) {library}\b|\.{library}\b", block, re.MULTILINE):
            pytest.importorskip(library)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile("\n" * line + block, str(ROOT / page), "exec"), {"__name__": "__main__"})
    if output is not None:
        assert printed.getvalue() == output


def test_no_block_is_left_out() -> None:
    shown = {str(path.relative_to(ROOT)) for path in documents() if "```python" in path.read_text()}
    assert shown == {*PAGES, *RUN_ELSEWHERE}


def test_every_environment_variable_is_on_the_page() -> None:
    """Found where programs, the build and the compiles ahead of time name them; the rest are macros of C++."""
    folders = [ROOT / name for name in ("peft_kernels", "benchmarks", "examples", "tests/codegen")]
    programs = [path for folder in folders for path in folder.rglob("*.py")]
    named = _variables(*programs, ROOT / "setup.py", ROOT / "Makefile", ROOT / ".ci" / "run")
    macros = _variables(*(path for path in (ROOT / "csrc").rglob("*") if path.is_file()))
    page = (ROOT / "docs" / "environment.md").read_text()
    listed = re.findall(r"^\| `(PEFT_KERNELS_\w+)` \|", page, re.MULTILINE)
    assert sorted(listed) == sorted(named - macros)


def _variables(*paths: Path) -> set[str]:
    return {name for path in paths for name in re.findall(r"PEFT_KERNELS_[A-Z_]*[A-Z]\b", path.read_text())}


def test_every_public_name_is_in_the_reference() -> None:
    text = (ROOT / "docs" / "api.md").read_text()
    listed = re.findall(r"^::: peft_kernels\.(\S+)$", text, re.MULTILINE)
    integrations = {
        f"integrations.{library}.{name}"
        for library in ("adapterhub", "peft", "transformers")
        for name in _exported(ROOT / "peft_kernels" / "integrations" / library / "__init__.py")
    }
    assert len(listed) == len(set(listed))
    assert set(listed) == {*pk.__all__, *integrations, "integrations.Report", "testing"}


def _exported(path: Path) -> list[str]:
    (names,) = re.findall(r"^__all__ = \[(.*?)\]", path.read_text(), re.DOTALL | re.MULTILINE)
    return re.findall(r'"(\w+)"', names)


@pytest.mark.parametrize("path", documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    wrong = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+://|mailto:", target):
            continue
        file, _, anchor = target.partition("#")
        there = (path.parent / file).resolve() if file else path
        if not there.exists() or (anchor and anchor not in _anchors(there)):
            wrong.append(target)
    assert not wrong


def _anchors(path: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_pages_are_in_the_navigation() -> None:
    """mkdocs says so too, where it is installed."""
    config = (ROOT / "mkdocs.yml").read_text()
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert set(re.findall(r"^ +- [^:]+: (\S+\.md)$", config, re.MULTILINE)) == pages


def test_citation_has_the_package_s_version() -> None:
    assert f"\nversion: {pk.__version__}\n" in (ROOT / "CITATION.cff").read_text()
