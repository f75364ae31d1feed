"""Problems of the operator ``lora_gain_four_bit``, and what it owes: ``lora_gain``'s, on weights that are 4-bit."""

from __future__ import annotations

import contextlib
import itertools
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from peft_kernels.lora.gain_four_bit import op
from peft_kernels.lora.linear.op import lora_linear
from python_ref import lora as oracle
from tests.contract.draw import Draw
from tests.contract.operators import Operator, double
from tests.lora import gain_cases
from tests.lora.four_bit_cases import PACKED, decoded, exact, quantized, stored

VARIANTS = ("torch", "triton")


@dataclass(frozen=True)
class Case(gain_cases.Case):
    """One problem; ``second`` is the nested block, 0 where scales are float32."""

    m: int = 20
    n: int = 24
    kind: str = "nf4"
    block: int = 64
    second: int = 0

    def __str__(self) -> str:
        return f"{self.kind}-{super().__str__()}{'-nested' * bool(self.second)}"


class Tensors(NamedTuple):
    x: Tensor
    packed: Tensor
    scales: Tensor
    code: Tensor | None
    absmax: Tensor | None
    offset: Tensor | None
    lora_a: Tensor
    lora_b: Tensor
    gain: Tensor
    bias: Tensor | None


def _linear(*, case: Case, backend: str | None = None, **given: Any) -> Tensor:
    """``lora_linear``; what is given beside tensors and numbers changes the weight."""
    parts = [given.pop(name) for name in PACKED]
    weight = quantized(case, case.n, parts)._replace(**given.pop("of_weight", {}))
    return lora_linear(weight=given.pop("weight", weight), backend=backend, **given)


def _packed(case: Case, device: torch.device, seed: int, tensors: gain_cases.Tensors) -> Tensors:
    """With 4 bits in the place of a weight."""
    draw = Draw(seed + 1)
    parts = stored(case, draw, case.n, lambda count: draw.normal(count, std=case.k**-0.5))
    given = {name: value for name, value in tensors._asdict().items() if name != "weight"}
    return Tensors(**{name: None if x is None else x.to(device) for name, x in parts.items()}, **given)


def make(case: Case, device: torch.device, seed: int = 0) -> Tensors:
    """Draw fresh random tensors."""
    return _packed(case, device, seed, gain_cases.make(case, device, seed))


def make_exact(case: Case, device: torch.device, seed: int = 0) -> tuple[Tensors, Tensor]:
    """E2M1 by ones, and small integers: every product and sum is exact in bfloat16, in any order."""
    tensors, dy = gain_cases.make_exact(case, device, seed)
    made = _packed(case, device, seed, tensors)
    return made._replace(scales=torch.full_like(made.scales, 127)), dy


def _arguments(case: Case, tensors: Tensors) -> dict[str, Any]:
    return {**tensors._asdict(), "case": case, "scale": case.scale, "dropout_p": case.p, "seed": gain_cases.SEED}


def _on(tensors: Tensors, weight: Tensor) -> gain_cases.Tensors:
    return gain_cases.Tensors(tensors.x, weight, *tensors[1 + len(PACKED) :])


def _eager(case: Case, tensors: Tensors) -> Tensor:
    weight = quantized(case, case.n, [getattr(tensors, part) for part in PACKED])
    made = exact(weight) if case.dtype == torch.float64 else decoded(weight, case.dtype)
    return gain_cases.OPERATOR.eager(case, _on(tensors, made))


def _oracle(case: Case, tensors: Tensors, dy: Tensor) -> tuple[Tensor, oracle.GainGradients]:
    # Scales are exact in float64, and what is packed is not cast.
    weight = exact(quantized(case, case.n, [getattr(tensors, part) for part in PACKED]))
    return gain_cases.OPERATOR.oracle(case, double(_on(tensors, weight)), dy)


