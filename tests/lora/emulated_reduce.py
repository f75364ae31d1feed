"""The reduce kernel on the CPU's memory: its launcher's calls, by the device body in the emulator."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tests.lora import simt_reduce


class EmulatedReduce:
    """reduce_rows reads and writes at the addresses it is given; its workspace is the program's own."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    @staticmethod
    def workspace(m: int, n: int, k: int, r: int, exact: bool, narrow: bool, multiprocessors: int) -> tuple[int, int]:
        ranks, rows, per_sm = (32, 32, 2) if r <= 32 else (128, 16, 1)
        if exact or narrow:
            ranks, rows, per_sm = 32, 32, 1
        units = (-(-n // 256) - (-k // 256)) * -(-r // ranks)
        blocks = min(multiprocessors * per_sm, max(units, units * -(-m // rows) // 4))
        tickets = units + units % 2
        return tickets, 8 * tickets + 4 * (blocks + units - 1) * 256 * 2 * (ranks // 8 + 1) * 4

    def launch(self, **call: Any) -> None:
        self.calls.append(call)
        m, n, k, r = (call[name] for name in ("m", "n", "k", "r"))
        dtype, adapter = getattr(torch, call["dtype"]), getattr(torch, call["adapter_dtype"])
        task = simt_reduce.Task(
            m, n, k, r, dtype, adapter, call["db"] is not None, bool(call["dbias"]), call["da"] is not None,
            bool(call["ds_parts"]), call["threshold"], multiprocessors=3,
        )  # fmt: skip
        shapes = {
            "dy": ((m, n), dtype),
            "s": ((m, r), torch.float32),
            "scale": ((1,), torch.float32),
            "x": ((m, k), dtype),
            "ds": ((m, r), torch.float32),
            "seed": ((1,), torch.int64),
            "lora_b": ((n, r), adapter),
        }
        outputs = {
            "db": ((n, r), adapter),
            "dbias": ((n,), dtype),
            "da": ((r, k), adapter),
            "ds_parts": ((-(-n // 256), m, r), torch.float32),
        }
        arguments = {**call, "nonce": 0, "multiprocessors": 3, "variant": task.variant, "resident": 0}
        arguments |= {"repeat_nonce": 0, "zero_tickets": 0}
        for name in ("dy", "x"):
            arguments[f"{name}_0"] = 0
        for name in ("db", "da", "lora_b"):
            arguments |= {f"{name}_0": 0, f"{name}_1": 0}
        inputs, addresses = {}, {}
        for name in (*shapes, *outputs):
            given = arguments.pop(name)
            address, *rest = given if isinstance(given, tuple) else (given or 0,)
            arguments |= {f"{name}_{i}": value for i, value in enumerate(rest)}
            if name in outputs:
                addresses[name] = address
            else:
                shape, element = shapes[name]
                inputs[name] = memory(address, shape, rest if len(shape) > 1 else (), element) if address else None
        asked = {name: (*outputs[name], bool(address)) for name, address in addresses.items()}
        got = simt_reduce.run_program(task, inputs, asked, arguments, schedules=1, first_seed=len(self.calls))
        for name, value in got.items():
            ctypes.memmove(addresses[name], value.data_ptr(), value.numel() * value.element_size())


def memory(address: int, shape: tuple[int, ...], strides: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The elements from the first to the last that a strided tensor reaches; (m, r) without strides is contiguous."""
    strides = (*strides, 1) if len(strides) == 1 else strides or torch.empty(shape, device="meta").stride()
    last = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    content = ctypes.string_at(address, (last + 1) * dtype.itemsize)
    return torch.frombuffer(bytearray(content), dtype=dtype)
