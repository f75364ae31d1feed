"""The oracle against what it does not share: torch's dtypes, values worked out by hand, the libraries' own code."""

from __future__ import annotations

import math

import pytest
import torch

from python_ref import four_bit_weight as oracle
from tests.contract.operators import CPU
from tests.four_bit_weight.cases import KINDS, OPERATOR, Case, eager, fixed, make

BYTES = torch.arange(256, dtype=torch.uint8)


def test_e4m3_is_torch_s() -> None:
    values = BYTES.view(torch.float8_e4m3fn).double()
    torch.testing.assert_close(
        torch.tensor([oracle.e4m3(byte) for byte in range(256)], dtype=torch.float64),
        values,
        rtol=0,
        atol=0,
        equal_nan=True,
    )


def test_e8m0_is_torch_s() -> None:
    if not hasattr(torch, "float8_e8m0fnu"):
        pytest.skip("torch has no float8_e8m0fnu before 2.7")
    values = BYTES.view(torch.float8_e8m0fnu).float().double()
    got = torch.tensor([oracle.e8m0(byte) for byte in range(256)], dtype=torch.float64)
    torch.testing.assert_close(got, values, rtol=0, atol=0, equal_nan=True)


def test_e2m1_by_hand() -> None:
    assert [oracle.e2m1(code) for code in range(8)] == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert all(oracle.e2m1(code + 8) == -oracle.e2m1(code) for code in range(8))
    assert math.copysign(1.0, oracle.e2m1(8)) == -1.0


def test_nf4_is_made_of_quantiles() -> None:
    """Of a normal distribution: eight above zero and seven below, over the largest.

    bitsandbytes' offset from the ends is 0.9677083; its numbers are torch's quantiles to float32's last bits.
    """
    normal, offset = torch.distributions.Normal(0.0, 1.0), 0.9677083
    above = normal.icdf(torch.linspace(offset, 0.5, 9, dtype=torch.float64)[:-1])
    below = -normal.icdf(torch.linspace(offset, 0.5, 8, dtype=torch.float64)[:-1])
    values = torch.cat((below, torch.zeros(1, dtype=torch.float64), above.flip(0))) / above.max()
    torch.testing.assert_close(values, torch.tensor(oracle.NF4, dtype=torch.float64), rtol=0, atol=2e-7)


def test_elements_by_hand() -> None:
    """Nibbles in each order, a block that ends, a block that is shorter."""
    packed, scales = [0x2F, 0x71, 0xF0], [1.0, 2.0]
    high_first = [oracle.NF4[2], 1.0, oracle.NF4[7], oracle.NF4[1], 2.0]
    assert oracle.dequantize(packed, "nf4", 5, scales, 4) == high_first
    assert oracle.dequantize(packed, "mxfp4", 5, [127, 128], 4) == [-6.0, 1.0, 0.5, 6.0, 0.0]
    assert oracle.dequantize(packed, "nvfp4", 5, [0x38, 0x40], 4, None, 0.5) == [-3.0, 0.5, 0.25, 3.0, 0.0]
    nested = oracle.Nested([0.0] * 5 + [3.0] + [0.0] * 250, [2.0, 10.0], 1, 0.5)
    assert oracle.dequantize([0xFF], "fp4", 2, [5, 5], 1, nested) == [-0.25 * 6.5, -0.25 * 30.5]


@pytest.mark.parametrize("case", [Case(second=2), Case("fp4"), fixed("mxfp4", 5, 3), fixed("nvfp4", 5, 3)], ids=str)
def test_eager_is_the_oracle(case: Case) -> None:
    """In float64 there is no rounding but that of the scales, which eager computes in float32."""
    tensors = make(case, CPU)
    y, _ = OPERATOR.oracle(case, tensors, torch.empty(0))
    torch.testing.assert_close(eager(case, tensors).double(), y, rtol=3e-7, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_mxfp4_is_transformers(dtype: torch.dtype) -> None:
    """Of GPT-OSS's experts, in blocks (E, N, K / 32, 16), with every exponent; 255 is nan to the format alone."""
    mxfp4 = pytest.importorskip("transformers").integrations.mxfp4
    case = fixed("mxfp4", 3, 10, 9, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (3, 10, 9, 16), generator=generator, dtype=torch.uint8)
    scales = torch.arange(3 * 10 * 9).remainder(255).to(torch.uint8).view(3, 10, 9)
    theirs = mxfp4.convert_moe_packed_tensors(blocks.clone(), scales.clone(), dtype=dtype).transpose(1, 2)
    given = {"packed": blocks, "kind": "mxfp4", "shape": case.shape, "dtype": dtype, "scales": scales}
    assert torch.equal(_bits(oracle.eager(**given, block=32)), _bits(theirs))
    for backend in OPERATOR.variants:
        with OPERATOR.using(backend) as name:
            assert torch.equal(_bits(OPERATOR.function(**given, backend=name)), _bits(theirs)), backend


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def test_all_kinds_are_seen() -> None:
    assert set(KINDS) == {"nf4", "fp4", "mxfp4", "nvfp4"}
