"""Launches of Triton kernels that do not ask Triton's binder again for what an earlier launch was told.

``kernel[grid](...)`` specializes each argument, makes a text of all of them and of the options, and looks the compiled
kernel up by that, which takes most of a launch's time on the host. A `Launcher` keeps the compiled kernels that such
launches returned, by a key that is cheaper to make, and calls them as `JITFunction.run` does. What it does not know
goes through ``kernel[grid](...)``, and so does everything while somebody watches launches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import cache, lru_cache
from typing import Any, NamedTuple

import triton
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

# Versions whose sources were read: what `JITFunction.run` calls, with which arguments, and what stands in its key.
_KNOWN_VERSIONS = ((3, 4), (3, 8))

# Compiled kernels that a launcher remembers; one that is forgotten is found again by Triton, for the price of its own
# launch.
REMEMBERED = 1024

_LARGEST_INT32 = 2**31 - 1
_ALIGNMENT = 16  # of addresses, in bytes: what Triton compiles for
_MULTIPLE = 16  # of integers

# Fields of configs that the host alone reads: they vary with the tokens, and no variant is compiled for them.
_HOST_FIELDS = ("splits",)


class Constants:
    """What a config tells the compiler: block sizes, warps, stages. One object for each set of values."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = dict(values)


class _Compiled(NamedTuple):
    """What a launch needs of a compiled kernel, and the constexprs, which stand among its arguments.

    Attributes:
        kernel: held, because the module is unloaded with it.
    """

    run: Callable[..., None]
    function: Any
    metadata: Any
    tail: tuple[Any, ...]
    kernel: CompiledKernel


class Launcher:
    """Launches one kernel, whose parameters stand in four groups: pointers, free, specialized, constexprs.

    *Pointers* are tensors, tensor descriptors, None, or a float where a kernel takes either a 0-d tensor or a number.
    *Free* are numbers for whose values nothing is compiled: floats, and integers below 2^31 that the kernel's decorator
    names in ``do_not_specialize``. *Specialized* are integers of which Triton compiles variants: 1, multiples of 16.
    *Constexprs* are flags, in the order in which ``flags`` names them, and then the fields of a config.

    Args:
        kernel: what ``triton.jit`` returned.
        flags: names of the constexprs that are no field of a config.
    """

    def __init__(self, kernel: Any, flags: tuple[str, ...]) -> None:
        self.kernel = kernel
        self.flags = flags
        self._remembered: dict[tuple[Any, ...], _Compiled] = {}

    def __call__(
        self,
        grid: tuple[int, int, int],
        pointers: tuple[Any, ...],
        free: tuple[float, ...],
        specialized: tuple[int, ...],
        flags: tuple[Any, ...],
        config: Any,
    ) -> None:
        """Launch on the current device and its current stream.

        Args:
            flags: values of the flags.
            config: a frozen dataclass; its field ``splits`` is for the host.
        """
        constants = constants_of(config)
        if not self._may_launch_directly():
            self._launch_by_triton(grid, pointers, free, specialized, flags, constants)
            return
        active = driver.active
        device = active.get_current_device()
        arguments: list[Any] = []
        kinds: list[Any] = []
        address_bits = 0
        for pointer in pointers:
            if pointer is None:
                arguments.append(None)
                kinds.append(None)
            elif isinstance(pointer, Tensor):
                address = pointer.data_ptr()
                address_bits |= address
                arguments.append(address)
                kinds.append(pointer.dtype)
            elif isinstance(pointer, TensorDescriptor):
                arguments.append(pointer)
                kinds.append(pointer.base.dtype)
                kinds += pointer.block_shape
            else:
                arguments.append(float(pointer))
                kinds.append(float)
        if address_bits % _ALIGNMENT:
            kinds.append(tuple(isinstance(p, Tensor) and p.data_ptr() % _ALIGNMENT == 0 for p in pointers))
        key = (active, device, constants, flags, tuple(kinds), specializations(specialized))
        compiled = self._remembered.get(key)
        if compiled is None or (free and max(free) > _LARGEST_INT32):
            launched = self._launch_by_triton(grid, pointers, free, specialized, flags, constants)
            self._remember(key, launched, pointers, free, flags, constants)
            return
        compiled.run(
            *grid, active.get_current_stream(device), compiled.function, compiled.metadata, None, None, None,
            *arguments, *free, *specialized, *compiled.tail,
        )  # fmt: skip

    def _may_launch_directly(self) -> bool:
        """Whether Triton itself would do no more than look up the kernel and call it, and nobody watches it do so."""
        runtime = knobs.runtime
        # A hook is a chain, in Triton 3.4 None; what was put in its place is called, whatever it is.
        enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
        return not (
            type(self.kernel) is not JITFunction
            or why_not_direct() is not None
            or not _is_triton_s(JITFunction.run)
            or self.kernel.pre_run_hooks
            or runtime.debug
            or getattr(knobs.compilation, "instrumentation_mode", "")  # since Triton 3.6
            or getattr(enter, "calls", enter)
            or getattr(leave, "calls", leave)
        )

    def _launch_by_triton(
        self,
        grid: tuple[int, int, int],
        pointers: tuple[Any, ...],
        free: tuple[float, ...],
        specialized: tuple[int, ...],
        flags: tuple[Any, ...],
        constants: Constants,
    ) -> Any:
        named = dict(zip(self.flags, flags, strict=True))
        return self.kernel[grid](*map(_as_float32, pointers), *free, *specialized, **named, **constants.values)

    def _remember(
        self,
        key: tuple[Any, ...],
        launched: Any,
        pointers: tuple[Any, ...],
        free: tuple[float, ...],
        flags: tuple[Any, ...],
        constants: Constants,
    ) -> None:
        """Keep what Triton launched, if the key holds all that it depends on.

        Module constants that a kernel reads are no part of it: Triton refuses to launch after one of them has changed.
        """
        kernel = self.kernel
        if type(launched) is not CompiledKernel:
            return
        for parameter, value in zip(kernel.params[len(pointers) :], free, strict=False):
            if isinstance(value, int) and not (parameter.do_not_specialize and _is_int32(value)):
                return
        values = dict(zip(self.flags, flags, strict=True)) | constants.values
        tail = tuple(values[parameter.name] for parameter in kernel.params if parameter.is_constexpr)
        if len(self._remembered) >= REMEMBERED:
            self._remembered.clear()
        self._remembered[key] = _Compiled(launched.run, launched.function, launched.packed_metadata, tail, launched)


