"""``lora_rows`` without a graph, by torch's own operators: the bits of the torch implementation."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from peft_kernels._core.rows import Rows
from peft_kernels.lora.rows import op

SLOTS = {
    "a gap between neighbours of one scale": ((2, 0, 3, 1), (0.5, 0.5, 0.5, 0.5)),
    "a gap first and last": ((0, 2, 3, 0), (2.0, 2.0, 2.0, 2.0)),
    "scales differ": ((2, 1, 3, 4), (0.5, 0.5, -3.0, 0.5)),
}


@pytest.fixture
def memory_of_nan() -> Iterator[None]:
    """What nobody has written is nan, which deterministic algorithms see to."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.cpu_only
@pytest.mark.usefixtures("memory_of_nan")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("length", [1, 9])
@pytest.mark.parametrize("name", SLOTS)
def test_it_is_the_torch_implementation(name: str, length: int, dtype: torch.dtype) -> None:
    """Few rows of a slot are added otherwise than many; nan in a slot that no row uses reaches nothing."""
    ranks, scales = SLOTS[name]
    generator = torch.Generator().manual_seed(0)
    slots = [2, 0, -1, 1, 3, 0, 2, 2, 3, -1]
    x, weight, bias, a, b = (
        torch.randn(shape, generator=generator, dtype=dtype)
        for shape in ((10, length, 7), (6, 7), (6,), (sum(ranks), 7), (6, sum(ranks)))
    )
    for given in (slots, [-1 if slot == 0 else slot for slot in slots]):
        if 0 not in given and ranks[0]:
            a[: ranks[0]] = b[:, : ranks[0]] = torch.nan
        rows = Rows.of(given, known=4, length=length)
        update = op.SlotUpdate(0, a, b, scales, op.table_of(ranks, 0.0, a.device))
        call = (x, (weight,), (bias,), [update], rows)
        with torch.no_grad():
            (got,) = op.rows_call(*call)
            (expected,) = op.rows_call(*call, backend="torch")
        # BLAS chooses its loops by a product's rows and the processor, which one rounding of a sum of 7 to 14 may show.
        near = 8 * torch.finfo(dtype).eps
        torch.testing.assert_close(got, expected, rtol=near, atol=near * float(expected.abs().max()))
        assert not got.isnan().any() and not got._is_view()
