"""What is fixed about the formats and the decoder's blocks."""

from __future__ import annotations

import pytest
import torch

from peft_kernels.four_bit_weight.kernels import config, formats
from python_ref import four_bit_weight as oracle


def test_a_thread_reads_sixteen_bytes() -> None:
    chosen = config.decode_config()
    assert 16 * 32 * chosen.num_warps == chosen.BLOCK_BYTES


@pytest.mark.parametrize("kind", oracle.TABLES)
def test_formats_are_the_oracle_s(kind: str) -> None:
    """Of which one is computed from its bits or its definition, the other written down; -0.0 is told from 0.0."""
    known = formats.FORMATS[kind]
    assert list(map(float.hex, known.values)) == list(map(float.hex, oracle.TABLES[kind]))
    assert torch.tensor(known.values).tolist() == list(known.values), "no value is rounded to float32"
    assert known.low_first == oracle.LOW_NIBBLE_FIRST[kind]
    assert formats.FORMATS.keys() == oracle.TABLES.keys()


@pytest.mark.parametrize("scale", ["e8m0", "e4m3"])
def test_values_of_bytes_are_the_oracle_s(scale: str) -> None:
    assert list(map(str, formats.scale_values(scale))) == [str(getattr(oracle, scale)(byte)) for byte in range(256)]
