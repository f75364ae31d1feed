"""The oracle against what it does not share: autograd, finite differences, PEFT's layer, a Philox of its own."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import peft_kernels as pk
from python_ref import compare
from python_ref import lora as oracle

N, K, R = 7, 11, 3


def _tensors(shape: tuple[int, ...], bias: bool, seed: int = 0) -> dict[str, Tensor | None]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    return {
        "x": normal(*shape, K),
        "weight": normal(N, K),
        "lora_a": normal(R, K),
        "lora_b": normal(N, R),
        "bias": normal(N) if bias else None,
    }


def _dropout(shape: tuple[int, ...], p: float) -> dict[str, Any]:
    rows = torch.Size(shape).numel()
    return {"dropout_mask": oracle.dropout_mask(5, rows, K, p) if p else None, "dropout_p": p}


def test_forward_is_the_equation_element_by_element() -> None:
    shape, p, scale = (2, 2), 0.4, 1.25
    tensors, dropout = _tensors(shape, bias=True), _dropout(shape, p)
    y, s = oracle.forward(**tensors, scale=scale, **dropout)
    x, mask = tensors["x"].reshape(-1, K), dropout["dropout_mask"]
    keep = 1 / (1 - oracle.effective_dropout(p))
    for m in range(4):
        dropped = [float(x[m, k]) * keep if mask[m, k] else 0.0 for k in range(K)]
        down = [sum(dropped[k] * float(tensors["lora_a"][i, k]) for k in range(K)) for i in range(R)]
        assert s.reshape(-1, R)[m].tolist() == pytest.approx(down, rel=1e-13)
        for n in range(N):
            base = sum(float(x[m, k]) * float(tensors["weight"][n, k]) for k in range(K)) + float(tensors["bias"][n])
            update = sum(down[i] * float(tensors["lora_b"][n, i]) for i in range(R))
            assert float(y.reshape(-1, N)[m, n]) == pytest.approx(base + scale * update, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_oracle_keeps_its_arguments_dtype(dtype: torch.dtype) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in _tensors((4,), bias=True).items()}
    dropout = _dropout((4,), 0.3)
    assert {result.dtype for result in oracle.forward(**tensors, scale=torch.tensor(0.5), **dropout)} == {dtype}
    parameters = {name: tensor for name, tensor in tensors.items() if name != "bias"}
    gradients = oracle.backward(torch.ones(4, N, dtype=dtype), **parameters, scale=torch.tensor(0.5), **dropout)
    assert {gradient.dtype for gradient in gradients} == {dtype}


def test_dropped_inf_is_zero() -> None:
    tensors = _tensors((1,), bias=False)
    tensors["x"][0, 4] = torch.inf
    mask = torch.ones(1, K, dtype=torch.bool)
    mask[0, 4] = False
    _, s = oracle.forward(**tensors, dropout_mask=mask, dropout_p=0.5)
    assert s.isfinite().all()


def _peft_layer(base: torch.nn.Linear, lora_a: Tensor, lora_b: Tensor, scale: float, p: float) -> torch.nn.Module:
    """PEFT's own layer around the tensors; its adapters keep their dtype."""
    pytest.importorskip("peft")
    from peft import LoraConfig
    from peft.tuners.lora import Linear

    r = lora_a.shape[0]
    config = LoraConfig(r=r, lora_alpha=scale * r, lora_dropout=p, init_lora_weights=False)
    layer = Linear(base, "default", config=config, r=r, lora_alpha=scale * r)
    layer.lora_A["default"].weight = torch.nn.Parameter(lora_a.clone())
    layer.lora_B["default"].weight = torch.nn.Parameter(lora_b.clone())
    assert layer.scaling["default"] == scale
    return layer.train()


PAIRS = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
]


