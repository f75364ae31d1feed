"""Regular expressions from a file, which must not run for ever: matched with sets of positions, not by backtracking."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from peft_kernels.integrations.adapter_files import short

# The parser of re, which has no public name.
_parser: Any = importlib.import_module("re._parser" if sys.version_info >= (3, 11) else "sre_parse")

# A pattern of the usual kind takes some hundreds for a layer's name.
_STEPS = 100_000
_CHARACTERS = ("LITERAL", "NOT_LITERAL", "ANY", "IN")
_REPEATS = ("MAX_REPEAT", "MIN_REPEAT")
_ASSERTIONS = ("ASSERT", "ASSERT_NOT")
_ANCHORS = {
    "AT_BEGINNING": re.compile("^"),
    "AT_BEGINNING_STRING": re.compile(r"\A"),
    "AT_END": re.compile("$"),
    "AT_END_STRING": re.compile(r"\Z"),
    "AT_BOUNDARY": re.compile(r"\b"),
    "AT_NON_BOUNDARY": re.compile(r"\B"),
}


class Pattern:
    """A regular expression as ``re`` has it, without flags, back references, atomic groups and possessive quantifiers.

    Args:
        where: how the text of an error begins.
        text: the expression.
        at_a_dot: PEFT's rule for ranks and alphas: it must match the whole name, or its end after a dot.

    Raises:
        ValueError: it is none, or has one of these.
    """

    def __init__(self, where: str, text: str, at_a_dot: bool = False) -> None:
        self._name = f"{where} must be a regular expression that can be matched in time: {short(text)}"
        text = rf"(.*\.)?({text})$" if at_a_dot else text
        try:
            self._tree = _parser.parse(text)
            choices = sum(_choices(self._tree))
            # Without a choice but the prefix's there is next to nothing to try twice, and re is much faster.
            self._compiled = re.compile(text) if choices == 2 * at_a_dot else None
        except (re.error, OverflowError, RecursionError, _UnsupportedError) as error:
            raise ValueError(f"{self._name} is not supported: {error}") from error

    def match(self, name: str) -> bool:
        """Whether ``re.match`` would match.

        Raises:
            ValueError: that takes too long.
        """
        return bool(self._compiled.match(name) if self._compiled else self._ends(name))

    def fullmatch(self, name: str) -> bool:
        """Whether ``re.fullmatch`` would; raises as ``match`` does."""
        return bool(self._compiled.fullmatch(name) if self._compiled else self._ends(name) >> len(name))

    def _ends(self, name: str) -> int:
        try:
            return _Matcher(name).after(self._tree, 1)
        except (_UnsupportedError, RecursionError):
            raise ValueError(f"{self._name} takes too long with {name!r}") from None


class _UnsupportedError(Exception):
    pass


def _choices(tree: Any) -> Iterator[int]:
    """One for each part of an expression that may match in several ways."""
    if getattr(tree, "state", None) and tree.state.flags & ~re.UNICODE:
        raise _UnsupportedError("it has flags")
    for op, value in tree:
        if op.name in _CHARACTERS or op.name == "AT":
            continue
        if op.name == "SUBPATTERN" and not (value[1] or value[2]):
            yield from _choices(value[3])
        elif op.name == "BRANCH":
            yield 1
            for branch in value[1]:
                yield from _choices(branch)
        elif op.name in (*_REPEATS, *_ASSERTIONS):
            if op.name in _ASSERTIONS and value[0] < 0 and len(set(value[1].getwidth())) > 1:
                raise _UnsupportedError("a look-behind has no fixed width")
            yield 1
            yield from _choices(value[-1])
        else:
            raise _UnsupportedError(f"it has {op.name.lower().replace('_', ' ')}")


class _Matcher:
    """From the positions in a name where a part of an expression may start to those where it may end, as bits."""

    def __init__(self, name: str) -> None:
        self._name, self._steps = name, 0
        self._fitting: dict[int, int] = {}

    def after(self, tree: Iterable[Any], starts: int) -> int:
        for node in tree:
            self._steps += 1
            if self._steps > _STEPS:
                raise _UnsupportedError
            starts = self._after_node(node, starts)
        return starts

    def _after_node(self, node: Any, starts: int) -> int:
        op, value = node[0].name, node[1]
        if op in _CHARACTERS:
            return (starts & self._where(node)) << 1
        if op == "AT":
            return starts & self._where(node)
        if op == "SUBPATTERN":
            return self.after(value[3], starts)
        if op in _REPEATS:
            least, most, tree = value
            return self._repeat(least, most, tree, starts)
        if op in _ASSERTIONS:
            direction, tree = value
            return self._look(op == "ASSERT", direction, tree, starts)
        ends = 0
        for branch in value[1]:
            ends |= self.after(branch, starts)
        return ends

    def _repeat(self, least: int, most: int, tree: Any, starts: int) -> int:
        # More rounds than characters: one consumes nothing, and may as well be left out or repeated.
        rounds = len(self._name) + 1
        for _ in range(min(least, rounds)):
            starts = self.after(tree, starts)
        ends = starts
        for _ in range(min(most - least, rounds)):
            starts = self.after(tree, starts) & ~ends
            if not starts:
                break
            ends |= starts
        return ends

    def _look(self, wanted: bool, direction: int, tree: Any, starts: int) -> int:
        back = tree.getwidth()[0] if direction < 0 else 0
        held = 0
        for position in range(back, len(self._name) + 1):
            if starts >> position & 1 and self.after(tree, 1 << (position - back)):
                held |= 1 << position
        return held if wanted else starts & ~held

    def _where(self, node: Any) -> int:
        """The positions at which a character or an anchor fits."""
        if id(node) not in self._fitting:
            op, value, name = node[0].name, node[1], self._name
            if op == "AT":
                fits = [bool(_ANCHORS[value.name].match(name, i)) for i in range(len(name) + 1)]
            else:
                fits = [_is_character(op, value, c) for c in name]
            self._fitting[id(node)] = sum(1 << i for i, fit in enumerate(fits) if fit)
        return self._fitting[id(node)]


def _is_word(c: str) -> bool:
    return c.isalnum() or c == "_"


def _is_character(op: str, value: Any, c: str) -> bool:
    if op == "ANY":
        return c != "\n"
    if op in ("LITERAL", "NOT_LITERAL"):
        return (ord(c) == value) == (op == "LITERAL")
    negated = value[0][0].name == "NEGATE"
    return any(_in_set(kind.name, part, c) for kind, part in value[negated:]) != negated


def _in_set(kind: str, part: Any, c: str) -> bool:
    if kind == "LITERAL":
        return bool(ord(c) == part)
    if kind == "RANGE":
        return bool(part[0] <= ord(c) <= part[1])
    name = part.name.removeprefix("CATEGORY_")
    tests = {"DIGIT": str.isdecimal, "SPACE": str.isspace, "WORD": _is_word}
    return tests[name.removeprefix("NOT_")](c) != name.startswith("NOT_")
