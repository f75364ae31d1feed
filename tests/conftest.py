"""What every test needs: a device, Triton's interpreter where there is no GPU, and poisoned allocations."""

from __future__ import annotations

import copy
import importlib.util
import os
import sys
import tempfile
from collections.abc import Iterator

import pytest
import torch

HAS_CUDA = torch.cuda.is_available()
# A plugin may have been asked to compile for a GPU that is not here; then nothing is interpreted.
INTERPRETS = not HAS_CUDA and "tests.on_gpu.compiles" not in sys.modules
if INTERPRETS:
    # Read when a kernel is decorated, so it has to be set before the first import of a triton_* file.
    os.environ["TRITON_INTERPRET"] = "1"
if not HAS_CUDA:
    # Test processes run side by side; threads of one would wait for cores that another has.
    torch.set_num_threads(1)


def _mend_interpreter() -> None:
    """Make the interpreter's arithmetic that of a GPU, where it is not, and the same on every processor.

    Before Triton 3.6 it also asks of descriptors that their rows be 16 elements apart, where a GPU asks for 16 bytes.

    It holds bfloat16 values as 16-bit integers and would multiply those; it cuts float32 to bfloat16 where a GPU rounds
    to the nearest; it multiplies TF32 operands with all their bits, where the tensor cores read the upper 19; and it
    sums rows one after another, where the threads of a GPU sum in a tree.

    It leaves products to numpy's BLAS, which sums in an order that it chooses by processor, and the exponential to
    instructions that not every processor has. Here a product is summed as by the instructions that a GPU would run:

    - float32 by fused multiply-adds, one product after another, each sum rounded once: FFMA, which Triton makes of such
      a tl.dot (GenericFMAVectorMultiplier in its FMA.cpp). Triton's chain runs through all of a loop over k; here one
      ends after 64 products and is added to the accumulator, because the error budget compares with eager torch on this
      processor. Its chains end by 256 (MKL's AVX2 code; its SSE2 code's by 128), and one of 256 would be 1.4 times as
      wrong whatever the kernel does.
    - half precision and TF32 as a tensor core does, 32 bytes of an operand's row at a time, which is the k of wgmma and
      of the largest mma.sync (PTX ISA, "Matrix Shape"): 16 products or 8, exact, and the accumulator, in one sum. It is
      rounded to the nearest here; hardware drops bits below those of its largest addend, and before Hopper it sums
      half of them at a time (Fasi et al., Numerical behavior of NVIDIA tensor cores, PeerJ CS 2021).
    - exp and exp2 as the float64 result, rounded. A GPU's ex2.approx is within two units in the last place of that.

    Sums are taken in float64 and then rounded to the accumulator. For FFMA those are two roundings; they differ from
    one where float64 lands on the middle of two float32 values, once in 2^29 sums.
    """
    import numpy as np
    import triton
    import triton.language as tl
    from triton._C.libtriton import ir
    from triton.runtime import interpreter

    create_dot = interpreter.InterpreterBuilder.create_dot
    unary_op = interpreter.InterpreterBuilder.unary_op
    validate = interpreter.TensorDescHandle.validate
    convert_float = interpreter._convert_float
    sum_in_order = interpreter.ReduceOps.sum
    multiplied = (tl.float32, tl.bfloat16, tl.float16)

    def as_multiplied(handle: interpreter.TensorHandle, is_tf32: bool) -> np.ndarray:
        if handle.dtype.scalar == tl.bfloat16:
            return (handle.data.astype(np.uint32) << 16).view(np.float32)
        if handle.dtype.scalar == tl.float32 and is_tf32:
            return (np.ascontiguousarray(handle.data).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)
        return handle.data

    def add_products(total: np.ndarray, columns: np.ndarray, rows: np.ndarray, at_a_time: int) -> None:
        at_a_time = min(at_a_time, len(columns))
        products = np.empty((at_a_time, *total.shape))
        for k in range(0, len(columns), at_a_time):
            np.multiply(columns[k : k + at_a_time], rows[k : k + at_a_time], out=products)
            addend = products[0] if at_a_time == 1 else np.add.reduce(products, axis=0)
            np.add(addend, total, out=total, casting="same_kind")

    def create_dot_as_on_a_gpu(self, a, b, acc, input_precision, *rest):
        if a.dtype.scalar not in multiplied:
            # No kernel has one; integers are exact in any order.
            return create_dot(self, a, b, acc, input_precision, *rest)
        is_tf32 = input_precision == ir.INPUT_PRECISION.TF32
        # k is the first dimension of both, and what is left at each k makes a matrix of products.
        columns = np.moveaxis(as_multiplied(a, is_tf32), -1, 0)[..., :, None].astype(np.float64)
        rows = np.moveaxis(as_multiplied(b, is_tf32), -2, 0)[..., None, :].astype(np.float64)
        total = acc.data.copy()
        with np.errstate(over="ignore", invalid="ignore"):
            if a.dtype.scalar != tl.float32 or is_tf32:
                add_products(total, columns, rows, at_a_time=8 if a.dtype.scalar == tl.float32 else 16)
            else:
                for k in range(0, len(columns), 64):
                    chain = np.zeros_like(total)
                    add_products(chain, columns[k : k + 64], rows[k : k + 64], at_a_time=1)
                    total += chain
        return interpreter.TensorHandle(total, acc.dtype.scalar)

    def unary_op_in_float64(self, handle, function):
        if function not in (np.exp, np.exp2) or handle.dtype.scalar != tl.float32:
            return unary_op(self, handle, function)
        with np.errstate(over="ignore"):
            return interpreter.TensorHandle(function(handle.data, dtype=np.float64).astype(np.float32), tl.float32)

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

    def validate_in_bytes(self):
        itemsize = self.base.dtype.element_ty.primitive_bitwidth // 8
        described = copy.copy(self)
        *outer, inner = self.strides
        described.strides = [*(interpreter.TensorHandle(each.data * itemsize, each.dtype) for each in outer), inner]
        validate(described)

    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 6):
        interpreter.TensorDescHandle.validate = validate_in_bytes
    interpreter.InterpreterBuilder.create_dot = create_dot_as_on_a_gpu
    interpreter.InterpreterBuilder.unary_op = unary_op_in_float64
    interpreter.ReduceOps.sum = sum_in_a_tree
    interpreter._convert_float = convert_float_to_nearest


# Where Triton is absent, the tests that need it say so themselves, through the backend's own reason.
if INTERPRETS and importlib.util.find_spec("triton") is not None:
    _mend_interpreter()


def pytest_configure(config: pytest.Config) -> None:
    # What a worker has compiled, the others find; they inherit the variable.
    if not hasattr(config, "workerinput"):
        folder = tempfile.TemporaryDirectory(prefix="peft-kernels-tests-")
        os.environ["PEFT_KERNELS_TESTS_BUILD"] = folder.name
        config.add_cleanup(folder.cleanup)


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


@pytest.fixture(autouse=True)
def plans_of_its_own() -> None:
    """No test goes on with choices that another one made, perhaps on a device that was not there."""
    from peft_kernels._core import dispatch

    dispatch.choices_changed()
