"""Imports flow downhill, nothing sideways, and importing the package does nothing else.

The statements are read with ast, those inside functions too: a lazy import has a direction like any other.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "peft_kernels"

# Lower may not import higher. A family's other modules have no floor of their own: they stand on what they import.
KERNELS = 1
OPERATOR = {"problem": 2, "torch_impl": 3, "triton_impl": 3, "cuda_impl": 3, "op": 4}
MODULE = 5
FAMILY = 6

# What a kernel knows nothing of: problems, autograd, choosing a backend.
ABOVE_KERNELS = {
    f"{PACKAGE}._core.{name}" for name in ("autocast", "checks", "dispatch", "graph", "library", "operator")
}

# A family, and the others that its operators may stand on: LoRA's frozen weights may be 4-bit.
STANDS_ON: dict[str, set[str]] = {"lora": {"four_bit_weight"}}

# A library's folder, and the others that it may import: PEFT's prefixes run on transformers'.
INTEGRATIONS: dict[str, set[str]] = {"transformers": set(), "peft": {"transformers"}, "adapterhub": set()}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    return {module_name(path): path for path in sorted((ROOT / PACKAGE).rglob("*.py"))}


def families() -> list[str]:
    return sorted(path.parent.name for path in (ROOT / PACKAGE).glob("*/kernels"))


def imported_names(path: Path) -> Iterator[tuple[str, str | None]]:
    """Every import of a file, as (module, name taken from it or None)."""
    package = module_name(path) if path.name == "__init__.py" else module_name(path).rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")
                base = ".".join([*above[: len(above) - node.level + 1], *filter(None, [node.module])])
            yield from ((base, alias.name) for alias in node.names)


@cache
def edges(name: str) -> frozenset[str]:
    """The package's modules that a module imports; ``from package import submodule`` counts as the submodule."""
    found = set()
    for base, attribute in imported_names(modules()[name]):
        if base.split(".")[0] == PACKAGE:
            submodule = f"{base}.{attribute}"
            found.add(submodule if attribute and submodule in modules() else base)
    return frozenset(found)


@cache
def reachable(name: str) -> frozenset[str]:
    seen: set[str] = set()
    waiting = [name]
    while waiting:
        current = waiting.pop()
        new = (edges(current) if current in modules() else frozenset()) - seen
        seen |= new
        waiting.extend(new)
    return frozenset(seen)


def family_of(name: str) -> str | None:
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in families() else None


def floor_of(name: str) -> int | None:
    """A family's kernels lie below its operators, in the family's own folder or in one each, and these below it."""
    _, _, *inside = name.split(".")
    if not inside:
        return FAMILY
    if inside[0] == "kernels":
        return KERNELS
    return MODULE if inside == ["module"] else OPERATOR.get(inside[-1])


FAMILY_MODULES = [name for name in modules() if family_of(name)]
KERNEL_MODULES = [name for name in FAMILY_MODULES if floor_of(name) == KERNELS]
CORE_MODULES = [name for name in modules() if name.split(".")[1:2] == ["_core"]]


def test_there_are_families() -> None:
    assert families()
    assert KERNEL_MODULES
    assert CORE_MODULES


@pytest.mark.parametrize("name", sorted(modules()))
def test_imports_exist(name: str) -> None:
    """A name that resolves to no module would slip through every other test here."""
    missing = {target for target in edges(name) if target not in modules() and target != f"{PACKAGE}._C"}
    assert not missing


@pytest.mark.parametrize("name", sorted(modules()))
def test_no_cycle(name: str) -> None:
    assert name not in reachable(name)


@pytest.mark.parametrize("name", CORE_MODULES)
def test_core_knows_no_family(name: str) -> None:
    above = {target for target in edges(name) if target.split(".")[1:2] not in (["_core"], ["_C"])}
    assert not above


@pytest.mark.parametrize("name", FAMILY_MODULES)
def test_family_imports_core_itself_and_what_it_stands_on(name: str) -> None:
    family = family_of(name)
    inside = [[PACKAGE, each] for each in ("_core", family, *STANDS_ON.get(family or "", ()))]
    assert not {target for target in edges(name) if target.split(".")[:2] not in inside}


@pytest.mark.parametrize("name", FAMILY_MODULES)
def test_family_imports_flow_downhill(name: str) -> None:
    floor = floor_of(name)
    if floor is None:
        above = {target for target in edges(name) if target == f"{PACKAGE}.{family_of(name)}"}
    else:
        above = {target for target in reachable(name) if family_of(target) and (floor_of(target) or 0) > floor}
    assert not above


@pytest.mark.parametrize("name", KERNEL_MODULES)
def test_kernels_know_no_problem_and_choose_no_backend(name: str) -> None:
    """Also none of the modules without a floor, such as an operator's helpers."""
    above = {target for target in reachable(name) if family_of(target) and floor_of(target) != KERNELS}
    assert not above | (reachable(name) & ABOVE_KERNELS)


