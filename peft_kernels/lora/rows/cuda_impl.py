"""Capability record of the CUDA backend: the decode kernel by rows, one launch for each member; backward as torch_impl.

S comes from the launch as the operator keeps it: a backward pass finds what every other implementation leaves. Imports
the extension only to ask or launch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_kernels._core import cuda_tools, extension
from peft_kernels._core.device import Hardware, hardware
from peft_kernels._core.dispatch import Implementation
from peft_kernels._core.qualification import Qualification, dtype_name, dtypes_of
from peft_kernels.lora.kernels import cuda_decode
from peft_kernels.lora.kernels.config import decode_config
from peft_kernels.lora.members import Gradients, Needs
from peft_kernels.lora.qualification import ROWS, RowsCase
from peft_kernels.lora.rows import torch_impl
from peft_kernels.lora.rows.problem import Inputs, LoraRowsProblem

HALVES = (torch.bfloat16, torch.float16)
VECTOR = 8  # half-precision elements in 16 bytes


def why_not(problem: LoraRowsProblem) -> str | None:
    """Reason why the kernel cannot run this problem, or None."""
    reason = cuda_tools.why_not_device(problem.device, cuda_decode.MINIMUM_ARCH)
    if reason is not None:
        return reason
    if problem.m > cuda_decode.MAX_TOKENS:
        return f"it takes at most {cuda_decode.MAX_TOKENS} rows, got {problem.m}"
    if problem.dtype not in HALVES:
        return f"it takes bfloat16 and float16, got {problem.dtype}"
    if problem.has_dropout:
        return "it has no dropout"
    if len(set(problem.members)) != len(problem.members):
        return f"a launch has one update, got updates of the members {problem.members}"
    if problem.k % VECTOR != 0:
        return f"it reads 16 bytes at a time, so K must be a multiple of {VECTOR}, got {problem.k}"
    if not all(problem.rows_aligned):
        return "it reads 16 bytes at a time, and rows of x, a weight or lora_a are strided or off 16-byte boundaries"
    largest = max(*problem.n, problem.k, *problem.r)
    if largest > cuda_decode.MAX_SIZE:
        return f"N, K and the sum of ranks must be at most {cuda_decode.MAX_SIZE}, got {largest}"
    return None


def forward(problem: LoraRowsProblem, inputs: Inputs) -> tuple[Tensor, ...]:
    """Return y_j (M, N_j) of each member, and S (M, sum of widths) float32."""
    s = torch.empty(problem.m, sum(problem.widths), dtype=torch.float32, device=problem.device)
    updates = {member: index for index, member in enumerate(problem.members) if problem.widths[index]}
    ys = [
        _decode(problem, inputs, updates[member], s)
        if member in updates
        else F.linear(inputs.x, inputs.weights[member], inputs.biases[member])
        for member in range(len(problem.n))
    ]
    return *ys, s


def backward(
    problem: LoraRowsProblem, inputs: Inputs, s: Tensor | None, dys: Sequence[Tensor | None], needs: Needs
) -> Gradients:
    """Return the gradients that ``needs`` asks for; a member whose dY is None takes part in none of them."""
    if s is not None and inputs.runs is None:
        # Where only the device knows the slots, torch_impl has each row of S in the row's own place.
        s = torch.empty_like(s).index_copy_(0, inputs.order.long(), s)
    return torch_impl.backward(problem, inputs, s, dys, needs)  # type: ignore[arg-type]


def _decode(problem: LoraRowsProblem, inputs: Inputs, index: int, s: Tensor) -> Tensor:
    """y (M, N) of an update's member; S goes to the update's columns."""
    member, width = problem.members[index], problem.widths[index]
    slots = cuda_decode.Slots(inputs.slot, inputs.order, inputs.tables[index], inputs.scales[index], width)
    chosen = cuda_decode.most_chosen(problem.m, problem.slots, problem.r[index], width)
    return cuda_decode.decode_rows(
        inputs.x,
        inputs.weights[member],
        inputs.lora_a[index],
        inputs.lora_b[index],
        inputs.biases[member],
        slots,
        s[:, problem.columns[index]],
        decode_config(problem.n[member], problem.k, chosen, hardware(problem.device)),
    )


def _touched(problem: LoraRowsProblem) -> tuple[str, ...]:
    kinds = [adapter for adapter, width in zip(problem.adapter_dtypes, problem.widths, strict=True) if width]
    return tuple(dict.fromkeys(dtype_name(problem.dtype, adapter).replace("tf32", "float32") for adapter in kinds))


def _cases(part: str, hardware: Hardware) -> Sequence[RowsCase]:
    """A slot for each row, in four tiles of ranks; slots of none, of some and of most, and ranks of 0; one row."""
    dtypes = dtypes_of(part)
    return (
        RowsCase(16, (1031, 200), 1024, (1,) * 16, (16,) * 16, (0.0,) * 16, *dtypes),
        RowsCase(13, (200,), 520, (5, 0, 6), (64, 8, 3), (0.0,) * 3, *dtypes),
        RowsCase(7, (64,), 4104, (2, 0, 1, 3), (130, 40, 0, 33), (0.0,) * 4, *dtypes),
        RowsCase(1, (72,), 264, (0, 1), (3, 5), (0.0,) * 2, *dtypes),
    )


QUALIFICATION = Qualification(
    ROWS.family,
    ("bfloat16", "bfloat16+float32", "float16", "float16+float32"),
    _touched,
    _cases,
    quick=("bfloat16",),
    alone=True,
)

IMPLEMENTATION = Implementation(
    name="cuda",
    why_not_environment=extension.why_not,
    why_not=why_not,
    qualification=QUALIFICATION,
    forward=forward,
    backward=backward,
    borrows=("torch",),
)