@lru_cache(maxsize=4096)
def specializations(numbers: tuple[int, ...]) -> tuple[tuple[str, str], ...]:
    """Triton's rule for integers: their type, and whether they are 1 or a multiple of 16."""
    return tuple(
        ("one", "") if n == 1 else ("i32" if _is_int32(n) else "i64", "D" if n % _MULTIPLE == 0 else "")
        for n in numbers
    )


@cache
def constants_of(config: Any) -> Constants:
    """The constexprs and options of a config, which are made once for each."""
    fields = dataclasses.asdict(config)
    return _interned(tuple((name, value) for name, value in fields.items() if name not in _HOST_FIELDS))


@cache
def _interned(items: tuple[tuple[str, Any], ...]) -> Constants:
    return Constants(dict(items))


@cache
def why_not_direct() -> str | None:
    """Reason why every launch goes through Triton's own path, or None."""
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    oldest, newest = _KNOWN_VERSIONS
    if not oldest <= version <= newest:
        return f"triton {triton.__version__} is not one of those whose launches are known"
    return None


def descriptor(matrix: Tensor, block: list[int]) -> TensorDescriptor:
    """`TensorDescriptor.from_tensor`, without its checks: the caller has asked `tma.tma_can_read`.

    Triton encodes sizes, strides and address anew at every launch; it has no argument that holds an encoded map.
    """
    made = object.__new__(TensorDescriptor)
    made.base, made.shape, made.strides, made.block_shape = matrix, matrix.shape, matrix.stride(), block
    return made


@cache
def _is_triton_s(run: Callable[..., Any]) -> bool:
    """Whether this is the method that Triton's file defines, and not one that a tool has put in its place."""
    code = getattr(run, "__code__", None)
    return code is not None and code.co_filename == JITFunction.create_binder.__code__.co_filename


def _as_float32(pointer: Any) -> Any:
    """A number that stands for a pointer, as a float: of whole ones Triton would compile variants."""
    return float(pointer) if isinstance(pointer, (int, float)) else pointer


def _is_int32(value: int) -> bool:
    return -_LARGEST_INT32 - 1 <= value <= _LARGEST_INT32
