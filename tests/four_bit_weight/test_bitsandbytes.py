"""bitsandbytes' weights: its CPU code has our bits, its objects are read, and what is not understood is refused.

bitsandbytes belongs to the tests' environment: where it is missing these fail.
"""

from __future__ import annotations

import copy
import itertools
from types import SimpleNamespace
from typing import Any

import bitsandbytes
import pytest
import torch
from bitsandbytes import functional
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import peft_kernels as pk
from tests.four_bit_weight.cases import BACKENDS, HALF_AND_FLOAT, OPERATOR

BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
each_nested = pytest.mark.parametrize("nested", [False, True], ids=["float32", "nested"])


def _quantized(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0, **options: Any) -> tuple[Tensor, Any]:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    options = {"blocksize": 64, "quant_type": "nf4", "compress_statistics": False} | options
    return functional.quantize_4bit(weight, **options)


def _theirs(packed: Tensor, state: Any) -> Tensor:
    """By their CPU code, as one row.

    Its AVX-512 kernel (0.50.2) counts blocks by rows, and is wrong where a row is a multiple of 32 elements and not of
    the block; the GPU's and the plain one count through the flat weight, which one row is.
    """
    flat = copy.copy(state)
    flat.shape = torch.Size((1, state.shape.numel()))
    return functional.dequantize_4bit(packed, flat).reshape(state.shape)


def _assert_same(packed: Tensor, state: Any, backend: str) -> None:
    weight = pk.four_bit.from_quant_state(packed, state)
    with OPERATOR.using(backend) as name:
        ours, theirs = pk.four_bit.dequantize(**weight._asdict(), backend=name), _theirs(packed, state)
    assert ours.dtype == theirs.dtype == state.dtype
    # Of FP4's second zero its kernels make 0.0 and -0.0, each where it is faster; NF4 has one.
    ours, theirs = (each + 0.0 if state.quant_type == "fp4" else each for each in (ours, theirs))
    assert torch.equal(ours.view(-1).view(torch.uint8), theirs.view(-1).view(torch.uint8))


@each_nested
@pytest.mark.parametrize("dtype", HALF_AND_FLOAT)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_bits_are_theirs(backend: str, kind: str, dtype: torch.dtype, nested: bool) -> None:
    """Rows and weights that are multiples of the block, and that are not; weights shorter than one."""
    blocks = BLOCKS if backend == "torch" else (32, 64, 4096)
    for block, shape in itertools.product(blocks, ((96, 64), (33, 70), (7, 13), (2, 1500), (3,))):
        options = {"blocksize": block, "quant_type": kind, "compress_statistics": nested}
        _assert_same(*_quantized(shape, dtype, **options), backend)


@settings(max_examples=12, deadline=None)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(3, 700),
    dtype=st.sampled_from(HALF_AND_FLOAT),
    block=st.sampled_from(BLOCKS),
    kind=st.sampled_from(["nf4", "fp4"]),
    nested=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_bits_are_theirs_for_any_weight(
    rows: int, columns: int, dtype: torch.dtype, block: int, kind: str, nested: bool, seed: int
) -> None:
    given = _quantized((rows, columns), dtype, seed, blocksize=block, quant_type=kind, compress_statistics=nested)
    _assert_same(*given, "torch")


def test_rows_of_whole_blocks_are_theirs_as_they_are() -> None:
    packed, state = _quantized((96, 256), torch.bfloat16, compress_statistics=True)
    weight = pk.four_bit.from_quant_state(packed, state)
    assert torch.equal(pk.four_bit.dequantize(**weight._asdict()), functional.dequantize_4bit(packed, state))


def test_tables_are_theirs() -> None:
    for kind in ("nf4", "fp4"):
        _, state = _quantized((1, 64), torch.float32, quant_type=kind)
        values = functional.get_4bit_type(kind, device="cpu")
        codes = torch.arange(16, dtype=torch.uint8)
        given = {"packed": codes << 4 | codes, "kind": kind, "shape": (32,), "dtype": torch.float32}
        got = pk.four_bit.dequantize(**given, scales=torch.ones(1))
        assert torch.equal(got, values.repeat_interleave(2)) and torch.equal(state.code, values)


def _layer(storage: torch.dtype = torch.uint8, **options: Any) -> Any:
    options = {"quant_type": "nf4", "compute_dtype": torch.bfloat16, "quant_storage": storage, **options}
    layer = bitsandbytes.nn.Linear4bit(128, 24, bias=False, **options)
    with torch.no_grad():
        layer.weight.normal_(generator=torch.Generator().manual_seed(0))
    layer.weight._quantize("cpu")
    return layer


@each_nested
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32], ids=str)
def test_a_layer_s_weight_is_read(storage: torch.dtype, nested: bool) -> None:
    """Of any storage; as a plain tensor, and without a copy."""
    layer = _layer(storage, compress_statistics=nested)
    assert layer.weight.dtype == storage
    weight = pk.four_bit.from_quant_state(layer.weight)
    assert type(weight.packed) is Tensor and weight.packed.dtype == torch.uint8
    assert weight.packed.data_ptr() == layer.weight.data_ptr() and (weight.nested is None) != nested
    expected = functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    assert torch.equal(pk.four_bit.dequantize(**weight._asdict()), expected)
    again = pk.four_bit.from_quant_state(copy.deepcopy(layer).weight)
    assert torch.equal(pk.four_bit.dequantize(**again._asdict()), expected)


