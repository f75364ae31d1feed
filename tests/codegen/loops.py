"""Loops in a kernel's machine code, and which of their loads are under way while they multiply."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.x]*)\s*([^;]*);", re.MULTILINE)
_TARGET = re.compile(r"\b0x([0-9a-f]+)")
_REGISTER = re.compile(r"\bR(\d+)")
# Registers of a matrix product's operands a, b and c, by its name; of other instructions one is read for each that is
# named, which finds some reader of a load of four.
_OPERANDS = {"HMMA.16816": (4, 2, 4), "HMMA.1688": (4, 2, 4)}


class Instruction(NamedTuple):
    address: int
    name: str
    operands: tuple[str, ...]

    def reads(self) -> set[int]:
        """Registers; of a wide operand all of them where this is a matrix product."""
        sources = self.operands if self.name.startswith("ST") else self.operands[1:]
        widths = next((widths for name, widths in _OPERANDS.items() if self.name.startswith(name)), (1,) * len(sources))
        return {
            register
            for source, width in zip(sources, widths, strict=False)
            for first in map(int, _REGISTER.findall(source))
            for register in range(first, first + width)
        }


def loops(code: str) -> Iterator[list[Instruction]]:
    """Instructions from the target of each backward branch to the branch, in the order of the branches."""
    instructions = [
        Instruction(int(address, 16), name, tuple(part.strip() for part in operands.split(",")))
        for address, name, operands in _INSTRUCTION.findall(code)
    ]
    for branch in instructions:
        target = _TARGET.search(",".join(branch.operands)) if branch.name.startswith("BRA") else None
        if target is not None and int(target[1], 16) <= branch.address:
            yield [one for one in instructions if int(target[1], 16) <= one.address <= branch.address]


def loads_under_way(loop: list[Instruction], load: str, product: str) -> list[int]:
    """For each product of a loop: loads of 16 bytes that were issued before it and whose first reader comes after it.

    Args:
        loop: its body, walked without taking branches; loads may be read in the next turn.
        load, product: beginnings of their names.
    """
    turns = [*loop, *loop]
    spans = []
    for issued, instruction in enumerate(turns):
        if instruction.name.startswith(load):
            first = int(_REGISTER.findall(instruction.operands[0])[0])
            loaded = set(range(first, first + 4))
            read = (at for at in range(issued + 1, len(turns)) if turns[at].reads() & loaded)
            spans.append((issued, next(read, len(turns))))
    return [
        sum(issued < at < read for issued, read in spans)
        for at in range(len(loop), len(turns))
        if turns[at].name.startswith(product)
    ]
