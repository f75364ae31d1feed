"""Rules of eligibility: each is asked, and nothing else is answered. Reads the source, which needs no AdapterHub."""

from __future__ import annotations

import ast
from pathlib import Path

import peft_kernels
from peft_kernels.integrations.adapterhub import rules as adapterhub_rules
from peft_kernels.integrations.rules import Rule

_SOURCE = Path(peft_kernels.__file__).parent / "integrations" / "adapterhub" / "layers.py"
_RULES = {name: rule for name, rule in vars(adapterhub_rules).items() if isinstance(rule, Rule)}


def test_every_rule_is_asked_once_and_listed() -> None:
    assert tuple(_RULES.values()) == adapterhub_rules.SUPPORT.rules
    calls = [node.func for node in ast.walk(ast.parse(_SOURCE.read_text())) if isinstance(node, ast.Call)]
    names = [function.id for function in calls if isinstance(function, ast.Name)]
    assert {name: names.count(name) for name in _RULES} == dict.fromkeys(_RULES, 1)


def test_every_reason_is_a_rule() -> None:
    """A function that says why not returns a rule's text, None, "" for what is no adapter, or another's answer."""
    answers = [
        node.value
        for function in ast.walk(ast.parse(_SOURCE.read_text()))
        if isinstance(function, ast.FunctionDef) and "why_not" in function.name
        for node in ast.walk(function)
        if isinstance(node, ast.Return)
    ]
    asked = [ast.unparse(answer.func) for answer in answers if isinstance(answer, ast.Call)]
    assert {name for name in asked if name not in _RULES} <= {
        "_why_not_adapter",
        "_why_not_modules",
        "_why_not_dtypes",
    }
    assert {ast.unparse(answer) for answer in answers if not isinstance(answer, ast.Call)} == {"None", "''"}