def test_a_loaded_state_is_read() -> None:
    """Its offset is on the CPU or a device, its code a copy."""
    packed, state = _quantized((64, 130), torch.float16, compress_statistics=True)
    loaded = functional.QuantState.from_dict(state.as_dict(packed=True), torch.device("cpu"))
    weights = (pk.four_bit.from_quant_state(packed, each) for each in (state, loaded))
    first, second = (pk.four_bit.dequantize(**weight._asdict()) for weight in weights)
    assert torch.equal(first, second)


def test_statistics_of_half_precision_are_read_as_they_do() -> None:
    packed, state = _quantized((64, 128), torch.bfloat16)
    state.absmax = state.absmax.half()
    _assert_same(packed, state, "torch")


def _state(**changes: Any) -> Any:
    """A state by its attributes alone."""
    _, state = _quantized((4, 64), torch.float32)
    names = ("absmax", "shape", "dtype", "blocksize", "quant_type", "code", "offset", "state2")
    return SimpleNamespace(**{name: getattr(state, name) for name in names} | changes)


def _second(**changes: Any) -> Any:
    given = {"absmax": torch.ones(1), "code": torch.ones(256), "blocksize": 256, "state2": None}
    return SimpleNamespace(**given | changes)


_NESTED = {"absmax": torch.zeros(4, dtype=torch.uint8), "offset": torch.tensor(0.5)}


class _Sharded(Tensor):
    """Such as a DTensor."""


@pytest.mark.parametrize(
    ("packed", "state", "reason"),
    [
        (torch.zeros(128, 1, dtype=torch.uint8), None, "it has no quant_state"),
        (nn.Parameter(torch.zeros(4, 64)), None, "it has no quant_state"),
        (torch.zeros(128, 1, dtype=torch.uint8), SimpleNamespace(absmax=1), "its quant_state has no shape, dtype"),
        (torch.zeros(128, 1, dtype=torch.uint8), _state(quant_type="int4"), "its quant_type is none of .*got 'int4'"),
        (torch.zeros(128, 1, dtype=torch.uint8), _state(quant_type="mxfp4"), "its quant_type is none of"),
        (torch.zeros(128, 1, dtype=torch.uint8), _state(shape=None), "its quant_state has no shape"),
        (torch.zeros(128, 1, dtype=torch.uint8), _state(blocksize=96), "block_size must be a power of two"),
        (torch.zeros(128, 1, dtype=torch.uint8), _state(blocksize=128), "scales must have 2 elements"),
        (torch.zeros(128, 1, dtype=torch.uint8), _state(dtype=torch.int8), "dtype must be one of"),
        (torch.zeros(127, 1, dtype=torch.uint8), _state(), "packed must have 128 elements"),
        (torch.zeros(1, 128, dtype=torch.uint8), _state(), r"it is packed as a row, \(1, 128\)"),
        (torch.zeros(128, 1, dtype=torch.uint8), _state(code=torch.linspace(-1, 1, 16)), "a table that is not nf4's"),
        (
            torch.zeros(128, 1, dtype=torch.uint8),
            _state(packing_format_for_cpu=True),
            "bitsandbytes has packed it anew for its own product on a CPU",
        ),
        (
            torch.zeros(128, 1, dtype=torch.uint8),
            _state(absmax=None),
            "its absmax must be a plain tensor, got NoneType",
        ),
        (
            torch.zeros(128, 1, dtype=torch.uint8).as_subclass(_Sharded),
            _state(),
            "its weight must be a plain tensor, got _Sharded",
        ),
        (
            torch.zeros(128, 1, dtype=torch.uint8, device="meta"),
            _state(),
            "scales must be on the device of packed",
        ),
        (
            torch.zeros(128, 1, dtype=torch.uint8),
            _state(**_NESTED | {"offset": None}, state2=_second()),
            "a state2 and no offset",
        ),
        (
            torch.zeros(128, 1, dtype=torch.uint8),
            _state(**_NESTED, state2=_second(state2=_second())),
            "its statistics are quantized more than twice",
        ),
        (
            torch.zeros(128, 1, dtype=torch.uint8),
            _state(**_NESTED, state2=_second(code=torch.ones(16))),
            "nested's code must have 256 elements",
        ),
        (
            torch.zeros(128, 1, dtype=torch.uint8),
            _state(**_NESTED, state2=_second(blocksize=2)),
            "nested's absmax must have 2 elements",
        ),
        (
            torch.zeros(128, 1, dtype=torch.uint8),
            _state(**_NESTED | {"absmax": torch.ones(4)}, state2=_second()),
            "nested must not be given",
        ),
    ],
)
def test_what_is_not_understood_is_refused(packed: Any, state: Any, reason: str) -> None:
    with pytest.raises(pk.UnsupportedError, match=f"^from_quant_state: this weight is not understood: .*{reason}"):
        pk.four_bit.from_quant_state(packed, state)


def test_a_weight_that_is_not_quantized_yet_says_so() -> None:
    layer = bitsandbytes.nn.Linear4bit(128, 24, quant_type="nf4")
    with pytest.raises(pk.UnsupportedError, match="bitsandbytes quantizes a weight where it is moved to its device"):
        pk.four_bit.from_quant_state(layer.weight)
