"""Who computes a dropout on a device: each the same bits, and nobody a kernel where torch must see what happens."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import peft_kernels as pk
from peft_kernels._core import cuda_tools, dispatch, extension
from peft_kernels._core.triton_tools import why_not_installed
from peft_kernels.lora.kernels import cuda_gemm, cuda_reduce, dropout, masks
from peft_kernels.lora.kernels.dropout import Rows
from peft_kernels.lora.linear import mask_choice, torch_steps
from peft_kernels.lora.qualification import MASKS
from python_ref import lora as oracle
from tests.compiled import host_extension
from tests.lora.cases import GRID, OPERATOR, Case

pytestmark = [pytest.mark.cpu_only, pytest.mark.usefixtures("poison")]

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
PAIRS = [(BF16, BF16), (FP16, FP16), (FP32, FP32), (FP64, FP64), (BF16, FP32), (FP16, FP32)]
LIMITS = [1, dropout.threshold(0.1), 32768, 65535]
WIDTHS = [1, 7, 8, 9, 511, 512, 513, 1000]
LANES = [0, 1, 5, 2**32 - 1]


def part_of(rows: int, cols: int, limit: int = 20000, seed: int = 5, first_row: int = 0, lane: int = 0) -> Rows:
    return Rows(torch.tensor(seed), first_row, rows, cols, limit, lane)


@pytest.fixture(params=["portable", "avx2", "avx512"])
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each set of instructions that the compiled code is there for and the processor has."""
    if request.param not in host_extension().lora.host_levels():
        pytest.skip(f"{request.param} does not run here")
    monkeypatch.setattr(masks, "_host_level", lambda: request.param)
    return request.param


def interpreted() -> type[masks.Mask]:
    if why_not_installed() is not None:
        pytest.skip(str(why_not_installed()))
    return masks.TritonMask


@pytest.fixture
def byte_mask(monkeypatch: pytest.MonkeyPatch) -> type[masks.Mask]:
    """With a launch that writes the CPU's memory by torch's recipe."""

    def launch(
        mask: int, seed: int, first_row: int, rows: int, cols: int, threshold: int, lane: int, stream: int
    ) -> None:
        value = torch.tensor(ctypes.c_int64.from_address(seed).value)
        kept = dropout.keep_bits(value, first_row, rows, cols, threshold, lane) != 0
        ctypes.memmove(mask, kept.data_ptr(), kept.numel())

    @contextlib.contextmanager
    def stream_of(device: torch.device) -> Iterator[int]:
        yield 0

    monkeypatch.setattr(extension, "load", lambda: SimpleNamespace(lora=SimpleNamespace(dropout_mask=launch)))
    monkeypatch.setattr(cuda_tools, "stream_of", stream_of)
    return masks.ByteMask


