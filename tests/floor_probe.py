"""What of some files is not there in the Python that runs this: grammar, modules and names of the standard library.

Reads from stdin, in JSON, names of the standard library's modules in some Python and a list of paths; prints its own
version and what is missing. Names are those that are imported, and attributes of modules that are imported. Nothing of
the files runs.
"""

from __future__ import annotations

import ast
import importlib
import json
import sys
from collections.abc import Collection, Iterator

# Of other systems.
_ELSEWHERE = {"msvcrt"}


def missing(path: str, standard: Collection[str]) -> Iterator[str]:
    """Yield a line for each, with its place."""
    with open(path, encoding="utf-8") as file:
        text = file.read()
    try:
        compile(text, path, "exec", dont_inherit=True)
    except SyntaxError as error:
        yield f"{path}:{error.lineno}: {error.msg}"
        return
    tree = ast.parse(text)
    modules = dict(_bound(alias) for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names)
    for node in ast.walk(tree):
        for name in _used(node, modules):
            top = name.partition(".")[0]
            if top in standard and top not in _ELSEWHERE and not _is_there(name):
                yield f"{path}:{node.lineno}: {name}"


def _bound(alias: ast.alias) -> tuple[str, str]:
    """The name that an import binds, and the module that it is: ``import a.b`` binds a."""
    first = alias.name.partition(".")[0]
    return (alias.asname, alias.name) if alias.asname else (first, first)


def _used(node: ast.AST, modules: dict[str, str]) -> list[str]:
    """What a node of the tree takes from modules, by full name."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and not node.level:
        return [f"{node.module}.{alias.name}" for alias in node.names]
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
        return [f"{modules[node.value.id]}.{node.attr}"]
    return []


def _is_there(name: str) -> bool:
    module, _, attribute = name.rpartition(".")
    try:
        if module and hasattr(importlib.import_module(module), attribute):
            return True
        importlib.import_module(name)
    except ImportError:
        return False
    return True


if __name__ == "__main__":
    given_standard, given_paths = json.load(sys.stdin)
    found = [line for each in given_paths for line in missing(each, set(given_standard))]
    print(json.dumps([sys.version_info[:2], found]))
