"""Faults that are put into device code on purpose: many versions of a kernel in one program.

Each version has a namespace of its own, because compiling one more costs a second and compiling another program ten.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import NamedTuple

from tests.compiled import CSRC

_INCLUDE = re.compile(r'^#include "([^"]+)"\n', re.MULTILINE)
_UNUSED = ("parameter", "value", "but-set-variable", "variable")

# A main() that takes the version by its number.
MAIN = r"""
int main(int argc, char** argv) {
  return simt::main_of(argc, argv, [](const simt::Arguments& arguments) {
    tests.at(arguments.text("config"))(arguments);
  });
}
"""


class Fault(NamedTuple):
    """The text that is replaced, wherever it is, by what; and template arguments of `test` that see it.

    Both texts are empty where the kernel is to stay as it is.
    """

    old: str
    new: str
    config: str


def source(header: str, test: str, faults: Mapping[str, Fault], kept: Collection[str] = ()) -> str:
    """The text of a program with a version of the kernel for each fault, numbered in their order.

    Args:
        header: of csrc, such as "lora/reduce.cuh"; it and what it includes of its folder can be faulty.
        test: a function template `test` of ``simt::Arguments``, which names the kernel without its namespace.
        kept: headers of that folder which all versions share, such as "lora/dropout.h".

    Raises:
        AssertionError: what a fault replaces is not there.
    """
    family = header.split("/")[0]
    kernel = flattened(header, kept)
    parts = [f'#pragma GCC diagnostic ignored "-Wunused-{what}"\n' for what in _UNUSED]
    parts += ['#include "simt/take.h"\n', *(f'#include "{name}"\n' for name in kept), "using namespace peft_kernels;\n"]
    entries = []
    for number, (fault, (old, new, config)) in enumerate(faults.items()):
        assert old in kernel, f"{fault}: there is nothing to replace"
        space = f"peft_kernels::fault_{number}"
        text = (kernel.replace(old, new) if old else kernel).replace(f"peft_kernels::{family}", space)
        using = f"using namespace peft_kernels::{family};" if kept else ""
        parts.append(f"namespace {space} {{ {using} }}\n{text}\nnamespace {space} {{\n{test}\n")
        parts.append(f"void version(const simt::Arguments& arguments) {{ test<{config}>(arguments); }}\n}}\n")
        entries.append(f'{{"{number}", {space}::version}}')
    table = f"const std::map<std::string, void (*)(const simt::Arguments&)> tests = {{{', '.join(entries)}}};\n"
    return "".join((*parts, table, MAIN))


def flattened(header: str, kept: Collection[str] = ()) -> str:
    """A header's text with those that it includes of its own folder in their places, each once, but for `kept`."""
    folder, seen = header.split("/")[0], {header}

    def insert(include: re.Match[str]) -> str:
        name = include[1]
        if not name.startswith(f"{folder}/") or name in kept:
            return include[0]
        if name in seen:
            return ""
        seen.add(name)
        return text_of(name)

    def text_of(name: str) -> str:
        return _INCLUDE.sub(insert, (CSRC / name).read_text().replace("#pragma once\n", ""))

    return text_of(header)
