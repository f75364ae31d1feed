"""Problems of the family of 4-bit weights, and what its operator owes."""

from __future__ import annotations

import contextlib
import itertools
import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from peft_kernels.four_bit_weight import op
from python_ref import four_bit_weight as oracle
from tests.contract.draw import Draw, dtypes_name
from tests.contract.operators import Operator

BACKENDS = ("torch", "triton")
KINDS = tuple(oracle.TABLES)
BLOCKS = {"mxfp4": 32, "nvfp4": 16}
HALF_AND_FLOAT = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    """One problem.

    Attributes:
        second: the nested block; 0 where scales are float32.
        scalars: whether the offset and the global scale are tensors.
        strided: whether no tensor is contiguous.
    """

    kind: str = "nf4"
    shape: tuple[int, ...] = (7, 33)
    dtype: torch.dtype = torch.float32
    block: int = 64
    second: int = 0
    scalars: bool = True
    strided: bool = False

    @property
    def n(self) -> int:
        return math.prod(self.shape)

    @property
    def blocks(self) -> int:
        return -(-self.n // self.block)

    @property
    def y_shape(self) -> tuple[int, ...]:
        return self.shape

    @property
    def y_dtype(self) -> torch.dtype:
        return self.dtype

    def __str__(self) -> str:
        shape, nested = "x".join(map(str, self.shape)), f"-nested{self.second}" * bool(self.second)
        flags = "-floats" * (not self.scalars) + "-strided" * self.strided
        return f"{self.kind}-{shape}-{dtypes_name(self.dtype)}-block{self.block}{nested}{flags}"


class Tensors(NamedTuple):
    packed: Tensor
    scales: Tensor
    code: Tensor | None
    absmax: Tensor | None
    offset: Tensor | None
    global_scale: Tensor | None


def fixed(kind: str, *shape: int, **rest: Any) -> Case:
    """A case of a format whose block is fixed; the last size counts blocks."""
    return Case(kind, (*shape[:-1], shape[-1] * BLOCKS[kind]), block=BLOCKS[kind], **rest)


GRID = (
    *(
        Case(kind, dtype=dtype, second=second)
        for kind in ("nf4", "fp4")
        for dtype in HALF_AND_FLOAT
        for second in (0, 2)
    ),
    *(fixed(kind, 3, 5, 3, dtype=dtype) for kind in BLOCKS for dtype in HALF_AND_FLOAT),
    # A program of Triton's decodes 4096 elements: whole ones and a part of one, and blocks that are longer.
    Case(shape=(2, 4096), dtype=torch.bfloat16),
    Case(shape=(3, 4099), dtype=torch.bfloat16, second=256),
    Case(shape=(13000,), block=4096),
    Case(shape=(5, 3001), block=8192, second=1),
    Case(shape=(4, 1025), block=16, dtype=torch.float16),
    Case("fp4", (65, 130), block=128, second=3, scalars=False),
    fixed("mxfp4", 64, 9, dtype=torch.bfloat16),
    fixed("nvfp4", 64, 17, dtype=torch.bfloat16, scalars=False),
    Case(shape=(1,)),
    Case(shape=()),
    Case(shape=(2, 1, 3, 1, 5)),
    *(Case(kind, (6, 96), block=BLOCKS.get(kind, 64), second=2 * (kind == "nf4"), strided=True) for kind in KINDS),
)


def make(case: Case, device: torch.device, seed: int = 0) -> Tensors:
    """Draw codes and scales: those of MXFP4 and NVFP4 so that half precision holds the results, and no nan."""
    draw = Draw(seed)
    generator, least, end = draw.generator, *{"mxfp4": (118, 134), "nvfp4": (36, 80)}.get(case.kind, (0, 256))

    def codes(least: int, end: int, count: int) -> Tensor:
        return torch.randint(least, end, (count,), generator=generator).to(torch.uint8)

    packed, is_bytes = codes(0, 256, (case.n + 1) // 2), case.second > 0 or case.kind in BLOCKS
    scales = codes(least, end, case.blocks) if is_bytes else draw.normal(case.blocks).float()
    code = draw.normal(256).float() if case.second else None
    absmax = draw.normal(-(-case.blocks // case.second), std=0.1).float() if case.second else None
    offset = draw.normal(1)[0].float() if case.second else None
    global_scale = draw.normal(1)[0].float() if case.kind == "nvfp4" else None
    tensors = Tensors(packed, scales, code, absmax, offset, global_scale)
    if case.strided:
        tensors = tensors._make(x if x is None or x.dim() == 0 else torch.stack((x, x), -1)[..., 0] for x in tensors)
    return tensors._make(None if x is None else x.to(device) for x in tensors)


def make_exact(case: Case, device: torch.device, seed: int = 0) -> tuple[Tensors, Tensor]:
    """Scales that are powers of two round nothing."""
    tensors, draw = make(case, device, seed), Draw(seed)

    def powers(like: Tensor | None) -> Tensor | None:
        if like is None or not like.is_floating_point():
            return like
        return torch.exp2(draw.integers(2, like.numel())).to(like).reshape(like.shape)

    exact = tensors._make(map(powers, tensors))
    if exact.offset is not None:
        exact = exact._replace(offset=torch.zeros_like(exact.offset))
    return exact, OPERATOR.output_gradient(case, device, seed)


def _number(case: Case, tensor: Tensor | None) -> Any:
    return tensor if tensor is None or case.scalars else float(tensor)


def arguments(case: Case, tensors: Tensors) -> dict[str, Any]:
    nested = None
    if tensors.code is not None:
        nested = (tensors.code, tensors.absmax, case.second, _number(case, tensors.offset))
    return {
        "packed": tensors.packed,
        "kind": case.kind,
        "shape": case.shape,
        "dtype": case.dtype,
        "scales": tensors.scales,
        "block_size": case.block,
        "nested": nested,
        "global_scale": _number(case, tensors.global_scale),
    }


def eager(case: Case, tensors: Tensors) -> Tensor:
    given = arguments(case, tensors)
    given["global_scale"] = 1.0 if given["global_scale"] is None else given["global_scale"]
    return oracle.eager(**{"block" if name == "block_size" else name: value for name, value in given.items()})


def _oracle(case: Case, tensors: Tensors, dy: Tensor) -> tuple[Tensor, Any]:
    nested = None
    if tensors.code is not None and tensors.absmax is not None and tensors.offset is not None:
        nested = oracle.Nested(tensors.code.tolist(), tensors.absmax.tolist(), case.second, float(tensors.offset))
    global_scale = 1.0 if tensors.global_scale is None else float(tensors.global_scale)
    given = tensors.packed.tolist(), case.kind, case.n, tensors.scales.tolist(), case.block, nested, global_scale
    y = torch.tensor(oracle.dequantize(*given), dtype=torch.float64, device=dy.device)
    return y.reshape(case.shape), None


def _exact_cases() -> st.SearchStrategy[Case]:
    """Half precision holds six bits: those of E2M1 and E4M3 together."""
    lengths, sizes = st.integers(1, 3000), st.integers(1, 9)
    flags = {"scalars": st.booleans(), "strided": st.booleans()}
    free = st.builds(
        lambda kind, n, **rest: Case(kind, (n,), **rest),
        kind=st.sampled_from(["nf4", "fp4"]),
        n=lengths,
        block=st.sampled_from([16, 32, 64, 128, 4096]),
        second=st.sampled_from([0, 1, 3, 256]),
        **flags,
    )
    whole = st.builds(
        lambda kind, rows, count, **rest: fixed(kind, rows, count, **rest),
        kind=st.sampled_from(list(BLOCKS)),
        rows=sizes,
        count=sizes,
        dtype=st.sampled_from(HALF_AND_FLOAT),
        **flags,
    )
    return st.one_of(free, whole)


OPERATOR = Operator(
    function=op.dequantize,
    op=op,
    differentiable=(),
    variants=BACKENDS,
    pin=contextlib.nullcontext,
    make=make,
    make_exact=make_exact,
    arguments=arguments,
    eager=eager,
    oracle=_oracle,
    draws=lambda case: min(8, 200 // case.n),
    unrounded=("y",),
    budget=tuple(itertools.product(GRID, BACKENDS)),
    exact=_exact_cases(),
    exact_draws=40,
    exact_examples=(Case(), Case("fp4", (129,), second=2), fixed("mxfp4", 2, 3, dtype=torch.bfloat16)),
    repeated=tuple(itertools.product((Case(dtype=torch.bfloat16, second=2), fixed("nvfp4", 3, 4)), BACKENDS)),
    typical=Case(second=2),
    kinds=(Case(second=2), Case("fp4", dtype=torch.bfloat16), fixed("mxfp4", 2, 3), fixed("nvfp4", 2, 3)),
    gradcheck=(),
    far=None,
    empty=(Case(shape=(0, 5)), Case(shape=(3, 0), second=2), fixed("mxfp4", 0, 2), fixed("nvfp4", 3, 0)),
    wrong_case=Case(shape=(3, 50)),
    wrong=(
        ({"kind": "int4"}, "kind must be one of 'nf4', 'fp4', 'mxfp4', 'nvfp4', got 'int4'"),
        ({"kind": None}, "kind must be one of .*got None"),
        ({"dtype": torch.int8}, "dtype must be one of .*got torch.int8"),
        ({"shape": (3, -1)}, r"shape must be of sizes of at least 0, got \(3, -1\)"),
        ({"shape": (3, 2.5)}, "shape must be of sizes"),
        ({"shape": 150}, "shape must be a sequence of sizes, got int"),
        ({"packed": [1]}, "packed must be a torch.Tensor, got list"),
        ({"packed": torch.zeros(74, dtype=torch.uint8)}, r"packed must have 75 elements, ceil\(n / 2\) .*got \(74,\)"),
        ({"packed": torch.zeros(150, dtype=torch.uint8)}, r"packed must have 75 elements, .*\(3, 50\), got \(150,\)"),
        ({"packed": torch.zeros(75)}, "packed must be uint8, got torch.float32; .view"),
        ({"packed": torch.zeros(75, dtype=torch.int8)}, "packed must be uint8, got torch.int8"),
        ({"packed": torch.zeros(75, dtype=torch.uint8).to_sparse()}, "packed must be a dense tensor, got a"),
        ({"block_size": 48}, "block_size must be a power of two from 16 to 65536, got 48"),
        ({"block_size": 8}, "block_size must be a power of two .*got 8"),
        ({"block_size": 0}, "block_size must be a power of two .*got 0"),
        ({"block_size": -64}, "block_size must be a power of two .*got -64"),
        ({"block_size": 64.0}, "block_size must be a power of two .*got 64.0"),
        ({"scales": None}, "scales must be a torch.Tensor, got NoneType"),
        ({"scales": torch.ones(2)}, r"scales must have 3 elements, one for each of the 3 blocks of 64, got \(2,\)"),
        ({"block_size": 128}, r"scales must have 2 elements, .*got \(3,\)"),
        (
            {"scales": torch.ones(3).double()},
            "scales of nf4 must be float32, or uint8 beside nested, got torch.float64",
        ),
        ({"scales": torch.ones(3).bfloat16()}, "scales of nf4 must be float32"),
        ({"scales": torch.ones(3, device="meta")}, r"scales must be on the device of packed \(cpu\), got meta"),
        ({"scales": torch.ones(3, dtype=torch.uint8)}, "nested must be given where scales are torch.uint8, got None"),
        (
            {"nested": (torch.ones(256), torch.ones(1), 256, 0.0)},
            "nested must not be given where scales are torch.float32, got a second level",
        ),
        *(
            ({"scales": torch.ones(3, dtype=torch.uint8), "nested": nested}, message)
            for nested, message in (
                ((torch.ones(256), torch.ones(1), 256), r"nested must be \(code, absmax, block_size, offset\), got 3"),
                ([torch.ones(256), torch.ones(1), 256, 0.0], "nested must be .*got list"),
                ((torch.ones(255), torch.ones(1), 256, 0.0), r"nested's code must have 256 elements, .*got \(255,\)"),
                ((torch.ones(256), torch.ones(2), 256, 0.0), r"nested's absmax must have 1 elements, .*got \(2,\)"),
                ((torch.ones(256), torch.ones(1), 2, 0.0), r"nested's absmax must have 2 elements, .*got \(1,\)"),
                ((torch.ones(256).half(), torch.ones(1), 256, 0.0), "nested's code must be float32, got torch.float16"),
                ((torch.ones(256), torch.ones(1).half(), 256, 0.0), "nested's absmax must be float32"),
                ((torch.ones(256), None, 256, 0.0), "nested's absmax must be a torch.Tensor, got NoneType"),
                ((torch.ones(256), torch.ones(1), 0, 0.0), "nested's block_size must be an int of at least 1, got 0"),
                ((torch.ones(256), torch.ones(1), True, 0.0), "nested's block_size must be an int .*got True"),
                ((torch.ones(256), torch.ones(1), 256, None), "nested's offset must be a float or a 0-d"),
                ((torch.ones(256), torch.ones(1), 256, torch.ones(1)), "nested's offset must be a float or a 0-d"),
                (
                    (torch.ones(256), torch.ones(1), 256, torch.ones((), device="meta")),
                    "nested's offset must be on the device of packed",
                ),
            )
        ),
        ({"global_scale": 2.0}, "global_scale must be None for nf4, got 2.0"),
        (
            {"kind": "mxfp4", "block_size": 32, "scales": torch.ones(5, dtype=torch.uint8)},
            r"shape must end with a multiple of 32, the block of mxfp4, got \(3, 50\)",
        ),
        ({"kind": "mxfp4", "block_size": 64}, "block_size of mxfp4 must be 32, got 64"),
        (
            {"kind": "nvfp4", "block_size": 16, "shape": (3, 48), "packed": torch.zeros(72, dtype=torch.uint8)},
            "scales must be uint8, got torch.float32",
        ),
        (
            {
                "kind": "nvfp4",
                "block_size": 16,
                "shape": (3, 48),
                "packed": torch.zeros(72, dtype=torch.uint8),
                "scales": torch.ones(9, dtype=torch.uint8),
                "nested": (torch.ones(256), torch.ones(1), 256, 0.0),
            },
            "nested must be None for nvfp4, got a second level",
        ),
        (
            {
                "kind": "nvfp4",
                "block_size": 16,
                "shape": (3, 48),
                "packed": torch.zeros(72, dtype=torch.uint8),
                "scales": torch.ones(9, dtype=torch.uint8),
                "global_scale": torch.ones(2),
            },
            "global_scale must be a float or a 0-d floating tensor",
        ),
    ),
    unsupported=(
        ("cuda", Case(), "there is no 'cuda' implementation"),
        ("triton", replace(Case(), dtype=torch.float64), "backend 'triton' cannot run this problem: .*float64"),
    ),
)