@pytest.mark.cpu_only
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("dtype", "adapter_dtype"), PAIRS, ids=str)
def test_eager_is_peft_bit_for_bit(dtype: torch.dtype, adapter_dtype: torch.dtype, bias: bool, p: float) -> None:
    """Output and every gradient. PEFT draws its own mask, which its dropout of ones under the same seed reveals."""
    scale, shape, n, k, r = 0.75, (3, 19), 40, 72, 6
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int, to: torch.dtype = dtype) -> Tensor:
        return torch.randn(size, generator=generator).to(to)

    base = torch.nn.Linear(k, n, bias=bias, dtype=dtype)
    base.weight.data.copy_(normal(n, k))
    x, dy = normal(*shape, k).requires_grad_(), normal(*shape, n)
    q = oracle.effective_dropout(p)
    layer = _peft_layer(base, normal(r, k, to=adapter_dtype), normal(n, r, to=adapter_dtype), scale, q)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        expected = layer(x)
        torch.manual_seed(3)
        mask = F.dropout(torch.ones(*shape, k, dtype=adapter_dtype), q).ne(0).view(-1, k) if p else None
    assert mask is None or 0 < int(mask.sum()) < mask.numel()
    lora_a, lora_b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    leaves = [x, base.weight, lora_a, lora_b] + ([base.bias] if bias else [])
    got = oracle.eager(x, base.weight, lora_a, lora_b, scale, base.bias, dropout_mask=mask, dropout_p=p)
    assert got.dtype == dtype
    compare.assert_bitwise_equal("y", got, expected)
    gradients = [torch.autograd.grad(y, leaves, dy) for y in (got, expected)]
    for name, ours, theirs in zip(("x", "weight", "lora_a", "lora_b", "bias"), *gradients, strict=False):
        compare.assert_bitwise_equal(name, ours, theirs)


@pytest.mark.parametrize(
    ("p", "expected"),
    [
        (0.0, 0),
        (2**-18, 0),
        (2**-17, 1),
        (0.1, 6554),
        (0.5, 32768),
        (1 - 2**-17, 65535),
        (1 - 2**-53, 65535),
    ],
)
def test_effective_dropout_is_the_nearest_sixteen_bit_fraction(p: float, expected: int) -> None:
    assert oracle.effective_dropout(p) == expected / 65536


@pytest.mark.parametrize("p", [1.0, -0.1, float("nan")])
def test_impossible_probability_is_refused(p: float) -> None:
    with pytest.raises(ValueError, match=r"in \[0, 1\)"):
        oracle.effective_dropout(p)
    with pytest.raises(ValueError, match=r"in \[0, 1\)"):
        oracle.dropout_mask(0, 1, 1, p)


