"""Rules of eligibility: each is asked, nothing else is answered, and docs/integrations.md has them all."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("peft")
pytest.importorskip("transformers")

from peft_kernels.integrations import rules

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "integrations.md"
FILES = ("peft.layers", "peft.prompts", "peft.prefixes", "transformers.prefix_model")


def _module(file: str) -> ModuleType:
    return importlib.import_module(f"peft_kernels.integrations.{file}")


def test_the_documentation_is_up_to_date() -> None:
    text = DOCUMENT.read_text()
    assert rules.with_tables(text) == text, "python -m peft_kernels.integrations.rules docs/integrations.md"


def test_the_documentation_s_python_runs() -> None:
    names: dict[str, object] = {}
    blocks = re.findall(r"^```python\n(.*?)^```", DOCUMENT.read_text(), re.DOTALL | re.MULTILINE)
    assert len(blocks) == 3
    for block in blocks:
        exec(compile(block, str(DOCUMENT), "exec"), names)


@pytest.mark.parametrize("file", FILES)
def test_every_rule_is_asked_and_listed(file: str) -> None:
    module = _module(file)
    named = {name: rule for name, rule in vars(module).items() if isinstance(rule, rules.Rule)}
    assert set(named.values()) == set(module.SUPPORT.rules)
    called = [node.func.id for node in _calls(ast.parse(inspect.getsource(module)))]
    assert {name for name in named if called.count(name) == 1} == set(named)


@pytest.mark.parametrize("file", FILES)
def test_every_reason_is_a_rule(file: str) -> None:
    """A function that says why not returns a rule's text, None, "" for a stranger, or another's answer."""
    checked = 0
    for function in ast.walk(ast.parse(inspect.getsource(_module(file)))):
        if not isinstance(function, ast.FunctionDef) or "why_not" not in function.name:
            continue
        for node in ast.walk(function):
            if isinstance(node, ast.Return) and node.value is not None:
                checked += 1
                assert _is_allowed(node.value), ast.unparse(node)
    assert checked


def _calls(tree: ast.AST) -> list[ast.Call]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]


def _is_allowed(value: ast.expr) -> bool:
    if isinstance(value, ast.Constant):
        return value.value in (None, "")
    if isinstance(value, ast.Name):
        return value.id == "reason"
    name = ast.unparse(value.func) if isinstance(value, ast.Call) else ""
    return name.isupper() or "why_not" in name


def test_values_and_cases() -> None:
    rule = rules.Rule("a case", "it is {thing}, not {other}")
    assert rule(thing=1, other="2") == "it is 1, not 2"
    table = rules._table(rules.Support("Title", ("this",), (rule,)))
    assert table.splitlines()[4:] == ["| this | fused |", "| a case | `it is <thing>, not <other>` |"]
