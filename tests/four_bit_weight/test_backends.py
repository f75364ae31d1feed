"""What the decoder's backends owe beside the contract: equal bits, whatever the bytes are."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from peft_kernels._core.triton_tools import why_not_environment
from peft_kernels.four_bit_weight import torch_impl
from peft_kernels.four_bit_weight.composite import composite
from peft_kernels.four_bit_weight.op import OPERATOR as CORE
from peft_kernels.four_bit_weight.problem import Inputs, make_problem
from tests.contract.operators import CPU
from tests.four_bit_weight.cases import BACKENDS, BLOCKS, HALF_AND_FLOAT, KINDS, OPERATOR, Case, eager, fixed, make

pytestmark = pytest.mark.usefixtures("poison")
each_backend = pytest.mark.parametrize("backend", BACKENDS)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _call(case: Case, tensors: Any, backend: str) -> Tensor:
    with OPERATOR.using(backend) as name:
        return OPERATOR.call(case, tensors, name)


@st.composite
def _cases(draw: Any) -> Case:
    kind = draw(st.sampled_from(KINDS))
    rest = {"dtype": draw(st.sampled_from(HALF_AND_FLOAT)), "strided": draw(st.booleans())}
    if kind in BLOCKS:
        return fixed(kind, draw(st.integers(1, 5)), draw(st.integers(1, 20)), **rest)
    second, block = draw(st.sampled_from([0, 1, 5, 256])), 2 ** draw(st.integers(4, 13))
    return Case(kind, (draw(st.integers(1, 5)), draw(st.integers(1, 3000))), block=block, second=second, **rest)


@each_backend
@settings(max_examples=40, deadline=None)
@given(case=_cases(), seed=st.integers(0, 100))
def test_bits_are_eager_s(backend: str, case: Case, seed: int) -> None:
    """Every product and sum of the format is rounded, and each once."""
    tensors = make(case, CPU, seed)
    assert torch.equal(_bits(_call(case, tensors, backend)), _bits(eager(case, tensors)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", HALF_AND_FLOAT)
@each_backend
def test_every_byte_of_a_scale(kind: str, dtype: torch.dtype, backend: str) -> None:
    """Below normal numbers, nan, and past the end of half precision; with every code."""
    block = BLOCKS.get(kind, 64)
    second = 0 if kind in BLOCKS else 16
    case = Case(kind, (256, block), dtype, block, second)
    tensors = make(case, CPU)
    tensors = tensors._replace(scales=torch.arange(256, dtype=torch.uint8))
    if tensors.code is not None:
        code = tensors.code.clone()
        code[:4] = torch.tensor([math.inf, math.nan, 1e-44, 3e38])
        tensors = tensors._replace(code=code)
    got, expected = _call(case, tensors, backend), eager(case, tensors)
    assert torch.equal(got.isnan(), expected.isnan())
    assert torch.equal(_bits(got.nan_to_num(7.0)), _bits(expected.nan_to_num(7.0)))
    if kind == "mxfp4":
        assert got[255].isnan().all() and not got[:255].isnan().any()
    if kind == "nvfp4":
        assert got[127].isnan().all() and got[255].isnan().all() and not got[128:255].isnan().any()


@each_backend
def test_a_lazy_sign_is_read(backend: str) -> None:
    """Of scales and of what is nested: their memory holds the other sign."""
    for case in (Case(), Case(second=2), fixed("nvfp4", 2, 3)):
        tensors = make(case, CPU)
        floats = {name: x for name, x in tensors._asdict().items() if x is not None and x.is_floating_point()}
        lazy = {name: torch.complex(x, -x).conj().imag for name, x in floats.items()}
        assert lazy and all(x.is_neg() for x in lazy.values())
        got = _call(case, tensors._replace(**lazy), backend)
        assert torch.equal(got, _call(case, tensors, backend))


@pytest.mark.parametrize("piece", [16, 100, 256, 4096])
@pytest.mark.parametrize("second", [0, 3])
def test_pieces_are_joined(piece: int, second: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a piece is shorter than a block, and ends within a nested one."""
    case = Case(shape=(3, 1001), second=second)
    tensors = make(case, CPU)
    monkeypatch.setattr(torch_impl, "PIECE", piece)
    assert torch.equal(_bits(_call(case, tensors, "torch")), _bits(eager(case, tensors)))