# (counter, key, output) of Philox4x32 with 7 rounds: the known answers that Random123 publishes (tests/kat_vectors).
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), 0, (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
    ((0xFFFFFFFF,) * 4, 0xFFFFFFFFFFFFFFFF, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        0x299F31D0A4093822,
        (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_gives_the_published_answers(
    counter: tuple[int, int, int, int], key: int, expected: tuple[int, ...]
) -> None:
    assert oracle._philox(counter, key) == expected
    words = _numpy_philox([np.array([word], np.uint64) for word in counter], key)
    assert tuple(int(word[0]) for word in words) == expected


def test_mask_reads_the_published_words() -> None:
    """Seed 0, row 0, columns 0 to 7 are the halves of the first known answer, low half first."""
    halves = [half for word in KNOWN_ANSWERS[0][2] for half in (word & 0xFFFF, word >> 16)]
    for level in sorted({*halves, *(half + 1 for half in halves)}):
        mask = oracle.dropout_mask(0, 1, 8, level / 65536)
        assert mask[0].tolist() == [half >= level for half in halves]


def _numpy_philox(counter: list[np.ndarray], key: int) -> list[np.ndarray]:
    """Philox4x32-7 on arrays of 64-bit words, each below 2^32."""
    low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    keys = [np.uint64(key & 0xFFFFFFFF), np.uint64(key >> 32)]
    c0, c1, c2, c3 = counter
    for round_index in range(7):
        bump = [np.uint64(round_index * weyl & 0xFFFFFFFF) for weyl in (0x9E3779B9, 0xBB67AE85)]
        k0, k1 = ((word + step) & low for word, step in zip(keys, bump, strict=True))
        p0, p1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (p1 >> shift) ^ c1 ^ k0, p1 & low, (p0 >> shift) ^ c3 ^ k1, p0 & low
    return [c0, c1, c2, c3]


def _numpy_halves(seed: int, rows: np.ndarray, cols: int) -> np.ndarray:
    """The 16-bit draw of every element, (rows, cols) int64."""
    row, group = (axis.astype(np.uint64) for axis in np.meshgrid(rows, np.arange(-(-cols // 8)), indexing="ij"))
    zeros = np.zeros_like(row)
    words = _numpy_philox([group, row & np.uint64(0xFFFFFFFF), row >> np.uint64(32), zeros], seed % 2**64)
    halves = [half for word in words for half in (word & np.uint64(0xFFFF), word >> np.uint64(16))]
    return np.stack(halves, axis=-1).reshape(len(rows), 8 * group.shape[1])[:, :cols].astype(np.int64)


SEEDS = [0, 1, 20240229, 2**32, 2**63 - 1, -1, -(2**63), -987654321]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (5, 8), (9, 13), (3, 100), (0, 4), (4, 0)])
def test_three_recipes_agree(seed: int, rows: int, cols: int) -> None:
    for p in (0.0, 2**-16, 0.1, 0.5, 1 - 2**-16):
        mask = oracle.dropout_mask(seed, rows, cols, p)
        level = int(oracle.effective_dropout(p) * 65536)
        assert torch.equal(mask, torch.from_numpy(_numpy_halves(seed, np.arange(rows), cols) >= level))
        assert torch.equal(mask, pk.lora_linear_dropout_mask(seed, rows, cols, p))
        assert torch.equal(mask, pk.lora_linear_dropout_mask(torch.tensor(seed), rows, cols, p))


def test_negative_seed_is_its_bit_pattern() -> None:
    assert torch.equal(oracle.dropout_mask(-1, 4, 9, 0.5), oracle.dropout_mask(2**64 - 1, 4, 9, 0.5))


def test_smaller_mask_is_a_corner_of_a_larger_one() -> None:
    large = oracle.dropout_mask(7, 12, 40, 0.5)
    assert torch.equal(oracle.dropout_mask(7, 5, 13, 0.5), large[:5, :13])


def test_masks_of_seeds_rows_and_columns_differ() -> None:
    masks = torch.stack([oracle.dropout_mask(seed, 32, 64, 0.5) for seed in SEEDS])
    for a, b in itertools.combinations(masks.flatten(1), 2):
        assert 0.4 < (a == b).double().mean() < 0.6
    assert len({tuple(row.tolist()) for mask in masks for row in mask}) == len(SEEDS) * 32
    assert len({tuple(column.tolist()) for mask in masks for column in mask.t()}) == len(SEEDS) * 64


@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.9])
def test_rate_of_each_of_the_eight_halves(p: float) -> None:
    """Within five standard deviations of the effective probability, over each half of the words and over all."""
    rows, cols = 1024, 2048
    keep = torch.from_numpy(_numpy_halves(11, np.arange(rows), cols)) >= int(oracle.effective_dropout(p) * 65536)
    assert torch.equal(keep[:3], oracle.dropout_mask(11, 3, cols, p))
    q = oracle.effective_dropout(p)
    for part in (keep, *(keep[:, half::8] for half in range(8))):
        deviation = (q * (1 - q) / part.numel()) ** 0.5
        assert abs(float((~part).double().mean()) - q) < 5 * deviation


def test_neighbours_are_uncorrelated() -> None:
    keep = torch.from_numpy(_numpy_halves(3, np.arange(1024), 2048) >= 32768).double() * 2 - 1
    for a, b in ((keep[1:], keep[:-1]), *((keep[:, lag:], keep[:, :-lag]) for lag in (1, 2, 4, 7, 8, 16))):
        assert abs(float((a * b).mean())) < 5 / a.numel() ** 0.5


@pytest.mark.parametrize("p", [0.1, 0.25, 0.7])
def test_dropout_is_unbiased(p: float) -> None:
    """The mean of drop(x) over many masks is x: the factor belongs to the effective probability."""
    rows, cols, q = 4096, 64, oracle.effective_dropout(p)
    mask = torch.from_numpy(_numpy_halves(17, np.arange(rows), cols) >= int(q * 65536))
    x = torch.linspace(-2, 2, cols, dtype=torch.float64)
    eye = torch.eye(cols, dtype=torch.float64)
    _, dropped = oracle.forward(x.expand(rows, cols), eye, eye, eye, dropout_mask=mask, dropout_p=p)
    deviation = x.abs() * (q / (1 - q) / rows) ** 0.5
    assert ((dropped.mean(0) - x).abs() <= 5 * deviation + 1e-12).all()
    variance = dropped.var(0, correction=0)
    torch.testing.assert_close(variance, x.square() * q / (1 - q), rtol=0.2, atol=1e-12)