def drawn(rows: int, cols: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Normal values with an inf, a nan and a zero of either sign in every row."""
    x = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed), dtype=FP64).to(dtype)
    for row, value in itertools.product(range(rows), (torch.inf, -torch.inf, torch.nan, -0.0)):
        x[row, (row * 7 + int(value == value) * 3 + int(value < 0)) % cols] = value
    return x


def assert_same(got: Tensor, expected: Tensor) -> None:
    """Bit for bit, but for the bits of a nan."""
    integer = dropout._INTEGER_OF_SIZE[expected.element_size()]
    assert got.dtype == expected.dtype and got.shape == expected.shape
    got, expected = got.resolve_neg(), expected.resolve_neg()
    nan = expected.isnan()
    assert torch.equal(got.isnan(), nan)
    assert torch.equal(got.view(integer)[~nan], expected.view(integer)[~nan])


def added(out: Tensor, product: Tensor, kept: Tensor, factor: float) -> Tensor:
    """out + factor * drop(product): the product and the sum each rounded in the wide dtype, the result once more."""
    wide = FP64 if out.dtype == FP64 else FP32
    return (out.to(wide) + torch.where(kept, product, 0.0).to(wide) * factor).to(out.dtype)


@pytest.mark.parametrize("seed", [0, -1, 2**63 - 1, -(2**63), 20240229])
@pytest.mark.parametrize("first_row", [0, 2**32 - 2])
def test_compiled_mask_is_the_recipe_s(level: str, seed: int, first_row: int) -> None:
    """Rows on both sides of 2^32, where the counter's high word sets in."""
    for cols, limit, lane in itertools.product(WIDTHS, LIMITS, LANES):
        part = part_of(4, cols, limit, seed, first_row, lane)
        assert torch.equal(masks.HostMask(part).keep(), dropout.keep_bits(*part) != 0), (cols, limit, lane)
        if first_row == 0:
            assert torch.equal(masks.HostMask(part).keep(), dropout.keep_mask(part.seed, 4, cols, limit, lane))


LAYOUTS = {
    "rows": lambda x: x,
    "strided": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "columns": lambda x: x.t().contiguous().t(),
    "expanded": lambda x: x[:1].expand(x.shape),
    "backwards": lambda x: torch._neg_view(-x),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("dtype", "out_dtype"), PAIRS, ids=str)
def test_compiled_drop_is_torch_s(level: str, dtype: torch.dtype, out_dtype: torch.dtype, layout: str) -> None:
    for cols, factor in itertools.product((1, 13, 520), (1.0, dropout.keep_scale(20000))):
        part = part_of(5, cols)
        x = LAYOUTS[layout](drawn(5, cols, dtype))
        before = x.clone()
        assert_same(masks.HostMask(part).drop(x, out_dtype, factor), masks.TorchMask(part).drop(x, out_dtype, factor))
        assert_same(x, before)


@pytest.mark.parametrize(("dtype", "product_dtype"), PAIRS, ids=str)
def test_compiled_sum_is_rounded_once(level: str, dtype: torch.dtype, product_dtype: torch.dtype) -> None:
    for cols, factor in itertools.product((1, 13, 520), (1.0, dropout.keep_scale(20000))):
        part, wider = part_of(5, cols), drawn(5, cols + 3, dtype, seed=1)
        product, before = drawn(5, cols, product_dtype), wider.clone()
        masks.HostMask(part).add_dropped(wider[:, :cols], product, factor)
        assert_same(wider[:, :cols], added(before[:, :cols], product, dropout.keep_bits(*part) != 0, factor))
        assert_same(wider[:, cols:], before[:, cols:])


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("factor", [1.25, 1e-3, 3e4, 2.0**-14])
def test_every_half_precision_value(level: str, dtype: torch.dtype, factor: float) -> None:
    """Subnormal ones, ties and what leaves the range among them; nothing is dropped."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).view(64, 1024)
    part = Rows(torch.tensor(0), 0, 64, 1024, 0)
    assert_same(masks.HostMask(part).drop(every, dtype, factor), every * factor)
    assert_same(masks.HostMask(part).drop(every, FP32, 1.0), every.float())
    total = torch.zeros(64, 1024, dtype=dtype)
    masks.HostMask(part).add_dropped(total, every.float(), factor)
    assert_same(total, (torch.zeros(()) + every.float() * factor).to(dtype))


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_float32_is_rounded_to_the_nearest(level: str, dtype: torch.dtype) -> None:
    """Around each value of half precision and each middle between two: the float32 neighbours on both sides."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).float()
    every = every[every.isfinite()].sort().values
    middle = every[1:] / 2 + every[:-1] / 2
    middle = middle[: len(middle) // 64 * 64]
    points = torch.cat([torch.nextafter(middle, torch.tensor(side)) for side in (-torch.inf, torch.inf)] + [middle])
    points = points.view(-1, 64)
    total = torch.zeros(points.shape, dtype=dtype)
    masks.HostMask(Rows(torch.tensor(0), 0, *points.shape, 0)).add_dropped(total, points, 1.0)
    assert_same(total, (points + 0.0).to(dtype))


def test_threads_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    host_extension()
    part = part_of(1031, 1000)  # several threads' work
    x, results = drawn(1031, 1000, FP32), []
    for threads in (1, 2, 3, 4):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        total = torch.ones(1031, 1000)
        masks.HostMask(part).add_dropped(total, x, 1.5)
        results.append((masks.HostMask(part).keep(), masks.HostMask(part).drop(x, FP32, 1.5), total))
    for each in results[1:]:
        assert all(torch.equal(a.nan_to_num(3), b.nan_to_num(3)) for a, b in zip(each, results[0], strict=True))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rows": -1}, "must not be negative"),
        ({"first_row": -1}, "must not be negative"),
        ({"cols": 2**35 + 8}, "cols must be at most 2\\^35"),
        ({"threshold": 65536}, "threshold must be below 65536"),
        ({"level": "sse"}, "level must be one of portable, avx2, avx512, got sse"),
        ({"dtype": "float32", "out_dtype": "bfloat16"}, "must be the same, or float32 beside half precision"),
        ({"dtype": "float64", "out_dtype": "float32"}, "must be the same, or float32 beside half precision"),
        ({"dtype": "int8"}, "dtype must be one of bfloat16, float16, float32, float64"),
    ],
)
def test_bad_arguments_are_refused(wrong: dict[str, Any], message: str) -> None:
    given = {"seed": 8, "first_row": 0, "rows": 4, "cols": 8, "threshold": 3, "lane": 0, "threads": 1}
    given |= {
        "level": "portable",
        "x": (64, 8),
        "out": (64, 8),
        "factor": 1.0,
        "dtype": "float32",
        "out_dtype": "float32",
    }
    with pytest.raises(ValueError, match=message):
        host_extension().lora.host_drop(**given | wrong)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("dtype", "out_dtype"), PAIRS, ids=str)
