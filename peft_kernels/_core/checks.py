"""Argument checks whose messages name the tensor, what it must be and what it was.

The tensors of an operator stand in one table. Letters bind sizes from its first row to its last, and each tensor is
held against the letters that are bound when its turn comes. Every check raises ValueError, never asserts, and is called
from an operator's ``problem.py`` alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from peft_kernels._core.errors import UnsupportedError

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

Sizes = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """What one tensor must be.

    Attributes:
        name: of the argument.
        forms: of its shape, such as "... K", or "H P D | B H P D"; "..." is any number of dimensions.
        dtype_of: the argument whose dtype it has; "" where it is itself the first, or its dtype is checked elsewhere.
        or_float32: whether it may be float32 beside half precision.
        optional: whether it may be None.
        meanings: what letters are that another tensor bound, such as {"K": "weight's in-features"}.
        then: what else the sizes must be, once it is bound: sizes -> what is wrong, or None.
    """

    name: str
    forms: str
    dtype_of: str = ""
    or_float32: bool = False
    optional: bool = False
    meanings: Mapping[str, str] | None = None
    then: Callable[[Sizes], str | None] | None = None

    @cached_property
    def letters(self) -> tuple[tuple[str, ...], ...]:
        return tuple(tuple(form.split()) for form in self.forms.split("|"))

    def bind(self, shape: torch.Size, sizes: Sizes) -> str | None:
        """Bind the letters that are free; return what is wrong with the shape, or None."""
        for letters in self.letters:
            if letters[0] == "...":
                return self._bind_last(letters, shape, sizes)
            if len(letters) == len(shape):
                fits = True
                for letter, size in zip(letters, shape):  # noqa: B905 (as many; this is on the way of every call)
                    if sizes.setdefault(letter, size) != size:
                        fits = False
                return None if fits else self._wrong(letters, shape, sizes)
        return self._wrong(self.letters[0], shape, sizes)

    def _bind_last(self, letters: tuple[str, ...], shape: torch.Size, sizes: Sizes) -> str | None:
        """The same where any number of dimensions stand before one letter."""
        last = letters[-1]
        if len(shape) == 0:
            return self._wrong(letters, shape, sizes)
        was_free = "..." not in sizes
        fits = sizes.setdefault(last, shape[-1]) == shape[-1]
        if sizes.setdefault("...", shape[:-1]) == shape[:-1] and fits:
            return None
        if not was_free:
            return self._wrong(letters, shape, sizes)
        meaning = (self.meanings or {}).get(last, "")
        return f"must be {_form(letters)} with {last} = {sizes[last]}, {meaning}, got {_numbers(shape)}"

    def _wrong(self, letters: tuple[str, ...], shape: torch.Size, sizes: Sizes) -> str:
        """In numbers where all letters are bound."""
        if all(letter in sizes for letter in letters):
            expected = [size for each in letters for size in (sizes[each] if each == "..." else [sizes[each]])]
            return f"must be {_form(letters)} = {_numbers(expected)}, got {_numbers(shape)}"
        got = f"a tensor of shape {_numbers(shape)}" if len(shape) > 0 else "a 0-d tensor"
        return f"must be {' or '.join(map(_form, self.letters))}, got {got}"


@dataclass(frozen=True)
class Table:
    """The tensors of an operator, in the order in which their letters bind.

    Attributes:
        operator: name for messages.
        first: the argument whose dtype and device the others are held against.
        rows: of all tensors.
    """

    operator: str
    first: str
    rows: tuple[Row, ...]

    def check(self, call: Any, part: str = "", known: Sizes | None = None) -> Sizes:
        """Check the tensors of a call and return the sizes of the letters.

        Args:
            call: has them as attributes.
            part: what stands in messages before the names of all but the first argument, as in "members[1].weight".
            known: letters that are bound beforehand.

        Raises:
            ValueError: naming the argument, what it must be and what it was.
            UnsupportedError: a tensor is nested.
        """
        sizes: Sizes = {} if known is None else known
        there = []
        for row in self.rows:
            tensor = getattr(call, row.name)
            if isinstance(tensor, Tensor):
                if tensor.layout is not torch.strided or tensor.is_nested:
                    self._refuse_layout(self._label(row, part), tensor)
                wrong = row.bind(tensor.shape, sizes)
                if wrong is not None:
                    raise ValueError(f"{self._label(row, part)} {wrong}")
                wrong = row.then(sizes) if row.then is not None else None
                if wrong is not None:
                    raise ValueError(f"{self.operator}: {part}{wrong}")
                there.append((row, tensor))
            elif tensor is not None or not row.optional:
                raise ValueError(f"{self._label(row, part)} must be a torch.Tensor, got {type(tensor).__name__}")
        first = getattr(call, self.first)
        dtype, device = first.dtype, first.device
        if dtype not in FLOATING:
            names = ", ".join(map(str, FLOATING))
            raise ValueError(f"{self.operator}: {self.first} must have one of the dtypes {names}, got {dtype}")
        for row, tensor in there:
            if row.dtype_of:
                expected = dtype if row.dtype_of == self.first else getattr(call, row.dtype_of).dtype
                if tensor.dtype != expected:
                    self._check_float32(row, part, tensor, expected)
            if tensor is not first and tensor.device != device:
                raise ValueError(
                    f"{self._label(row, part)} must be on the device of {self.first} ({device}), got {tensor.device}"
                )
        return sizes

    def _label(self, row: Row, part: str) -> str:
        return f"{self.operator}: {'' if row.name == self.first else part}{row.name}"

    def _refuse_layout(self, label: str, tensor: Tensor) -> None:
        text = f"{label} must be a dense tensor, got a"
        if tensor.is_nested:
            raise UnsupportedError(
                f"{text} nested one; torch.nested.to_padded_tensor or, if jagged, values() make it one"
            )
        raise ValueError(f"{text} {tensor.layout} one")

    def _check_float32(self, row: Row, part: str, tensor: Tensor, dtype: torch.dtype) -> None:
        mixes = row.or_float32 and dtype in (torch.bfloat16, torch.float16)
        if not (mixes and tensor.dtype == torch.float32):
            other = f"{row.dtype_of}, or float32 beside half precision," if row.or_float32 else row.dtype_of
            choice = f"{dtype} or {torch.float32}" if mixes else str(dtype)
            raise ValueError(f"{self._label(row, part)} must have the dtype of {other} ({choice}), got {tensor.dtype}")


def scalar(operator: str, name: str, value: object) -> None:
    """A float, or a 0-d floating tensor."""
    if isinstance(value, Tensor):
        if value.dim() == 0 and value.is_floating_point():
            return
        got = f"{value.dtype} {tuple(value.shape)}"
    elif isinstance(value, (int, float, torch.SymFloat, torch.SymInt)):
        return
    else:
        got = type(value).__name__
    raise ValueError(f"{operator}: {name} must be a float or a 0-d floating tensor, got {got}")


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of sums, and of what lies between two products, on every backend: never below float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _form(letters: tuple[str, ...]) -> str:
    return f"({', '.join(letters)}{',' if len(letters) == 1 else ''})"


def _numbers(sizes: Any) -> str:
    return f"({', '.join(str(int(size)) for size in sizes)}{',' if len(sizes) == 1 else ''})"