@pytest.mark.parametrize(
    "case", [Case(second=2), Case("fp4"), fixed("mxfp4", 3, 5), fixed("nvfp4", 3, 5)], ids=lambda case: case.kind
)
def test_float64_is_computed_in_it(case: Case) -> None:
    """Nothing is rounded to float32 on the way, so it is the oracle's."""
    wide = Case(case.kind, case.shape, torch.float64, case.block, case.second)
    tensors = make(wide, CPU)
    y, _ = OPERATOR.oracle(wide, tensors, torch.empty(0))
    torch.testing.assert_close(OPERATOR.call(wide, tensors), y, rtol=1e-15, atol=0)
    assert not torch.equal(OPERATOR.call(case, tensors).double(), y) or case.kind == "mxfp4"


def _inputs(case: Case) -> Inputs:
    tensors = make(case, CPU)
    return Inputs(
        tensors.packed, tensors.scales, tensors.code, tensors.absmax,
        0.0 if tensors.offset is None else tensors.offset,
        1.0 if tensors.global_scale is None else tensors.global_scale,
        case.kind, case.shape, case.dtype, case.block, case.second,
    )  # fmt: skip


@pytest.mark.parametrize("case", [*OPERATOR.kinds, Case(shape=(), second=1)], ids=str)
def test_composite_has_the_bits(case: Case) -> None:
    call = _inputs(case)
    assert torch.equal(_bits(composite(make_problem(call), call)), _bits(OPERATOR.call(case, make(case, CPU))))


@pytest.mark.cpu_only
def test_offsets_beyond_two_to_the_31(monkeypatch: pytest.MonkeyPatch) -> None:
    """One program alone, the last of a weight of 2^32 + 4096 elements; pages that nobody touches take no memory."""
    if reason := why_not_environment():
        pytest.skip(reason)
    from triton.runtime import interpreter

    case = Case(shape=(2, 2048), dtype=torch.bfloat16, second=256)
    small = make(case, CPU)
    n, program = 2**32 + case.n, 2**20
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        packed = torch.empty(n // 2, dtype=torch.uint8)
        scales = torch.empty(n // case.block, dtype=torch.uint8)
        absmax = torch.empty(scales.numel() // 256 + 1)
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = filled
    packed[-case.n // 2 :], scales[-case.blocks :], absmax[-1:] = small.packed, small.scales, small.absmax
    builder, set_grid_dim = interpreter.interpreter_builder, interpreter.interpreter_builder.set_grid_dim
    monkeypatch.setattr(builder, "set_grid_dim", lambda *grid: set_grid_dim(1, 1, 1))
    grid_of, outs = interpreter.GridExecutor.__call__, []

    def last_program(self: Any, *args: Any, **kwargs: Any) -> None:
        assert self.grid == (program + 1, 1, 1)
        set_grid_idx = builder.set_grid_idx
        monkeypatch.setattr(builder, "grid_dim", (program + 1, 1, 1), raising=False)
        monkeypatch.setattr(builder, "set_grid_idx", lambda x, y, z: set_grid_idx_far(x + program))

        def set_grid_idx_far(x: int) -> None:
            builder.grid_idx = (x, 0, 0)

        self.grid = (1, 1, 1)
        outs.append(args[6])
        grid_of(self, *args, **kwargs)
        monkeypatch.setattr(builder, "set_grid_idx", set_grid_idx)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", last_program)
    call = Inputs(packed, scales, small.code, absmax, small.offset, 1.0, "nf4", (n,), case.dtype, case.block, 256)
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        implementation = CORE.implementations[0]
        got = implementation.forward(make_problem(call), call)
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = filled
    assert torch.equal(got[-case.n :], OPERATOR.call(case, small).flatten())
