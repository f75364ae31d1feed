"""The arguments of an operator, as a NamedTuple has them, and in the two forms that torch asks for.

A call is the NamedTuple. Flat, it is what the registered operator takes, where some fields are two arguments. Its
leaves are what an ``autograd.Function`` takes, which sees no tensor inside a tuple.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, get_type_hints

import torch
from torch import Tensor

_SCALAR = "scalar"
_SCALARS = "scalars"
# A list of what may be missing would hide its tensors from autograd, so a flat call has those that are there.
_OPTIONALS = "optionals"
_TYPES: dict[Any, str] = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    tuple[Tensor, ...]: "Tensor[]",
    tuple[Tensor | None, ...]: _OPTIONALS,
    float | Tensor: _SCALAR,  # a float, or a 0-d tensor that the host never reads
    tuple[float | Tensor, ...]: _SCALARS,
    bool: "bool",
    int: "SymInt",
    float: "float",
    str: "str",
    torch.dtype: "ScalarType",
    tuple[int, ...]: "SymInt[]",
    tuple[float, ...]: "float[]",
}
_TUPLES = ("Tensor[]", _OPTIONALS, _SCALARS, "SymInt[]", "float[]")
_VALUES = ("bool", "SymInt", "float", "str", "ScalarType", "SymInt[]", "float[]")

Place = int | slice


@dataclass(frozen=True)
class Signature:
    """The fields of a call: the NamedTuple, and each field's type in a schema."""

    call: type[Any]
    types: dict[str, str]

    @staticmethod
    def of(call: type[Any]) -> Signature:
        hints = get_type_hints(call)
        return Signature(call, {name: _TYPES[hints[name]] for name in call._fields})

    def is_scalar(self, name: str) -> bool:
        """Whether it is a number that may be a tensor, or a tuple of such."""
        return self.types[name] in (_SCALAR, _SCALARS)

    def is_tuple(self, name: str) -> bool:
        return self.types[name] in _TUPLES

    def is_value(self, name: str) -> bool:
        """Whether it is no tensor, and its value may be read."""
        return self.types[name] in _VALUES

    def text(self, optional: Iterable[str] = ()) -> str:
        """The arguments of a schema; those that are ``optional`` may be missing."""
        forms = {_SCALAR: "float {0}, Tensor? {0}_tensor", _OPTIONALS: "Tensor[] {0}, bool[] {0}_there"}
        forms[_SCALARS] = "float[] {0}, Tensor[] {0}_tensors, bool[] {0}_are_tensors"
        forms |= {kind: f"{kind} {{0}}" for kind in _TYPES.values() if kind not in forms}
        kinds = {name: "Tensor?" if name in optional else kind for name, kind in self.types.items()}
        return ", ".join(forms[kind].format(name) for name, kind in kinds.items())

    def flat(self, call: Any) -> list[Any]:
        """A call as the registered operator takes it."""
        values: list[Any] = []
        for name, value in zip(self.types, call, strict=True):
            if self.types[name] == _SCALAR:
                values += [1.0, value] if isinstance(value, Tensor) else [value, None]
            elif self.types[name] == _SCALARS:
                are_tensors = [isinstance(each, Tensor) for each in value]
                numbers = [1.0 if is_tensor else each for each, is_tensor in zip(value, are_tensors, strict=True)]
                values += [numbers, [each for each in value if isinstance(each, Tensor)], are_tensors]
            elif self.types[name] == _OPTIONALS:
                values += [[each for each in value if each is not None], [each is not None for each in value]]
            else:
                values.append(list(value) if self.is_tuple(name) else value)
        return values

    def from_flat(self, values: Iterable[Any]) -> tuple[Any, list[Any]]:
        """The call that a registered operator was given, and the values after it."""
        rest, found = iter(values), []
        for name in self.types:
            value = next(rest)
            if self.types[name] == _SCALAR:
                tensor = next(rest)
                value = value if tensor is None else tensor
            elif self.types[name] == _SCALARS:
                tensors = iter(next(rest))
                value = [next(tensors) if is_tensor else x for x, is_tensor in zip(value, next(rest), strict=True)]
            elif self.types[name] == _OPTIONALS:
                present = iter(value)
                value = [next(present) if there else None for there in next(rest)]
            found.append(tuple(value) if self.is_tuple(name) else value)
        return self.call._make(found), list(rest)

    def flat_positions(self) -> dict[str, int]:
        """Where each field stands in a flat call."""
        positions, count = {}, 0
        for name in self.types:
            positions[name] = count
            count += {_SCALAR: 2, _OPTIONALS: 2, _SCALARS: 3}.get(self.types[name], 1)
        return positions

    def flat_gradients(self, call: Any, gradients: Any) -> list[Any]:
        """Gradients of a call's fields as autograd wants them for a flat one: in the structure of its arguments."""
        values: list[Any] = []
        for name, value, gradient in zip(self.types, call, gradients, strict=True):
            if self.types[name] == _OPTIONALS:
                there = [each for each, given in zip(gradient, value, strict=True) if given is not None]
                values += [there, None if value else []]
            elif self.types[name] == _SCALARS:
                values += [None, [None for each in value if isinstance(each, Tensor)], None]
            elif self.types[name] == _SCALAR:
                values += [gradient, None]
            else:
                values.append(
                    list(gradient) if self.types[name] == "Tensor[]" else None if self.is_tuple(name) else gradient
                )
        return values

    def leaves(self, call: Any) -> tuple[Any, ...]:
        """The lengths of a call's tuples, and its values, with those of a tuple one after the other."""
        if not any(map(self.is_tuple, self.types)):
            return (), *call
        return tuple(len(value) for value in call if isinstance(value, tuple)), *self.spread(call)

    def from_leaves(self, lengths: Sequence[int], leaves: Sequence[Any]) -> Any:
        """The call that has these leaves."""
        if not lengths:
            return self.call._make(leaves)
        return self.call._make(self.select(place, leaves) for place in self.positions(lengths).values())

    def positions(self, lengths: Sequence[int]) -> dict[str, Place]:
        """Where each field stands among the leaves."""
        rest, positions, count = iter(lengths), dict[str, Place](), 0
        for name in self.types:
            length = next(rest) if self.is_tuple(name) else None
            positions[name] = count if length is None else slice(count, count + length)
            count += 1 if length is None else length
        return positions

    @staticmethod
    def select(place: Place, leaves: Sequence[Any]) -> Any:
        """A field's value among the leaves."""
        return tuple(leaves[place]) if isinstance(place, slice) else leaves[place]

    @staticmethod
    def all_of(place: Place) -> Iterable[int]:
        """Positions of a field's leaves."""
        return range(place.start, place.stop) if isinstance(place, slice) else (place,)

    @staticmethod
    def spread(values: Iterable[Any]) -> list[Any]:
        """Values, with those of a tuple one after the other."""
        return [leaf for value in values for leaf in (value if isinstance(value, tuple) else (value,))]
