"""The decode kernel for weights of four bits: its device body in the emulator, its launcher, and what it refuses."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from peft_kernels.lora.kernels import cuda_decode, cuda_decode_four_bit
from peft_kernels.lora.kernels.config import DecodeConfig
from peft_kernels.lora.kernels.cuda_decode_four_bit import FourBitWeight
from python_ref import compare
from python_ref import four_bit_weight as oracle
from tests.lora import emulated_extension, simt_decode, simt_decode_four_bit
from tests.lora.emulated_extension import EmulatedExtension
from tests.lora.simt_decode_four_bit import Case, make, make_cancelling
from tests.lora.test_cuda_decode import HALVES

pytestmark = pytest.mark.cpu_only

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

# Few tokens and many; rows at and around the edges of tiles; of K one chunk, turns that are whole, half and none for
# some warps; blocks of a chunk, of several, and of a row; scales in float32 and nested, whose blocks end within rows
# and turns. With them splits of W and of A, and blocks: fewer than units, as many, and more.
CASES = (
    (Case(m=1, n=33, k=64, r=1), (1, 1, 1)),
    (Case(m=2, n=64, k=320, r=5, second=1, adapter_dtype=FP32), (1, 1, 2)),
    (Case(m=7, n=70, k=512, r=16, kind="fp4", dtype=FP16), (2, 2, 3)),
    (Case(m=8, n=130, k=1152, r=32, block=128, second=2, bias=False), (3, 5, 7)),
    (Case(m=9, n=1, k=512, r=33, kind="fp4", block=512, dtype=FP16, adapter_dtype=FP32), (2, 4, 6)),
    (Case(m=13, n=65, k=384, r=64, second=4, dtype=FP16, scalars=False), (5, 6, 30)),
    (Case(m=16, n=40, k=1088, r=130, kind="fp4", second=256), (4, 2, 5)),
    (Case(m=16, n=63, k=128, r=4, scalars=False, adapter_dtype=FP32), (3, 1, 4)),  # more splits than chunks
)


def assert_bits_of_decoded(case: Case, seed: int, *split: int, **rest: Any) -> None:
    """Those of the decode kernel on the weight that the oracle decodes."""
    tensors, weight = make(case, seed)
    y, s, _ = simt_decode_four_bit.run(case, tensors, weight, *split, **rest)
    expected = simt_decode.run(case.layer, tensors, *split, first_seed=seed)
    for name, one, other in zip(("y", "S"), (y, s), expected, strict=True):
        compare.assert_bitwise_equal(f"{case} {split} {name}", one, other)


@pytest.mark.parametrize(("case", "split"), CASES, ids=str)
def test_bits_of_the_decoded_weight(case: Case, split: tuple[int, int, int]) -> None:
    assert_bits_of_decoded(case, 1, *split, schedules=2, first_seed=10)


def test_bits_of_the_decoded_weight_in_random_shapes_splits_and_blocks() -> None:
    draw = random.Random(0)
    for seed in range(10):
        dtype, adapter = draw.choice(HALVES)
        block = 64 << draw.randint(0, 3)
        case = Case(
            m=draw.randint(1, 16),
            n=draw.randint(1, 140),
            k=block * draw.randint(1, 1024 // block),
            r=draw.randint(1, 70),
            kind=draw.choice(("nf4", "fp4")),
            block=block,
            second=draw.choice((0, 1, 8, 256)),
            dtype=dtype,
            adapter_dtype=adapter,
            bias=draw.random() < 0.5,
            scalars=draw.random() < 0.5,
        )
        assert_bits_of_decoded(case, seed, draw.randint(1, 5), draw.randint(1, 5), draw.randint(1, 12))


@pytest.mark.parametrize("second", [0, 2])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_a_token_takes_a_column_of_the_weight(kind: str, second: int) -> None:
    """One that is 1 in one place: each of a row's lanes and of its words is the oracle's."""
    case = Case(m=16, n=70, k=512, r=3, kind=kind, second=second, bias=False)
    tensors, weight = make(case)
    columns = torch.randperm(case.k, generator=torch.Generator().manual_seed(3))[: case.m]
    x = torch.zeros_like(tensors.x).scatter_(1, columns[:, None], 1.0)
    alone = tensors._replace(x=x, lora_b=torch.zeros_like(tensors.lora_b))
    y, _, _ = simt_decode_four_bit.run(case, alone, weight)
    assert torch.equal(y, tensors.weight[:, columns].t())


def test_product_and_sum_of_a_nested_scale_are_rounded_each() -> None:
    """A fused multiply-add would leave of them what the product's rounding took."""
    case = Case(m=3, n=33, k=128, r=1, second=2, bias=False)
    tensors, weight = make_cancelling(case)
    assert float(weight.code[0].double() * weight.second[0].double() + weight.offset.double()) != 0.0
    y, _, _ = simt_decode_four_bit.run(case, tensors, weight)
    assert torch.equal(y, torch.zeros_like(y))


