"""The decode kernel for weights of four bits on a GPU. What the host's emulator shows without one is in
test_csrc_decode_four_bit.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from peft_kernels._core.device import hardware
from peft_kernels.lora.kernels import cuda_decode, cuda_decode_four_bit
from peft_kernels.lora.kernels.config import decode_config
from peft_kernels.lora.kernels.cuda_decode_four_bit import FourBitWeight
from python_ref import compare
from python_ref import four_bit_weight as oracle
from tests.lora.simt_decode_four_bit import Case, make
from tests.lora.test_csrc_decode_four_bit import CASES

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poison")]

# Blocks of all multiprocessors, one wave of them and several.
WIDE = [
    Case(m=m, n=n, k=4096, r=16, kind=kind, second=second, dtype=dtype)
    for m, n, kind, second, dtype in (
        (1, 4096, "nf4", 256, torch.bfloat16),
        (16, 4096, "nf4", 0, torch.bfloat16),
        (8, 14336, "fp4", 256, torch.float16),
    )
]


@pytest.mark.parametrize("case", [*(case for case, _ in CASES), *WIDE], ids=str)
def test_bits_of_the_decoded_weight(case: Case, device: torch.device) -> None:
    """In each of several launches."""
    tensors, weight = make(case)
    x, decoded, lora_a, lora_b, bias = (None if each is None else each.to(device) for each in tensors)
    nested: tuple[Tensor, Tensor, int, Tensor] | None = None
    if weight.code is not None:
        nested = weight.code.to(device), weight.second.to(device), case.second, weight.offset.to(device)
    packed, scales = weight.packed.to(device), weight.scales.to(device)
    four_bit = FourBitWeight(packed, oracle.TABLES[case.kind], scales, case.block, nested)
    config = decode_config(case.n, case.k, case.r, hardware(device))
    rest = lora_a, lora_b, 0.75, bias, config
    expected = cuda_decode.forward(x, decoded, *rest)
    for _ in range(5):
        got = cuda_decode_four_bit.decode_four_bit(x, four_bit, *rest)
        for name, one, other in zip(("y", "S"), got, expected, strict=True):
            compare.assert_bitwise_equal(f"{case} {name}", one, other)
