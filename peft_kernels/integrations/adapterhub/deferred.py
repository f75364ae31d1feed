"""A tensor that is made when it is read, for results that AdapterHub passes around and mostly drops."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class Deferred:
    """Stands for ``make()``, which runs at the first use as it would have run where this was created.

    Slicing, ``repeat`` and ``torch.cat``, which composition blocks do to results that they only pass on, give a
    Deferred again. Every other function of torch's, attribute or operator acts on the tensor.

    Args:
        make: without arguments; runs at most once.
        device_type: where autocast is looked up.
    """

    __slots__ = ("_autocast", "_device_type", "_grad", "_make", "_tensor")

    def __init__(self, make: Callable[[], Tensor], device_type: str) -> None:
        self._make, self._device_type = make, device_type
        self._tensor: Tensor | None = None
        self._grad = torch.is_grad_enabled()
        self._autocast = torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)

    def tensor(self) -> Tensor:
        """The tensor; the first call makes it."""
        if self._tensor is None:
            enabled, dtype = self._autocast
            with torch.set_grad_enabled(self._grad), torch.autocast(self._device_type, dtype, enabled):
                self._tensor = self._make()
        return self._tensor

    def __getitem__(self, index: Any) -> Deferred:
        return Deferred(lambda: self.tensor()[index], self._device_type)

    def repeat(self, *sizes: int) -> Deferred:
        """As a tensor's, deferred."""
        return Deferred(lambda: self.tensor().repeat(*sizes), self._device_type)

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        def run() -> Any:
            return function(*_read(args), **_read(kwargs or {}))

        if function is not torch.cat:
            return run()
        device_types = [tensor._device_type for tensor in args[0] if isinstance(tensor, Deferred)]
        return Deferred(run, device_types[0])

    def __getattr__(self, name: str) -> Any:
        if name in Deferred.__slots__:
            raise AttributeError(name)
        return getattr(self.tensor(), name)


def _read(value: Any) -> Any:
    """The value, with each Deferred in it read."""
    if isinstance(value, Deferred):
        return value.tensor()
    if isinstance(value, dict):
        return {key: _read(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_read(item) for item in value)
    return value


def _on_the_tensor(name: str) -> Callable[..., Any]:
    def operate(self: Deferred, *others: Any) -> Any:
        return getattr(self.tensor(), name)(*_read(others))

    return operate


# Python looks operators up on the class.
for _name in (
    *("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "matmul", "rmatmul", "pow", "neg", "abs"),
    *("lt", "le", "gt", "ge", "bool", "float", "int", "len", "iter"),
):
    setattr(Deferred, f"__{_name}__", _on_the_tensor(f"__{_name}__"))
