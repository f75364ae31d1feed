"""What an attention module's forward does with its keys and values, as its source says.

A prefix is joined inside the attention function, behind whatever forward does to the keys and values of a cache. So
they must arrive there as the cache's update returned them, in every layer.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

_INTERFACE = "ALL_ATTENTION_FUNCTIONS"
# What the attention function here understands, or may ignore: tokens' positions, and what masks say already.
_UNDERSTOOD = {
    "attention_mask", "dropout", "is_causal", "output_attentions", "position_ids", "scaling", "sliding_window",
    "softcap",
}  # fmt: skip


def hands_over_its_own(module: nn.Module) -> bool:
    """Whether the keys and values that the cache returns, and no others, reach the attention function, in one call.

    False also where the source cannot tell.
    """
    return _call(_forward(module)) is not None


def unknown_arguments(module: nn.Module) -> list[str]:
    """Keywords of the attention function's call that change its result in ways it does not know here."""
    call = _call(_forward(module))
    return sorted({word.arg for word in call.keywords if word.arg} - _UNDERSTOOD) if call else []


def eager_function(module: nn.Module) -> Callable[..., Any] | None:
    """The function that transformers calls "eager", which each of its files has its own of."""
    function: Callable[..., Any] | None = _forward(module).__globals__.get("eager_attention_forward")
    return function


def makes_masks(model: nn.Module) -> bool:
    """Whether a model's forward calls one of transformers' functions that make masks."""
    return _makes_masks(_forward(model))


@functools.cache
def _makes_masks(forward: Any) -> bool:
    function = _parsed(forward)
    calls = [node.func for node in ast.walk(function) if isinstance(node, ast.Call)] if function else []
    return any(isinstance(call, ast.Name) and re.fullmatch(r"create_\w*masks?\w*", call.id) for call in calls)


def _forward(module: nn.Module) -> Any:
    forward = inspect.unwrap(module.__dict__.get("forward", type(module).forward))
    return getattr(forward, "__func__", forward)


def _parsed(forward: Any) -> ast.stmt | None:
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(forward))).body[0]
    except (OSError, TypeError, SyntaxError):
        # There is no source, or it does not stand alone.
        return None


@functools.cache
def _call(forward: Any) -> ast.Call | None:
    """The call of the attention function, if its keys and values are those that the cache returned."""
    function = _parsed(forward)
    if function is None:
        return None
    interfaces = _interfaces(function)
    calls = [
        node
        for node in ast.walk(function)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in interfaces
    ]
    if len(calls) != 1 or len(calls[0].args) < 4:
        return None
    names = [part.id for part in calls[0].args[2:4] if isinstance(part, ast.Name)]
    updates = [update for update in _updates(function, ()) if [part.id for part in update.targets[0].elts] == names]
    if len(updates) != 1:
        return None
    begin, end = updates[0].end_lineno, calls[0].lineno
    return None if _touched(function, set(names), begin, end) else calls[0]


def _interfaces(function: ast.AST) -> set[str]:
    """Names of variables that hold the attention function."""
    found = set()
    for node in ast.walk(function):
        if (
            isinstance(node, (ast.Assign, ast.AnnAssign))
            and node.value is not None
            and _INTERFACE in _names(node.value)
        ):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


def _updates(node: ast.AST, tests: tuple[ast.expr, ...]) -> list[Any]:
    """Statements ``k, v = cache.update(k, v, self.layer_idx)`` that depend on nothing that is the layer's own."""
    found: list[Any] = []
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Assign) and _is_update(child):
            found += [] if any("self" in _names(test) for test in tests) else [child]
        elif isinstance(child, ast.If):
            found += _updates(child, (*tests, child.test))
        elif not isinstance(child, (ast.For, ast.While)):
            found += _updates(child, tests)
    return found


def _is_update(statement: ast.Assign) -> bool:
    call, target = statement.value, statement.targets[0]
    if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "update"):
        return False
    if not (isinstance(target, ast.Tuple) and all(isinstance(part, ast.Name) for part in target.elts)):
        return False
    given = [ast.unparse(part) for part in call.args[:3]]
    return given == [*map(ast.unparse, target.elts), "self.layer_idx"]


def _touched(function: ast.AST, names: set[str], begin: int, end: int) -> bool:
    """Whether something happens to a name between two lines, beside a look at its shape."""
    nodes = list(_on_the_way(function, end))
    looks = {id(n.value) for n in nodes if isinstance(n, ast.Attribute) and n.attr in ("shape", "dtype", "device")}
    return any(
        isinstance(node, ast.Name) and node.id in names and begin < node.lineno < end and id(node) not in looks
        for node in nodes
    )


def _on_the_way(node: ast.AST, line: int) -> Iterator[ast.AST]:
    """All nodes but those in branches that are not taken where another branch with the line is."""
    skipped: list[ast.AST] = []
    if isinstance(node, ast.If):
        inside = [part[0].lineno <= line <= (part[-1].end_lineno or 0) for part in (node.body, node.orelse) if part]
        skipped = [*node.body] if inside[1:] == [True] else [*node.orelse] if inside[0] else []
    for child in ast.iter_child_nodes(node):
        if child not in skipped:
            yield child
            yield from _on_the_way(child, line)


def _names(expression: ast.AST) -> set[str]:
    return {node.id for node in ast.walk(expression) if isinstance(node, ast.Name)}