@pytest.mark.parametrize("name", sorted(modules()))
def test_no_module_is_shadowed(name: str) -> None:
    """``import a.b as c`` takes what a's ``__init__`` calls b, which had better be the module."""
    package, _, leaf = name.rpartition(".")
    if not package:
        return
    bound = {
        node.name
        for node in ast.parse(modules()[package].read_text()).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
    }
    bound |= {taken for base, taken in imported_names(modules()[package]) if taken and f"{base}.{taken}" != name}
    assert leaf not in bound


@pytest.mark.parametrize("name", sorted(modules()))
def test_only_the_package_imports_integrations(name: str) -> None:
    inside = name == PACKAGE or name.startswith(f"{PACKAGE}.integrations")
    assert inside or not any(target.startswith(f"{PACKAGE}.integrations") for target in edges(name))


@pytest.mark.parametrize("name", [name for name in modules() if name.startswith(f"{PACKAGE}.integrations.")])
def test_integrations_import_what_they_stand_on(name: str) -> None:
    """What they share imports no library's folder."""
    folder = name.split(".")[2]
    allowed = {folder, *INTEGRATIONS.get(folder, ())}
    folders = {target.split(".")[2] for target in edges(name) if target.startswith(f"{PACKAGE}.integrations.")}
    assert folders & INTEGRATIONS.keys() <= allowed


def test_package_imports_each_family_in_one_line() -> None:
    # A family that is a namespace of its own is taken whole.
    lines = [
        module
        for node in ast.walk(ast.parse(modules()[PACKAGE].read_text()))
        if isinstance(node, ast.ImportFrom)
        for module in ([f"{PACKAGE}.{each.name}" for each in node.names] if node.module == PACKAGE else [node.module])
        if family_of(module or "")
    ]
    assert sorted(lines) == [f"{PACKAGE}.{family}" for family in families()]


@pytest.mark.parametrize("folder", [PACKAGE, "examples"])
def test_oracle_is_no_backend(folder: str) -> None:
    users = [
        str(path.relative_to(ROOT))
        for path in (ROOT / folder).rglob("*.py")
        for base, _ in imported_names(path)
        if base.split(".")[0] == "python_ref"
    ]
    assert not users


def test_oracle_stands_on_torch_and_the_standard_library() -> None:
    allowed = {*sys.stdlib_module_names, "torch", "python_ref"}
    strangers = {
        f"{path.relative_to(ROOT)}: {base}"
        for path in (ROOT / "python_ref").rglob("*.py")
        for base, _ in imported_names(path)
        if base.split(".")[0] not in allowed
    }
    # What is close is defined once, in the package; that is no equation.
    assert strangers == {f"python_ref/compare.py: {PACKAGE}.testing"}


# Runs after `import torch` alone, so that what torch does by itself is not held against the package. Environment reads
# are told apart by the frame that makes them, for the same reason.
_IMPORT_PROBE = """
import json, os, sys, tempfile
import torch

root, package = sys.argv[1:]
sys.path.insert(0, root)
folder = os.path.join(root, package)
read = []

class Recording(dict):
    def _note(self, key):
        frame = sys._getframe(2)
        while frame.f_globals["__name__"] in ("os", "collections.abc"):
            frame = frame.f_back
        if frame.f_code.co_filename.startswith(folder):
            read.append(f"{key!r} in {frame.f_code.co_filename}:{frame.f_lineno}")

    def __getitem__(self, key):
        self._note(key)
        return super().__getitem__(key)

    def __contains__(self, key):
        self._note(key)
        return super().__contains__(key)

    def __iter__(self):
        self._note("all of it")
        return super().__iter__()

os.environ._data = Recording(os.environ._data)
before = set(sys.modules)
with tempfile.TemporaryFile() as printed:
    saved = os.dup(1), os.dup(2)
    os.dup2(printed.fileno(), 1)
    os.dup2(printed.fileno(), 2)
    __import__(package)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(saved[0], 1)
    os.dup2(saved[1], 2)
    printed.seek(0)
    text = printed.read().decode()

imported = {name.split(".")[0] for name in set(sys.modules) - before}
print(json.dumps({
    "libraries": sorted(imported & {"triton", "peft", "transformers", "adapters", "accelerate", "bitsandbytes"}),
    "extension": package + "._C" in sys.modules,
    "cuda": torch.cuda.is_initialized(),
    "printed": text,
    "environment": read,
}))
"""


def test_importing_the_package_does_nothing_else() -> None:
    result = subprocess.run(
        [sys.executable, "-c", _IMPORT_PROBE, str(ROOT), PACKAGE], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1]) == {
        "libraries": [],
        "extension": False,
        "cuda": False,
        "printed": "",
        "environment": [],
    }