def test_triton_s_launches_are_torch_s(dtype: torch.dtype, out_dtype: torch.dtype, layout: str) -> None:
    made = interpreted()
    for cols, first_row in ((13, 0), (520, 2**31 - 6)):
        part = part_of(5, cols, first_row=first_row)
        x, factor = LAYOUTS[layout](drawn(5, cols, dtype)), dropout.keep_scale(20000)
        for each in (1.0, factor):
            assert_same(made(part).drop(x, out_dtype, each), masks.TorchMask(part).drop(x, out_dtype, each))
        wider, product = drawn(5, cols + 3, dtype, seed=1), LAYOUTS[layout](drawn(5, cols, out_dtype))
        before = wider.clone()
        kept = dropout.keep_bits(*part) != 0
        made(part).add_dropped(wider[:, :cols], product.clone(), factor)
        if dtype == FP64:
            # torch's own, which may leave the product of a few units unrounded.
            expected = added(before[:, :cols], product, kept, factor)
            torch.testing.assert_close(wider[:, :cols], expected, rtol=0, atol=1e-15, equal_nan=True)
        else:
            assert_same(wider[:, :cols], added(before[:, :cols], product, kept, factor))
        assert_same(wider[:, cols:], before[:, cols:])


def test_rows_that_triton_does_not_count_are_torch_s() -> None:
    made, x = interpreted(), drawn(4, 9, FP32)
    for first_row in (2**31 - 4, 2**32 - 2):
        part = part_of(4, 9, first_row=first_row)
        assert_same(made(part).drop(x, FP32, 2.0), masks.TorchMask(part).drop(x, FP32, 2.0))
        assert torch.equal(made(part).keep(), dropout.keep_bits(*part) != 0)


