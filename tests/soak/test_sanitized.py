"""A launch or two of every CUDA C++ kernel, for compute-sanitizer, under which each takes a hundred times as long: the
smallest problems of the kernel's own check. Whether results are right is asked elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import peft_kernels  # noqa: F401  (declares the operators)
from peft_kernels import judge
from peft_kernels._core.device import Hardware, hardware
from peft_kernels._core.dispatch import Implementation
from peft_kernels._core.operator import OPERATORS, Operator

# Each with its operator, and part by part.
KERNELS: dict[str, tuple[Operator, Implementation, str]] = {
    f"{operator.name}-{part}": (operator, implementation, part)
    for operator in OPERATORS.values()
    for implementation in operator.to_check
    if implementation.name == "cuda"
    for part in implementation.qualification.parts
}


def smallest(implementation: Implementation, part: str, chip: Hardware, device: torch.device) -> tuple[Any, Tensor]:
    """The call of the part's smallest problem, and a gradient of its result."""
    qualification = implementation.qualification
    assert qualification is not None
    calls = [qualification.family.make(case, device, 0) for case in qualification.cases(part, chip)]
    return min(calls, key=lambda call: sum(x.nbytes for x in _tensors(call[0])))


def _tensors(call: Any) -> Iterator[Tensor]:
    return (x for x in call if isinstance(x, Tensor))


@pytest.mark.gpu
@pytest.mark.parametrize("name", KERNELS)
def test_cuda_kernel(name: str, device: torch.device) -> None:
    operator, implementation, part = KERNELS[name]
    reason = implementation.why_not_environment()
    if reason is not None:
        pytest.skip(reason)
    call, dy = smallest(implementation, part, hardware(device), device)
    reason = implementation.why_not(operator.make_problem(call))
    if reason is not None:
        pytest.skip(reason)
    for value in judge._run(operator, implementation, call, dy).values():
        assert value.isfinite().all()


@pytest.mark.cpu_only
def test_every_family_with_cuda_kernels_is_there() -> None:
    assert {name.partition("-")[0] for name in KERNELS} == {
        operator.name
        for operator in OPERATORS.values()
        if any(implementation.name == "cuda" for implementation in operator.to_check)
    }
    assert KERNELS


@pytest.mark.cpu_only
def test_problems_are_small() -> None:
    chip = Hardware(arch=90, sm_count=132)
    for _, implementation, part in KERNELS.values():
        call, _ = smallest(implementation, part, chip, torch.device("cpu"))
        assert sum(x.nbytes for x in _tensors(call)) < 8 << 20
