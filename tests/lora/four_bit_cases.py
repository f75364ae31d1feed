"""Problems of the operator ``lora_four_bit``, and what it owes; the contract sees two members' outputs side by side."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

import peft_kernels as pk
from peft_kernels.lora.four_bit import op
from peft_kernels.lora.group.op import lora_group
from python_ref import four_bit_weight as packed_oracle
from python_ref import lora as oracle
from tests.contract.draw import Draw, dtypes_name, laid_out
from tests.contract.operators import Operator, double

SEED = 20240229
VARIANTS = ("torch", "triton")
GLOBAL_SCALE = 1.5
# In each member; the parts from lora_a on are differentiated.
PACKED, PLAIN = ("packed", "scales", "code", "absmax", "offset"), ("lora_a", "lora_b", "bias")


@dataclass(frozen=True)
class Case:
    """One problem of two members.

    Attributes:
        second: the nested block; 0 where scales are float32.
        adapter: dtype of the factors, None is ``dtype``.
        layout: how x lies in memory.
    """

    m: int = 20
    n: tuple[int, int] = (24, 9)
    k: int = 40
    r: tuple[int, int] = (5, 3)
    dtype: torch.dtype = torch.float32
    adapter: torch.dtype | None = None
    p: float = 0.0
    kind: str = "nf4"
    block: int = 64
    second: int = 0
    scale: float | Tensor = 0.75
    layout: str = "rows"

    @property
    def y_shape(self) -> tuple[int, int]:
        return self.m, sum(self.n)

    @property
    def y_dtype(self) -> torch.dtype:
        return self.dtype

    def __str__(self) -> str:
        sizes, ranks = ("+".join(map(str, each)) for each in (self.n, self.r))
        flags = f"{'-nested' * bool(self.second)}{'-tensorscale' * isinstance(self.scale, Tensor)}-{self.layout}"
        return (
            f"{self.kind}-{self.m}x({sizes})x{self.k}-r{ranks}-{dtypes_name(self.dtype, self.adapter)}-p{self.p}{flags}"
        )


class Tensors(NamedTuple):
    x: Tensor
    packed_0: Tensor
    scales_0: Tensor
    code_0: Tensor | None
    absmax_0: Tensor | None
    offset_0: Tensor | None
    lora_a_0: Tensor
    lora_b_0: Tensor
    bias_0: Tensor | None
    packed_1: Tensor
    scales_1: Tensor
    code_1: Tensor | None
    absmax_1: Tensor | None
    offset_1: Tensor | None
    lora_a_1: Tensor
    lora_b_1: Tensor
    bias_1: Tensor | None


def weight_of(case: Case, tensors: Tensors, member: int) -> pk.four_bit.QuantizedWeight:
    return quantized(case, case.n[member], [getattr(tensors, f"{part}_{member}") for part in PACKED])


def quantized(case: Any, n: int, parts: Sequence[Any]) -> pk.four_bit.QuantizedWeight:
    """A weight (n, K) of its parts, in the order of PACKED."""
    packed, scales, code, absmax, offset = parts
    nested = None if code is None else (code, absmax, case.second, offset)
    of_all = GLOBAL_SCALE if case.kind == "nvfp4" else None
    # Its own dtype plays no part.
    return pk.four_bit.QuantizedWeight(packed, case.kind, (n, case.k), torch.int8, scales, case.block, nested, of_all)


def lora_four_bit(
    *, case: Case, scale: Any = 1.0, dropout_p: Any = 0.0, seed: Any = None, backend: str | None = None, **given: Any
) -> Tensor:
    """The outputs side by side (..., sum of N_j); what is given beside the tensors changes members' weights."""
    changes = {name: given.pop(name) for name in list(given) if name not in Tensors._fields}
    tensors = Tensors(**given)
    members = []
    for j in range(2):
        weight = weight_of(case, tensors, j)
        weight = changes.get(f"weight_{j}", weight._replace(**changes.get(f"of_{j}", {})))
        members.append(pk.Member(weight, *(getattr(tensors, f"{part}_{j}") for part in PLAIN[:2]), scale))
        members[-1] = members[-1]._replace(bias=getattr(tensors, f"bias_{j}"))
    ys = lora_group(tensors.x, members, dropout_p=dropout_p, seed=seed, backend=backend)
    return torch.cat(ys, dim=-1)


