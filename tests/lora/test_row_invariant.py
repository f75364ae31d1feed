"""A row's bits under ``use_row_invariant``: the same in any batch. Bits, so no tolerance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import peft_kernels as pk
from peft_kernels import testing

HALF, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
SEED = 7
ROWS_OF_X = 140
COUNTS = (1, 2, 7, 16, 17, 64, 129)
PAIRS = [(FP32, FP32), (HALF, HALF), (HALF, FP32), (FP16, FP16), (FP64, FP64)]
IDS = ["fp32", "bf16", "bf16-fp32", "fp16", "fp64"]
# Of the interpreter, which takes a second a call, fewer.
KERNEL_PAIRS = [(HALF, HALF), (FP16, FP32)]
on_torch = [pytest.param("torch", *pair, id=f"torch-{name}") for pair, name in zip(PAIRS, IDS, strict=True)]
on_triton = [pytest.param("triton", *pair, id=f"triton-{pair[0]}-{pair[1]}") for pair in KERNEL_PAIRS]
each_pair = pytest.mark.parametrize("backend, dtype, adapter", on_torch + on_triton)

Result = tuple[Tensor, ...]
Run = Callable[[Tensor, tuple[Tensor, ...]], tuple[Tensor, ...]]


def _draw(*shape: int, dtype: torch.dtype, seed: int, std: float = 1.0) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * std).to(dtype)


class Layer:
    """A member's tensors; sizes of no block, and of many."""

    def __init__(self, k: int, n: int, r: int, dtype: torch.dtype, adapter: torch.dtype, seed: int = 0) -> None:
        self.weight = _draw(n, k, dtype=dtype, seed=seed + 1, std=k**-0.5)
        self.lora_a = _draw(r, k, dtype=adapter, seed=seed + 2, std=k**-0.5)
        self.lora_b = _draw(n, r, dtype=adapter, seed=seed + 3)
        self.bias = _draw(n, dtype=dtype, seed=seed + 4)


def _rows(run: Run, x: Tensor, dys: tuple[Tensor, ...], rows: Tensor) -> Result:
    """y of each member, and dX, of a batch of some rows."""
    leaf = x[rows].requires_grad_()
    ys = run(leaf, tuple(rows))
    (dx,) = torch.autograd.grad(ys, leaf, [dy[rows] for dy in dys])
    return *(y.detach() for y in ys), dx


def _assert_same(name: str, got: Result, all_rows: Result, rows: Tensor) -> None:
    for index, (some, every) in enumerate(zip(got, all_rows, strict=True)):
        testing.assert_bitwise_equal(f"{name}: result {index}", some, every[rows])


def _counts(backend: str) -> tuple[int, ...]:
    return COUNTS if backend == "torch" else (1, 17, 64)