@pytest.mark.parametrize("grid", [1, 9])
def test_every_schedule_and_grid_give_the_same_bits(grid: int) -> None:
    case = Case(m=11, n=70, k=576, r=40, second=4)
    tensors, weight = make(case)
    first = simt_decode_four_bit.run(case, tensors, weight, splits=3, down_splits=2, grid=4)
    got = simt_decode_four_bit.run(case, tensors, weight, 3, 2, grid, schedules=12, first_seed=100)
    for name, one, other in zip(("y", "S"), first[:2], got[:2], strict=True):
        compare.assert_bitwise_equal(name, one, other)


def test_an_infinite_scale_stays_in_its_row() -> None:
    case = Case(m=5, n=40, k=128, r=3)
    tensors, weight = make(case)
    weight.scales[2 * 37 + 1] = torch.nan  # the second block of row 37
    y, _, _ = simt_decode_four_bit.run(case, tensors, weight)
    assert torch.equal(y.isnan(), (torch.arange(case.n) == 37).expand(case.m, -1))


@pytest.mark.parametrize("second", [0, 256])
def test_a_quarter_of_the_weight_s_bytes_is_read(second: int) -> None:
    """Beside scales: half a byte an element, and A; of whole tiles, whose rows are read once each."""
    case = Case(m=4, n=192, k=512, r=64, second=second)
    tensors, weight = make(case)
    _, _, streamed = simt_decode_four_bit.run(case, tensors, weight, splits=2, down_splits=2)
    assert streamed == case.n * case.k // 2 + 2 * case.r * case.k


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> EmulatedExtension:
    return emulated_extension.install(monkeypatch)


@pytest.mark.parametrize("second", [0, 4])
def test_the_launch(emulated: EmulatedExtension, second: int) -> None:
    """Strided rows of x and columns of B, and all of the weight's tensors in shapes and strides of their own."""
    case, config = Case(m=6, n=70, k=320, r=9, second=second), DecodeConfig(SPLITS=2, DOWN_SPLITS=3, GRID=5)
    tensors, weight = make(case)

    def spread(tensor: Tensor) -> Tensor:
        return torch.stack((tensor, tensor), -1)[..., 0]

    x = torch.cat((tensors.x, tensors.x), 1)[:, : case.k]
    lora_b, scale = tensors.lora_b.t().contiguous().t(), torch.tensor(0.75, dtype=torch.float64)
    nested = None
    if weight.code is not None:
        nested = (spread(weight.code), spread(weight.second), second, weight.offset.double())
    four_bit = FourBitWeight(weight.packed[:, None], oracle.NF4, spread(weight.scales)[:, None], case.block, nested)
    got = cuda_decode_four_bit.decode_four_bit(x, four_bit, tensors.lora_a, lora_b, scale, tensors.bias, config)
    expected = cuda_decode.forward(x, tensors.weight, tensors.lora_a, lora_b, scale, tensors.bias, config)
    assert len(emulated.calls) == 2
    for name, one, other in zip(("y", "S"), got, expected, strict=True):
        compare.assert_bitwise_equal(name, one, other)


FACTS: dict[str, Any] = {
    "m": 16, "n": 4096, "k": 4096, "r": 16, "dtype": BF16, "kind": "nf4", "block_size": 64, "nested_block_size": 256,
    "has_dropout": False, "rows_aligned": True,
}  # fmt: skip


def test_what_it_takes() -> None:
    for facts in ({}, {"m": 1, "dtype": FP16}, {"kind": "fp4", "nested_block_size": 0}, {"block_size": 4096}):
        assert cuda_decode_four_bit.why_not(**{**FACTS, **facts}) is None


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"m": 17}, "at most 16 tokens, got 17"),
        ({"dtype": FP32}, "bfloat16 and float16, got torch.float32"),
        ({"has_dropout": True}, "no dropout"),
        ({"kind": "mxfp4"}, "nf4 and fp4, got mxfp4"),
        ({"block_size": 32}, "blocks of 32"),
        ({"k": 4064}, "K must be a multiple of 64, got 4064"),
        ({"block_size": 8192}, "K must be a multiple of 8192, got 4096"),
        ({"nested_block_size": 24}, "power of two, got 24"),
        ({"rows_aligned": False}, "misaligned"),
        ({"n": 2**31}, f"at most {2**30}, got {2**31}"),
        ({"n": 2**26}, f"at most {2**36} elements, got {2**38}"),
    ],
)
def test_refusals_say_why(facts: dict[str, Any], reason: str) -> None:
    said = cuda_decode_four_bit.why_not(**{**FACTS, **facts})
    assert said is not None
    assert reason in said
