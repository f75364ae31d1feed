"""What every test needs: a device, Triton's interpreter where there is no GPU, and poisoned allocations."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator

import pytest
import torch

HAS_CUDA = torch.cuda.is_available()
if not HAS_CUDA:
    # Read when a kernel is decorated, so it has to be set before the first import of a triton_* file.
    os.environ["TRITON_INTERPRET"] = "1"
    # Test processes run side by side; threads of one would wait for cores that another has.
    torch.set_num_threads(1)


def _mend_interpreter() -> None:
    """Make the interpreter's arithmetic that of a GPU, where it is not.

    It holds bfloat16 values as 16-bit integers and would multiply those; it cuts float32 to bfloat16 where a GPU rounds
    to the nearest; it multiplies TF32 operands with all their bits, where the tensor cores read the upper 19; and it
    sums rows one after another, where the threads of a GPU sum in a tree.
    """
    import numpy as np
    import triton.language as tl
    from triton._C.libtriton import ir
    from triton.runtime import interpreter

    create_dot = interpreter.InterpreterBuilder.create_dot
    convert_float = interpreter._convert_float
    sum_in_order = interpreter.ReduceOps.sum

    def as_multiplied(handle: interpreter.TensorHandle, is_tf32: bool) -> interpreter.TensorHandle:
        if handle.dtype.scalar == tl.bfloat16 and handle.data.dtype == np.uint16:
            values = (handle.data.astype(np.uint32) << 16).view(np.float32)
        elif handle.dtype.scalar == tl.float32 and is_tf32:
            values = (np.ascontiguousarray(handle.data).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)
        else:
            return handle
        return interpreter.TensorHandle(values, tl.float32)

    def create_dot_as_on_a_gpu(self, a, b, acc, input_precision, *rest):
        is_tf32 = input_precision == ir.INPUT_PRECISION.TF32
        return create_dot(self, as_multiplied(a, is_tf32), as_multiplied(b, is_tf32), acc, input_precision, *rest)

    def convert_float_to_nearest(values, source, target, rounding_mode):
        if source != tl.float32 or target != tl.bfloat16:
            return convert_float(values, source, target, rounding_mode)
        bits = np.ascontiguousarray(values).view(np.uint32).astype(np.uint64)
        rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
        return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)

    def sum_in_a_tree(self, values):
        if self.axis is None or not np.issubdtype(values.handle.data.dtype, np.floating):
            return sum_in_order(self, values)
        rows = np.moveaxis(values.handle.data, self.axis, 0)
        while rows.shape[0] > 1:
            half = rows.shape[0] // 2
            rows = rows[:half] + rows[half:]
        total = np.moveaxis(rows, 0, self.axis) if self.keep_dims else rows[0]
        return self.to_tensor(total, values.dtype)

    interpreter.InterpreterBuilder.create_dot = create_dot_as_on_a_gpu
    interpreter.ReduceOps.sum = sum_in_a_tree
    interpreter._convert_float = convert_float_to_nearest


# Where Triton is absent, the tests that need it say so themselves, through the backend's own reason.
if not HAS_CUDA and importlib.util.find_spec("triton") is not None:
    _mend_interpreter()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "gpu" in item.keywords and not HAS_CUDA:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; torch sees none"))


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where numerical tests run: the GPU if there is one, else the CPU."""
    return torch.device("cuda" if HAS_CUDA else "cpu")


@pytest.fixture
def poison() -> Iterator[None]:
    """Fill every new allocation with nan (floating) or the largest value (integer), so that unwritten outputs show."""
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = filled