def _assert_rows_keep_their_bits(run: Run, x: Tensor, dys: tuple[Tensor, ...], counts: tuple[int, ...]) -> None:
    """In batches of any size, in any order, beside neighbours that are random, inf or nan."""
    shuffled = torch.randperm(len(x), generator=torch.Generator().manual_seed(3))
    with pk.use_row_invariant():
        every = _rows(run, x, dys, torch.arange(len(x)))
        for count in counts:
            rows = shuffled[:count]
            _assert_same(f"{count} rows", _rows(run, x, dys, rows), every, rows)
        mine = torch.zeros(len(x), dtype=torch.bool)
        mine[shuffled[: len(x) // 2]] = True
        for value in (2.5, float("inf"), float("nan")):
            other = tuple(dy.masked_fill(~mine.unsqueeze(1), value) for dy in dys)
            beside = _rows(run, x.masked_fill(~mine.unsqueeze(1), value), other, torch.arange(len(x)))
            rows = mine.nonzero().squeeze(1)
            _assert_same(f"beside {value}", tuple(result[rows] for result in beside), every, rows)


def _linear(layer: Layer, backend: str, **options: Any) -> Run:
    def run(x: Tensor, rows: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        arguments = layer.weight, layer.lora_a, layer.lora_b, 0.7, layer.bias
        return (pk.lora_linear(x, *arguments, backend=backend, **options),)

    return run


@pytest.mark.parametrize("k, n, r", [(80, 96, 8), (333, 157, 40), (512, 256, 1)])
@each_pair
def test_linear(backend: str, dtype: torch.dtype, adapter: torch.dtype, k: int, n: int, r: int) -> None:
    x, dy = _draw(ROWS_OF_X, k, dtype=dtype, seed=11), _draw(ROWS_OF_X, n, dtype=dtype, seed=12)
    if backend == "triton":
        x, dy = x[:70], dy[:70]
    run = _linear(Layer(k, n, r, dtype, adapter), backend)
    _assert_rows_keep_their_bits(run, x, (dy,), _counts(backend))


@each_pair
def test_dropout(backend: str, dtype: torch.dtype, adapter: torch.dtype) -> None:
    """A mask is that of a row's index, which therefore has to stay."""
    k, n = 80, 96
    x, dy = _draw(ROWS_OF_X, k, dtype=dtype, seed=11), _draw(ROWS_OF_X, n, dtype=dtype, seed=12)
    run = _linear(Layer(k, n, 8, dtype, adapter), backend, dropout_p=0.3, seed=SEED)
    with pk.use_row_invariant():
        every = _rows(run, x, (dy,), torch.arange(ROWS_OF_X))
        for count in _counts(backend):
            rows = torch.arange(count)
            _assert_same(f"{count} rows", _rows(run, x, (dy,), rows), every, rows)


@pytest.mark.parametrize("p", [0.0, 0.3])
@each_pair
def test_group(backend: str, dtype: torch.dtype, adapter: torch.dtype, p: float) -> None:
    k, sizes = 80, (96, 33)
    layers = [Layer(k, n, r, dtype, adapter, seed=10 * n) for n, r in zip(sizes, (8, 5), strict=True)]
    members = [pk.Member(each.weight, each.lora_a, each.lora_b, 0.7, each.bias) for each in layers]
    x = _draw(ROWS_OF_X, k, dtype=dtype, seed=11)
    dys = tuple(_draw(ROWS_OF_X, n, dtype=dtype, seed=n) for n in sizes)

    def run(x: Tensor, rows: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return pk.lora_group(x, members, dropout_p=p, seed=SEED if p else None, backend=backend)

    if not p:
        _assert_rows_keep_their_bits(run, x, dys, _counts(backend))
        return
    with pk.use_row_invariant():
        every = _rows(run, x, dys, torch.arange(ROWS_OF_X))
        for count in _counts(backend):
            rows = torch.arange(count)
            _assert_same(f"{count} rows", _rows(run, x, dys, rows), every, rows)


@each_pair
def test_a_group_of_one_is_the_layer(backend: str, dtype: torch.dtype, adapter: torch.dtype) -> None:
    layer, x = Layer(80, 96, 8, dtype, adapter), _draw(20, 80, dtype=dtype, seed=11)
    member = pk.Member(layer.weight, layer.lora_a, layer.lora_b, 0.7, layer.bias)
    with pk.use_row_invariant():
        (y,) = pk.lora_group(x, [member], backend=backend)
        alone = pk.lora_linear(x, layer.weight, layer.lora_a, layer.lora_b, 0.7, layer.bias, backend=backend)
    testing.assert_bitwise_equal("y", y, alone)


ADAPTERS = (8, 0, 5, 1)
"""Ranks of the slots."""


def _stacked(dtype: torch.dtype, adapter: torch.dtype, k: int, n: int) -> tuple[Tensor, Tensor, list[float]]:
    a = _draw(sum(ADAPTERS), k, dtype=adapter, seed=21, std=k**-0.5)
    return a, _draw(n, sum(ADAPTERS), dtype=adapter, seed=22), [0.7, 1.0, 2.0, 0.3]


@each_pair
def test_mixed_batch(backend: str, dtype: torch.dtype, adapter: torch.dtype) -> None:
    """A row with its adapter, alone and among rows of others; other slots' adapters and rows do not matter."""
    k, n, count = 80, 96, ROWS_OF_X if backend == "torch" else 70
    layer, x = Layer(k, n, 1, dtype, adapter), _draw(count, k, dtype=dtype, seed=11)
    dy, (a, b, scales) = _draw(count, n, dtype=dtype, seed=12), _stacked(dtype, adapter, k, n)
    slots = torch.randint(-1, len(ADAPTERS), (count,), generator=torch.Generator().manual_seed(5)).tolist()

    def run(x: Tensor, rows: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        plan = pk.Rows.of([slots[int(row)] for row in rows], known=len(ADAPTERS))
        arguments = layer.weight, a, b, scales, layer.bias
        return (pk.lora_linear(x, *arguments, rows=plan, ranks=ADAPTERS, backend=backend),)

    _assert_rows_keep_their_bits(run, x, (dy,), _counts(backend))
    with pk.use_row_invariant():
        every = _rows(run, x, (dy,), torch.arange(count))
        mine = torch.tensor([slot == 2 for slot in slots]).nonzero().squeeze(1)
        a[: ADAPTERS[0]], b[:, : ADAPTERS[0]] = 3.0, float("nan")
        beside = _rows(run, x, (dy,), torch.arange(count))
        _assert_same("beside another adapter", tuple(y[mine] for y in beside), every, mine)


@pytest.mark.parametrize("dtype, adapter", PAIRS, ids=IDS)
def test_a_slot_is_the_layer_of_its_adapter(dtype: torch.dtype, adapter: torch.dtype) -> None:
    """Wherever its factors stand among the others'."""
    k, n = 80, 96
    layer, x = Layer(k, n, 1, dtype, adapter), _draw(20, k, dtype=dtype, seed=11)
    a, b, scales = _stacked(dtype, adapter, k, n)
    dy, first = _draw(20, n, dtype=dtype, seed=12), 0
    for slot, rank in enumerate(ADAPTERS):
        mine = slice(first, first + rank)
        first += rank
        if rank == 0:
            continue
        own_a, own_b = a[mine].clone(), b[:, mine].clone(memory_format=torch.contiguous_format)
        plan = pk.Rows.of([slot] * 20, known=len(ADAPTERS))
        results = []
        for arguments, options in (
            ((a, b, scales), {"rows": plan, "ranks": ADAPTERS}),
            ((own_a, own_b, scales[slot]), {}),
        ):
            leaf = x.clone().requires_grad_()
            with pk.use_row_invariant():
                y = pk.lora_linear(leaf, layer.weight, *arguments, layer.bias, **options)  # type: ignore[arg-type]
            results.append((y.detach(), *torch.autograd.grad(y, leaf, dy)))
        for name, got, expected in zip(("y", "dx"), *results, strict=True):
            testing.assert_bitwise_equal(f"{name} of slot {slot}", got, expected)


def test_the_kernel_that_leaves_ds_in_parts_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU torch adds the parts up in an order by the number of rows; on a CPU it does not."""
    from peft_kernels.lora.kernels import triton_bwd

    asked: list[bool] = []
    launch = triton_bwd.narrow_and_reduce

    def noted(dy: Tensor, s: Tensor, b: Tensor, factor: float, needs: tuple[bool, bool, bool], *rest: Any) -> Any:
        asked.append(needs[0])
        return launch(dy, s, b, factor, needs, *rest)

    monkeypatch.setattr(triton_bwd, "narrow_and_reduce", noted)
    x, dy, layer = _draw(3, 80, dtype=FP32, seed=1), _draw(3, 96, dtype=FP32, seed=2), Layer(80, 96, 8, FP32, FP32)
    for enabled, expected in ((False, [True]), (True, [])):
        with pk.use_row_invariant(enabled):
            _rows(_linear(layer, "triton"), x, (dy,), torch.arange(3))
        assert asked == expected
        asked.clear()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_without_the_mode_bits_differ(backend: str) -> None:
    """Else nothing above could fail on this machine."""
    k, n = 512, 256
    x, dy = _draw(ROWS_OF_X, k, dtype=FP32, seed=11), _draw(ROWS_OF_X, n, dtype=FP32, seed=12)
    run = _linear(Layer(k, n, 8, FP32, FP32), backend)
    every, alone = (_rows(run, x, (dy,), torch.arange(count)) for count in (ROWS_OF_X, 1))
    assert not all(torch.equal(one, more[:1]) for one, more in zip(alone, every, strict=True))


@each_pair
def test_error_budget(backend: str, dtype: torch.dtype, adapter: torch.dtype) -> None:
    k, n, m = 333, 157, 64
    layer, x = Layer(k, n, 16, dtype, adapter), _draw(m, k, dtype=dtype, seed=11)
    dy = _draw(m, n, dtype=dtype, seed=12)
    with pk.use_row_invariant():
        ours = _rows(_linear(layer, backend), x, (dy,), torch.arange(m))

    def eager(x: Tensor, layer: Layer) -> Tensor:
        y = torch.nn.functional.linear(x, layer.weight, layer.bias)
        update = x.to(layer.lora_a.dtype) @ layer.lora_a.t() @ layer.lora_b.t() * 0.7
        return (y + update).to(x.dtype)

    results = []
    for wide in (False, True):
        of = Layer(k, n, 16, dtype, adapter)
        if wide:
            for name, value in vars(of).items():
                setattr(of, name, value.double())
        leaf = (x.double() if wide else x).clone().requires_grad_()
        y = eager(leaf, of)
        results.append((y.detach(), *torch.autograd.grad(y, leaf, dy.to(y.dtype))))
    for name, got, by_eager, exact in zip(("y", "dx"), ours, *results, strict=True):
        if dtype == FP64:
            # Both are float64's: a sum of 333 products in two orders.
            assert testing.relative_error(got, exact) < 1e-14
        else:
            testing.assert_close(name, got, by_eager, exact)
