"""The CUDA backend on CPU tensors: launchers as they are, device bodies in the emulator."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from peft_kernels._core import cuda_tools, extension
from peft_kernels.lora.linear import problem
from tests.lora import simt_decode, simt_decode_four_bit, simt_decode_rows
from tests.lora.emulated_reduce import EmulatedReduce


def install(monkeypatch: pytest.MonkeyPatch) -> EmulatedExtension:
    """Put the stand-in where the extension is asked for, and let CPU tensors pass for a GPU's."""
    stand_in = EmulatedExtension()

    @contextlib.contextmanager
    def stream_of(device: torch.device) -> Iterator[int]:
        yield 0

    monkeypatch.setattr(extension, "load", lambda: stand_in)
    monkeypatch.setattr(cuda_tools, "why_not_device", lambda device, minimum_arch: None)
    monkeypatch.setattr(cuda_tools, "stream_of", stream_of)
    monkeypatch.setattr(problem, "_can_be_launched_on", lambda x: True)
    return stand_in


class EmulatedExtension:
    """Stands for the extension: its launches read and write the CPU's memory at the addresses they are given, and
    compute by the device bodies in the emulator."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []
        self.reduce = EmulatedReduce()
        self.lora = SimpleNamespace(
            decode_workspace=self.workspace,
            decode_forward=self.forward,
            decode_rows=self.rows,
            decode_four_bit=self.four_bit,
            reduce_workspace=self.reduce.workspace,
            reduce_rows=self.reduce.launch,
            GEMM_MAX_RANK=128,
        )

    @staticmethod
    def workspace(m: int, n: int, k: int, r: int, splits: int, down_splits: int) -> tuple[int, int]:
        down, base = -(-r // 64), -(-n // 64)
        flags = down * down_splits + base * splits
        return flags, 8 * flags + (flags - down - base) * m * 64 * 4

    def forward(self, **call: Any) -> None:
        self.calls.append(call)
        m, n, k, r = (call[name] for name in ("m", "n", "k", "r"))
        dtype, adapter = getattr(torch, call["dtype"]), getattr(torch, call["adapter_dtype"])
        shapes = {"x": (m, k), "weight": (n, k), "lora_a": (r, k), "lora_b": (n, r), "bias": (n,), "scale": (1,)}
        dtypes = {"lora_a": adapter, "lora_b": adapter, "scale": torch.float32}
        inputs, arguments = _read(call, shapes, dtypes, dtype)
        y, s = simt_decode.run_on(dtype, adapter, inputs, arguments, schedules=1, first_seed=len(self.calls))
        _write(call["y"], y)
        _write(call["s"], s)

    def rows(self, **call: Any) -> None:
        self.calls.append(call)
        m, n, k, r, slots = (call[name] for name in ("m", "n", "k", "a_rows", "slots"))
        dtype, adapter = getattr(torch, call["dtype"]), getattr(torch, call["adapter_dtype"])
        shapes = {"x": (m, k), "weight": (n, k), "lora_a": (r, k), "lora_b": (n, r), "bias": (n,)}
        shapes |= {"scales": (slots,), "slot": (m,), "order": (m,), "table": (2, slots)}
        dtypes = {"lora_a": adapter, "lora_b": adapter, "scales": torch.float32}
        dtypes |= dict.fromkeys(("slot", "order", "table"), torch.int32)
        inputs, arguments = _read({name: value for name, value in call.items() if name != "s"}, shapes, dtypes, dtype)
        address, stride = call["s"]
        arguments |= {"s_0": stride, "s_column": 0}
        y, s = simt_decode_rows.run_on(dtype, adapter, inputs, arguments, schedules=1, first_seed=len(self.calls))
        _write(call["y"], y)
        for row, values in enumerate(s):
            # What the launch has not written is somebody else's.
            _write(address + 4 * stride * row, values[: int((~values.isnan()).sum())])

    def four_bit(self, **call: Any) -> None:
        self.calls.append(call)
        m, n, k, r = (call[name] for name in ("m", "n", "k", "r"))
        dtype, adapter = getattr(torch, call["dtype"]), getattr(torch, call["adapter_dtype"])
        blocks, is_nested = n * k >> call["block_shift"], call["code"] != 0
        shapes = {"x": (m, k), "lora_a": (r, k), "lora_b": (n, r), "bias": (n,), "scale": (1,), "offset": (1,)}
        shapes |= {"codes": (n * k // 2,), "scales": (blocks,), "code": (256,)}
        shapes |= {"second": (-(-blocks >> call["second_shift"]),)}
        dtypes = {"lora_a": adapter, "lora_b": adapter, "codes": torch.uint8}
        dtypes |= dict.fromkeys(("scale", "offset", "code", "second", "scales"), torch.float32)
        dtypes |= {"scales": torch.uint8} if is_nested else {}
        first, *rest = call["values"]
        given = {name: value for name, value in call.items() if name != "values"}
        given |= {name: (call[name],) for name in ("codes", "scales", "code", "second")}
        inputs, arguments = _read(given, shapes, dtypes, dtype)
        arguments |= {"values": first, **{f"values_{i}": value for i, value in enumerate(rest)}}
        seed = len(self.calls)
        y, s, _ = simt_decode_four_bit.run_on(dtype, adapter, inputs, arguments, schedules=1, first_seed=seed)
        _write(call["y"], y)
        _write(call["s"], s)


def _read(
    call: dict[str, Any], shapes: dict[str, tuple[int, ...]], dtypes: dict[str, torch.dtype], dtype: torch.dtype
) -> tuple[dict[str, Tensor | None], dict[str, Any]]:
    """The tensors of a call by their names, and its other arguments with their strides."""
    inputs: dict[str, Tensor | None] = {}
    arguments = {**call, "nonce": 0, "repeat_nonce": 0, "zero_flags": 0}
    for name, shape in shapes.items():
        address, *rest = arguments.pop(name) or (0, 0)
        inputs[name] = _memory(address, shape, rest, dtypes.get(name, dtype)) if address else None
        arguments |= {f"{name}_{i}": value for i, value in enumerate(rest)}
    return inputs, arguments


def _write(address: int, value: Tensor) -> None:
    ctypes.memmove(address, value.data_ptr(), value.numel() * value.element_size())


def _memory(address: int, shape: tuple[int, ...], strides: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The elements from the first to the last that a strided tensor reaches; a stride that is not given is 1."""
    last = sum((size - 1) * stride for size, stride in zip(shape, (*strides, 1), strict=False) if size > 1)
    content = ctypes.string_at(address, (last + 1) * dtype.itemsize)
    return torch.frombuffer(bytearray(content), dtype=dtype)
