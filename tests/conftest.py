"""What every test needs: a device, Triton's interpreter where there is no GPU, and poisoned allocations."""

from __future__ import annotations

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
    """Make the interpreter multiply bfloat16 by value: it holds them as 16-bit integers and would multiply those."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    def as_float32(handle: interpreter.TensorHandle) -> interpreter.TensorHandle:
        if handle.dtype.scalar != tl.bfloat16 or handle.data.dtype != np.uint16:
            return handle
        values = (handle.data.astype(np.uint32) << 16).view(np.float32)
        return interpreter.TensorHandle(values, tl.float32)

    create_dot = interpreter.InterpreterBuilder.create_dot

    def create_dot_by_value(self, a, b, *rest):  # type: ignore[no-untyped-def]
        return create_dot(self, as_float32(a), as_float32(b), *rest)

    interpreter.InterpreterBuilder.create_dot = create_dot_by_value


if not HAS_CUDA:
    try:
        import triton  # noqa: F401
    except ImportError:
        pass  # the tests that need Triton say so themselves, through the backend's own reason
    else:
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