def drawn(case: Case, device: torch.device, draw: Draw, x: Tensor, of: dict[str, Any]) -> Tensors:
    """Codes and scales of both weights, and the other parts from ``of``, a function of a shape for each."""
    values: dict[str, Tensor | None] = {"x": laid_out(x.to(device, case.dtype), case.layout)}
    for j, (n, r) in enumerate(zip(case.n, case.r, strict=True)):
        values |= {f"{part}_{j}": value for part, value in stored(case, draw, n, of.get("scales", draw.normal)).items()}
        shapes = {"lora_a": (r, case.k), "lora_b": (n, r), "bias": (n,)}
        for part, shape in shapes.items():
            dtype = case.dtype if part == "bias" else case.adapter or case.dtype
            values[f"{part}_{j}"] = None if part == "bias" and j else of[part](*shape).to(dtype)
    return Tensors(**{name: None if x is None else x.to(device) for name, x in values.items()})


def stored(case: Any, draw: Draw, n: int, scales: Callable[[int], Tensor]) -> dict[str, Tensor | None]:
    """Random codes of a weight (n, K), and its scales by a function of how many there are."""
    count = n * case.k
    blocks, is_bytes = -(-count // case.block), case.second or case.kind in ("mxfp4", "nvfp4")
    least, end = {"mxfp4": (124, 130), "nvfp4": (40, 64)}.get(case.kind, (0, 256))
    return {
        "packed": _codes(draw, 0, 256, (count + 1) // 2),
        "scales": _codes(draw, least, end, blocks) if is_bytes else scales(blocks).float(),
        "code": draw.normal(256).float() if case.second else None,
        "absmax": draw.normal(-(-blocks // case.second)).float() if case.second else None,
        "offset": draw.normal(1)[0].float() if case.second else None,
    }


def _codes(draw: Draw, least: int, end: int, count: int) -> Tensor:
    return torch.randint(least, end, (count,), generator=draw.generator).to(torch.uint8)


def make(case: Case, device: torch.device, seed: int = 0) -> Tensors:
    """Draw fresh random tensors; a low-rank term is about as large as its base product."""
    draw = Draw(seed)
    of = {
        "scales": lambda *shape: draw.normal(*shape, std=case.k**-0.5),
        "lora_a": lambda r, k: draw.normal(r, k, std=k**-0.5),
        "lora_b": lambda n, r: draw.normal(n, r, std=r**-0.5),
        "bias": draw.normal,
    }
    return drawn(case, device, draw, draw.normal(case.m, case.k), of)


def make_exact(case: Case, device: torch.device, seed: int = 0) -> tuple[Tensors, Tensor]:
    """E2M1 times powers of two, and small integers: every product and sum is exact in bfloat16, in any order."""
    draw = Draw(seed)
    of = dict.fromkeys(("lora_a", "lora_b", "bias"), lambda *shape: draw.integers(1, *shape))
    tensors = drawn(case, device, draw, draw.single_signs(case.m, case.k), of)
    ones = {f"scales_{j}": torch.full_like(getattr(tensors, f"scales_{j}"), 127) for j in range(2)}
    return tensors._replace(**ones), draw.single_signs(case.m, sum(case.n)).to(device, case.dtype)


def arguments(case: Case, tensors: Tensors) -> dict[str, Any]:
    return {**tensors._asdict(), "case": case, "scale": case.scale, "dropout_p": case.p, "seed": SEED}


def _members(case: Case, tensors: Tensors, weights: list[Tensor]) -> list[oracle.Member]:
    device, found = tensors.x.device, []
    for j, weight in enumerate(weights):
        lora_a, lora_b, bias = (getattr(tensors, f"{part}_{j}") for part in PLAIN)
        mask = oracle.dropout_mask(SEED, case.m, case.k, case.p, lane=j).to(device) if case.p else None
        found.append(oracle.Member(weight, lora_a, lora_b, case.scale, bias, mask, case.p))
    return found


def _eager(case: Case, tensors: Tensors) -> Tensor:
    """What QLoRA's layers compute: a decoded weight for each product."""
    if case.dtype == torch.float64:
        return torch.cat(oracle.eager_group(tensors.x, _members(case, tensors, _exact_weights(case, tensors))), dim=-1)
    weights = [decoded(weight_of(case, tensors, j), case.dtype) for j in range(2)]
    return torch.cat(oracle.eager_group(tensors.x, _members(case, tensors, weights)), dim=-1)


def decoded(weight: pk.four_bit.QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """By eager torch."""
    of_all = 1.0 if weight.global_scale is None else weight.global_scale
    rest = weight.kind, weight.shape, dtype, weight.scales, weight.block_size, weight.nested, of_all
    return packed_oracle.eager(weight.packed, *rest)


def exact(weight: pk.four_bit.QuantizedWeight) -> Tensor:
    """By the oracle, in float64."""
    nested = None
    if weight.nested is not None:
        code, absmax, second, offset = weight.nested
        nested = packed_oracle.Nested(code.tolist(), absmax.tolist(), second, float(offset))
    count, of_all = weight.shape[0] * weight.shape[1], 1.0 if weight.global_scale is None else weight.global_scale
    given = weight.packed.tolist(), weight.kind, count, weight.scales.tolist(), weight.block_size, nested
    flat = packed_oracle.dequantize(*given, of_all)
    return torch.tensor(flat, dtype=torch.float64, device=weight.packed.device).reshape(weight.shape)


def _exact_weights(case: Case, tensors: Tensors) -> list[Tensor]:
    return [exact(weight_of(case, tensors, j)) for j in range(2)]


def _oracle(case: Case, tensors: Tensors, dy: Tensor) -> tuple[Tensor, Tensors]:
    wide = double(tensors)
    given = _members(case, wide, _exact_weights(case, tensors))
    y = torch.cat(oracle.group_forward(wide.x, given), dim=-1)
    dx, found = oracle.group_backward(dy.double().split(case.n, dim=-1), wide.x, given)
    gradients = {"x": dx}
    for j, each in enumerate(found):
        gradients |= {f"{part}_{j}": getattr(each, part) for part in PLAIN}
    return y, Tensors(**{name: gradients.get(name) for name in Tensors._fields})


GRID = (
    Case(second=2),
    Case(p=0.3, kind="fp4", layout="strided"),
    Case(m=12, dtype=torch.bfloat16, adapter=torch.float32, second=2, p=0.3, scale=torch.tensor(0.75)),
    Case(m=40, n=(72, 40), k=136, r=(16, 16), dtype=torch.bfloat16),
    Case(dtype=torch.float16, k=64, kind="mxfp4", block=32),
    Case(dtype=torch.bfloat16, k=48, kind="nvfp4", block=16, layout="columns"),
)
_SMALL = Case(m=4, n=(16, 8), k=16, r=(4, 2), second=2)

OPERATOR = Operator(
    function=lora_four_bit,
    op=op,
    differentiable=("x", "lora_a_0", "lora_b_0", "bias_0", "lora_a_1", "lora_b_1"),
    variants=VARIANTS,
    pin=contextlib.nullcontext,
    make=make,
    make_exact=make_exact,
    arguments=arguments,
    eager=_eager,
    oracle=_oracle,
    draws=lambda case: min(16, 256 // (case.m * min(case.r))),
    budget=tuple(itertools.product(GRID, VARIANTS)),
    exact=st.builds(
        lambda dtype, adapter, n, r, blocks, **rest: Case(
            dtype=dtype, adapter=adapter, n=n, r=r, k=32 * blocks, kind="mxfp4", block=32, scale=0.5, **rest
        ),
        m=st.integers(1, 20),
        blocks=st.integers(1, 2),
        n=st.tuples(*[st.integers(1, 20)] * 2),
        r=st.tuples(*[st.integers(1, 20)] * 2),
        dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
        adapter=st.sampled_from([None, torch.float32]),
        p=st.sampled_from([0.0, 0.5]),
    ),
    exact_draws=8,
    exact_examples=(Case(k=32, kind="mxfp4", block=32, p=0.5, scale=0.5),),
    repeated=tuple((Case(m=70, dtype=torch.bfloat16, second=2, p=0.3), variant) for variant in VARIANTS),
    # S is one matrix for all members.
    together=(("x",), ("lora_a_0", "lora_a_1"), ("lora_b_0", "lora_b_1"), ("bias_0",)),
    typical=Case(p=0.3, r=(20, 5), second=2),
    kinds=(_SMALL,),
    gradcheck=(Case(m=4, n=(4, 3), k=5, r=(2, 1), dtype=torch.float64, p=0.3, second=2),),
    far=(replace(_SMALL, dtype=torch.bfloat16), ("x",)),
    empty=(Case(m=0), Case(n=(8, 0), second=2)),
    rows=((_SMALL, ("x",)),),
    wrong_case=Case(m=3, n=(6, 4), k=8, r=(2, 3)),
    wrong=(
        ({"x": torch.randn(3, 7)}, r"members\[0\].weight must be \(N, K\) with K = 7, x's features, got \(6, 8\)"),
        ({"x": torch.tensor(1.0)}, r"x must be \(\.\.\., K\), got a 0-d"),
        ({"x": [1.0]}, "x must be a torch.Tensor, got list"),
        ({"packed_1": torch.zeros(15, dtype=torch.uint8)}, r"members\[1\].weight: .*packed must have 16 elements"),
        ({"packed_0": torch.zeros(24)}, r"members\[0\].weight: .*packed must be uint8, got torch.float32"),
        ({"scales_0": torch.ones(3)}, r"members\[0\].weight: .*scales must have 1 elements"),
        ({"of_0": {"kind": "int4"}, "of_1": {"kind": "int4"}}, r"members\[0\].weight: .*kind must be one of"),
        ({"of_1": {"shape": (4, 9)}}, r"members\[1\].weight must be \(N, K\) with K = 8, x's features, got \(4, 9\)"),
        ({"of_1": {"shape": (32,)}}, r"members\[1\].weight must be \(N, K\), got a weight of shape \(32,\)"),
        (
            {"of_1": {"block_size": 32}},
            r"members\[1\].weight must be of the format of members\[0\].weight, nf4 in blocks of 64, "
            "got nf4 in blocks of 32",
        ),
        ({"weight_1": torch.randn(4, 8)}, r"members\[1\].weight must be a QuantizedWeight, as .*got Tensor"),
        (
            {
                f"{name}_0": getattr(make(Case(n=(6, 4), k=8, r=(2, 3)), torch.device("meta")), f"{name}_0")
                for name in ("packed", "scales")
            },
            r"members\[0\].weight must be on the device of x \(cpu\), got meta",
        ),
        ({"lora_a_1": torch.randn(3, 7)}, r"members\[1\].lora_a must be \(r, K\) = \(3, 8\), got \(3, 7\)"),
        ({"lora_b_1": torch.randn(5, 3)}, r"members\[1\].lora_b must be \(N, r\) = \(4, 3\), got \(5, 3\)"),
        ({"bias_0": torch.randn(5)}, r"members\[0\].bias must be \(N,\) = \(6,\), got \(5,\)"),
        ({"dropout_p": 1.0}, r"dropout_p must be in \[0, 1\), got 1.0"),
        ({"dropout_p": 0.5, "seed": torch.tensor([1])}, "seed must be a 0-d int64 tensor"),
        ({"scale": torch.ones(2)}, r"members\[0\].scale must be a float or a 0-d floating tensor"),
    ),
    unsupported=(
        ("cuda", Case(), r"'cuda' cannot run this problem: members\[0\]: CUDA kernels run on CUDA tensors"),
        ("triton", Case(dtype=torch.float64), "backend 'triton' cannot run this problem: .*float64"),
    ),
)