GRID = (
    Case(second=2, gain_dtype=torch.float32),
    # With more rows than columns of W the gain meets the weight, and else dY.
    Case(m=61, p=0.3, kind="fp4", layout="strided"),
    Case(m=12, dtype=torch.bfloat16, adapter_dtype=torch.float32, gain_dtype=torch.float32, second=2, p=0.3),
    Case(m=140, n=136, k=136, r=16, dtype=torch.bfloat16, gain_dtype=torch.float32, scale=torch.tensor(0.75)),
    Case(dtype=torch.float16, k=64, kind="mxfp4", block=32, bias=False),
    Case(dtype=torch.bfloat16, k=48, kind="nvfp4", block=16, layout="columns"),
)
SMALL = Case(m=4, n=16, k=16, r=4, second=2)
_META = make(Case(m=3, n=6, k=8, r=2), torch.device("meta"))

OPERATOR = Operator(
    function=_linear,
    op=op,
    differentiable=("x", "lora_a", "lora_b", "gain", "bias"),
    variants=VARIANTS,
    pin=contextlib.nullcontext,
    make=make,
    make_exact=make_exact,
    arguments=_arguments,
    eager=_eager,
    oracle=_oracle,
    draws=gain_cases.OPERATOR.draws,
    budget=tuple(itertools.product(GRID, VARIANTS)),
    exact=st.builds(
        lambda dtype, adapter, blocks, **rest: Case(
            dtype=dtype, adapter_dtype=adapter, k=32 * blocks, kind="mxfp4", block=32, scale=0.5, **rest
        ),
        **{size: st.integers(1, 20) for size in "mnr"},
        blocks=st.integers(1, 2),
        dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
        adapter=st.sampled_from([None, torch.float32]),
        gain_dtype=st.sampled_from([None, torch.float32]),
        p=st.sampled_from([0.0, 0.5]),
        bias=st.booleans(),
    ),
    exact_draws=6,
    exact_examples=(Case(k=32, kind="mxfp4", block=32, p=0.5, scale=0.5),),
    repeated=tuple((Case(m=70, dtype=torch.bfloat16, second=2, p=0.3), variant) for variant in VARIANTS),
    typical=Case(p=0.3, r=20, second=2),
    kinds=(SMALL,),
    gradcheck=(Case(m=4, n=4, k=5, r=2, dtype=torch.float64, p=0.3, second=2),),
    far=(replace(SMALL, dtype=torch.bfloat16), ("x",)),
    empty=(Case(m=0), Case(n=0, second=2)),
    rows=((SMALL, ("x",)),),
    wrong_case=Case(m=3, n=6, k=8, r=2),
    wrong=(
        ({"x": torch.randn(3, 7)}, r"x must be \(\.\.\., K\) with K = 8, weight's in-features, got \(3, 7\)"),
        ({"x": [1.0]}, "x must be a torch.Tensor, got list"),
        ({"packed": torch.zeros(25, dtype=torch.uint8)}, "weight: .*packed must have 24 elements"),
        ({"of_weight": {"kind": "int4"}}, "weight: .*kind must be one of"),
        ({"of_weight": {"shape": (48,)}}, r"weight must be \(N, K\), got a weight of shape \(48,\)"),
        (
            {name: getattr(_META, name) for name in ("packed", "scales")},
            r"weight must be on the device of x \(cpu\), got meta",
        ),
        ({"gain": torch.randn(5)}, r"gain must be \(N,\) = \(6,\), got \(5,\)"),
        ({"gain": torch.randn(6).double()}, "gain must have the dtype of x"),
        ({"lora_b": torch.randn(5, 2)}, r"lora_b must be \(N, r\) = \(6, 2\), got \(5, 2\)"),
        ({"dropout_p": 1.0}, r"dropout_p must be in \[0, 1\), got 1.0"),
        ({"scale": torch.ones(2)}, "scale must be a float or a 0-d floating tensor"),
    ),
    unsupported=(
        ("cuda", Case(), "lora_gain_four_bit: .*'cuda'"),
        ("triton", Case(dtype=torch.float64), "backend 'triton' cannot run this problem: .*float64"),
    ),
)
