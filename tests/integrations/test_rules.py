"""Rules of eligibility: each is asked, nothing else is answered, and docs/integrations.md has them all.

The source is read, which needs no AdapterHub.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("peft")
pytest.importorskip("transformers")

from peft_kernels.integrations import rules

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "integrations.md"
INTEGRATIONS = ROOT / "peft_kernels" / "integrations"
SOURCES = {
    str(path.relative_to(INTEGRATIONS)): ast.parse(path.read_text())
    for path in sorted(INTEGRATIONS.rglob("*.py"))
    if path != INTEGRATIONS / "rules.py"
}


def _calls(file: str) -> list[str]:
    return [ast.unparse(node.func) for node in ast.walk(SOURCES[file]) if isinstance(node, ast.Call)]


def _functions(file: str) -> list[ast.FunctionDef]:
    nodes = ast.walk(SOURCES[file])
    return [node for node in nodes if isinstance(node, ast.FunctionDef) and "why_not" in node.name]


WITH_RULES = [file for file in SOURCES if "Support" in _calls(file)]
DECIDING = [file for file in SOURCES if _functions(file)]


def test_the_documentation_is_up_to_date() -> None:
    text = DOCUMENT.read_text()
    assert rules.with_tables(text) == text, "python -m peft_kernels.integrations.rules docs/integrations.md"


def test_the_documentation_s_python_runs() -> None:
    names: dict[str, object] = {}
    blocks = re.findall(r"^```python\n(.*?)^```", DOCUMENT.read_text(), re.DOTALL | re.MULTILINE)
    assert len(blocks) == 8
    for block in blocks:
        exec(compile(block, str(DOCUMENT), "exec"), names)


def test_every_rule_is_in_the_documentation() -> None:
    """A rule is made by its table alone, and there are as many tables and rows as are made."""
    made = Counter(call for file in SOURCES for call in _calls(file))
    assert not made["Rule"] + made["rules.Rule"] + made["rules.Support"]
    rows = [line for line in rules.support_table().splitlines() if line.endswith("` |")]
    assert len(rows) == sum(count for call, count in made.items() if call.endswith(".rule"))
    assert rules.support_table().count("### ") == made["Support"] == len(WITH_RULES)


@pytest.mark.parametrize("file", WITH_RULES)
def test_every_rule_is_asked_once(file: str) -> None:
    """In its own file by its name, in others of the folder by the file's too."""
    folder, stem = Path(file).parent, Path(file).stem
    asked = _calls(file) + [
        call.removeprefix(f"{stem}.")
        for other in SOURCES
        if Path(other).parent == folder
        for call in _calls(other)
        if call.startswith(f"{stem}.")
    ]
    named = [
        ast.unparse(node.targets[0])
        for node in SOURCES[file].body
        if isinstance(node, ast.Assign) and ast.unparse(node.value).startswith("SUPPORT.rule(")
    ]
    assert {name: asked.count(name) for name in named} == dict.fromkeys(named, 1)
    assert len(named) == asked.count("SUPPORT.rule") >= 1


@pytest.mark.parametrize("file", DECIDING)
def test_every_reason_is_a_rule(file: str) -> None:
    """A function that says why not returns a rule's text, None, or another's answer."""
    answers = [node for function in _functions(file) for node in ast.walk(function) if isinstance(node, ast.Return)]
    assert answers
    for answer in answers:
        assert answer.value is None or _is_allowed(answer.value), ast.unparse(answer)


def _is_allowed(value: ast.expr) -> bool:
    if isinstance(value, ast.IfExp):
        return _is_allowed(value.body) and _is_allowed(value.orelse)
    if isinstance(value, ast.BoolOp):
        return all(map(_is_allowed, value.values))
    if isinstance(value, ast.Name):
        return value.id == "reason"
    if isinstance(value, ast.Constant):
        return value.value is None
    name = ast.unparse(value.func) if isinstance(value, ast.Call) else ""
    return name.removeprefix("rules.").isupper() or "why_not" in name


def test_values_and_cases() -> None:
    support = rules.Support("Title", ("this",))
    rule = support.rule("a case", "it is {thing}, not {other}")
    assert rule(thing=1, other="2") == "it is 1, not 2"
    assert rules._table(support).splitlines()[4:] == ["| this | fused |", "| a case | `it is <thing>, not <other>` |"]