@pytest.mark.parametrize(("dtype", "out_dtype"), PAIRS, ids=str)
def test_written_mask_is_torch_s(byte_mask: type[masks.Mask], dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    part = part_of(5, 13, first_row=3)
    x, factor = drawn(5, 13, dtype), dropout.keep_scale(20000)
    assert_same(byte_mask(part).drop(x, out_dtype, factor), masks.TorchMask(part).drop(x, out_dtype, factor))
    totals = [drawn(5, 13, dtype, seed=1) for _ in range(2)]
    for made, total in zip((byte_mask, masks.TorchMask), totals, strict=True):
        made(part).add_dropped(total, drawn(5, 13, out_dtype, seed=2), factor)
    assert_same(*totals)
    assert torch.equal(byte_mask(part).keep(), dropout.keep_bits(*part) != 0)


@pytest.fixture(params=["HostMask", "TritonMask", "TorchMask", "ByteMask"])
def made(request: pytest.FixtureRequest) -> type[masks.Mask]:
    """Each provider."""
    if request.param == "HostMask":
        host_extension()
    if request.param == "TritonMask":
        interpreted()
    kind: type[masks.Mask] = getattr(masks, request.param)
    return request.getfixturevalue("byte_mask") if request.param == "ByteMask" else kind


@pytest.mark.parametrize("lane", LANES)
def test_every_provider_has_the_lane_s_mask(made: type[masks.Mask], lane: int) -> None:
    """In each of its functions; and without the lane in its counter it would have another."""
    part, p = part_of(4, 21, dropout.threshold(0.3), lane=lane), 0.3
    expected, ones = oracle.dropout_mask(5, 4, 21, p, lane), torch.ones(4, 21)
    total = torch.zeros(4, 21)
    made(part).add_dropped(total, ones.clone(), 2.0)
    assert torch.equal(made(part).keep(), expected)
    assert torch.equal(made(part).drop(ones, FP32, 3.0), 3.0 * expected)
    assert torch.equal(total, 2.0 * expected)
    assert torch.equal(made(part._replace(lane=0)).keep(), expected) == (lane == 0)


@pytest.mark.parametrize("lane", LANES)
def test_published_mask_is_the_lane_s(lane: int) -> None:
    expected = oracle.dropout_mask(5, 4, 21, 0.3, lane)
    assert torch.equal(pk.lora_linear_dropout_mask(5, 4, 21, 0.3, lane=lane), expected)
    assert torch.equal(dropout.keep_mask(torch.tensor(5), 4, 21, dropout.threshold(0.3), lane), expected)


def test_lane_0_has_the_bits_that_there_were_before_lanes(made: type[masks.Mask]) -> None:
    """Seeds that users have kept give the masks that they gave."""
    limit, seed = dropout.threshold(0.1), 20240229
    for part, rows in (
        (part_of(4, 40, limit, seed), ("9dbbd5bfff", "def7f6fe7f", "fdfdfefe6f", "fe3ff7f7df")),
        (part_of(4, 40, 32768, seed, 2**32 - 2), ("00016c7034", "8bfd26452f", "8bd1bd934b", "30a96a4ef2")),
    ):
        got = ["".join("01"[kept] for kept in row) for row in made(part).keep().tolist()]
        assert [f"{int(row, 2):010x}" for row in got] == list(rows)


def test_lanes_are_uncorrelated() -> None:
    """Within five standard deviations, 1 / sqrt(draws) each: beyond them is one of two million pairs."""
    numbers = (*range(8), 2**31, 2**32 - 1)
    keep = [masks.TorchMask(part_of(512, 1024, 32768, lane=lane)).keep().double() * 2 - 1 for lane in numbers]
    for a, b in itertools.combinations(keep, 2):
        assert abs(float((a * b).mean())) < 5 / a.numel() ** 0.5


@pytest.mark.parametrize("lane", [-1, 2**32, 1.0, True, "1", None, torch.tensor(1)], ids=repr)
def test_a_lane_that_is_none_is_refused(lane: Any) -> None:
    with pytest.raises(ValueError, match=r"lane must be an int in 0 \.\.\. 2\^32 - 1, got "):
        pk.lora_linear_dropout_mask(5, 4, 21, 0.3, lane=lane)


def test_kernels_without_lanes_refuse_them() -> None:
    """Instead of lane 0's mask."""
    x, drop = torch.ones(8, 8, dtype=BF16), dropout.Dropout(torch.tensor(5), 20000, dropout.keep_scale(20000), lane=3)
    for launch in (
        lambda: cuda_gemm.forward(x, x, x, x, 1.0, None, drop),
        lambda: cuda_gemm.input_gradient(x, x, x, x, 1.0, drop),
        lambda: cuda_reduce.reduce_rows(None, cuda_reduce.OverX(x, x.float(), drop), 8, BF16),
    ):
        with pytest.raises(ValueError, match="draws the mask of lane 0 alone, got lane 3"):
            launch()


@pytest.mark.parametrize(
    ("device", "triton", "cuda", "host", "expected"),
    [
        ("cpu", None, None, None, (masks.HostMask, masks.TorchMask)),
        ("cpu", None, None, "no compiler", (masks.TorchMask,)),
        ("cuda", None, None, None, (masks.TritonMask, masks.ByteMask, masks.TorchMask)),
        ("cuda", "no triton", None, None, (masks.ByteMask, masks.TorchMask)),
        ("cuda", "no triton", "no nvcc", None, (masks.TorchMask,)),
        ("meta", None, None, None, (masks.TorchMask,)),
        ("mps", None, None, None, (masks.TorchMask,)),
    ],
)
def test_kinds(
    device: str,
    triton: str | None,
    cuda: str | None,
    host: str | None,
    expected: tuple[type[masks.Mask], ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(masks.triton_tools, "why_not_device", lambda device: triton)
    monkeypatch.setattr(masks.cuda_tools, "why_not_device", lambda device, arch: cuda)
    monkeypatch.setattr(masks.extension, "why_no_host", lambda: host)
    assert masks.kinds(torch.device(device)) == expected


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        ((), masks.TritonMask),
        (("triton masks",), masks.ByteMask),
        (("triton masks", "cuda masks"), masks.TorchMask),
        (("cuda masks",), masks.TritonMask),
    ],
)
def test_a_gpu_takes_the_first_kind_that_is_right_there(
    wrong: tuple[str, ...], expected: type[masks.Mask], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each kind is asked for by all of its parts, and once, until what is right may have changed."""
    asked: list[str] = []

    def why_not(machine: object, wanted: list[Any], device: torch.device) -> str | None:
        asked.append(wanted[0].implementation)
        assert [each.part for each in wanted] == list(MASKS.parts)
        return "it was wrong" if wanted[0].implementation in wrong else None

    device = torch.device("cuda", 0)
    monkeypatch.setattr(masks.triton_tools, "why_not_device", lambda device: None)
    monkeypatch.setattr(masks.cuda_tools, "why_not_device", lambda device, arch: None)
    monkeypatch.setattr(mask_choice.records, "signature", lambda device: None)
    monkeypatch.setattr(mask_choice.verdicts, "why_not_parts", why_not)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    dispatch.choices_changed()
    assert mask_choice.provider(device) is expected
    known = asked.copy()
    assert mask_choice.provider(device) is expected and asked == known
    dispatch.choices_changed()
    assert mask_choice.provider(device) is expected and asked == 2 * known
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert mask_choice.provider(device) is expected and asked == 3 * known
    with mask_choice.bound_to(masks.ByteMask):
        assert mask_choice.provider(device) is masks.ByteMask
        assert mask_choice.provider(torch.device("cpu")) in (masks.HostMask, masks.TorchMask)
    dispatch.choices_changed()


@pytest.fixture
def unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that fail."""

    def fail(*arguments: Any) -> None:
        raise AssertionError("a kernel was reached")

    host_extension()
    for made in (masks.HostMask, masks.TritonMask, masks.ByteMask):
        monkeypatch.setattr(made, "__init__", fail)


def _published(seed: int | Tensor) -> Tensor:
    return pk.lora_linear_dropout_mask(seed, 5, 11, 0.4)


@pytest.mark.usefixtures("unreachable")
def test_no_kernel_where_torch_must_see_it() -> None:
    seeds = torch.tensor([3, 4, -5])
    expected = torch.stack([dropout.keep_mask(seed, 5, 11, dropout.threshold(0.4)) for seed in seeds])
    with FakeTensorMode():
        assert _published(3).shape == (5, 11)
    assert pk.lora_linear_dropout_mask(3, 5, 11, 0.4, "meta").shape == (5, 11)
    assert torch.equal(torch.vmap(_published)(seeds), expected)
    assert torch.equal(make_fx(_published)(seeds[0])(seeds[1]), expected[1])
    assert torch.equal(torch.compile(_published, backend="aot_eager", fullgraph=True)(seeds[2]), expected[2])
    assert torch.equal(torch.jit.trace(_published, (seeds[0],), check_trace=False)(seeds[1]), expected[1])


def test_default_device_plays_no_part() -> None:
    """Compiled code that writes where nothing was allocated ends the process."""
    layer, x = pk.FusedLoRALinear(8, 8, r=2, lora_dropout=0.5), torch.ones(3, 8)
    with torch.device("meta"):
        mask, y = pk.lora_linear_dropout_mask(3, 5, 11, 0.4, "cpu"), layer(x)
    assert torch.equal(mask, dropout.keep_mask(torch.tensor(3), 5, 11, dropout.threshold(0.4)))
    assert y.device.type == "cpu" and y.isfinite().all()


def test_a_kernel_where_nobody_looks(unreachable: None) -> None:
    """Else the test above could not fail."""
    with pytest.raises(AssertionError, match="a kernel was reached"):
        _published(3)


BY_TORCH = [case for case in GRID if case.p and case.m == 37]


@pytest.mark.parametrize("rows", [7, 1 << 20])
@pytest.mark.parametrize("case", BY_TORCH, ids=str)
def test_torch_backend_by_each(case: Case, made: type[masks.Mask], rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error budget, in one block of rows and in several."""
    monkeypatch.setattr(mask_choice, "provider", lambda device: made)
    monkeypatch.setattr(torch_steps, "torch_rows_per_block", lambda width, device_type: rows)
    OPERATOR.check_budget(case, torch.device("cpu"), functools.partial(OPERATOR.run_ours, variant="torch"))


def test_without_a_compiler_the_backend_is_as_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "why_no_host", lambda: "no compiler")
    monkeypatch.setattr(extension, "load_host", lambda: pytest.fail("it was loaded"))
    for case in (Case(dtype=BF16, adapter_dtype=FP32), Case(dtype=BF16, adapter_dtype=FP32, p=0.3), Case(p=0.3)):
        OPERATOR.check_budget(case, torch.device("cpu"), functools.partial(OPERATOR.run_ours, variant="torch"))
    assert pk.lora_linear_dropout_mask(3, 4, 5, 0.0).all()
