"""Products on a CPU that give a row the same bits whatever other rows there are.

BLAS adds up a row's products in an order that it may choose by the number of rows, by a row's place among them, by the
alignment of memory and by the number of threads, and promises nothing. So rows are multiplied in blocks of a few fixed
numbers of rows, at addresses of one alignment, and what is missing in the last block is zero. Which numbers give every
row of a block the same bits, and the same as the others do, each machine is asked once for each shape of the second
factor: by products of which nothing but rounding errors is left, so that another order of the sums shows. Where no
number does, each row is a product by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache, partial

import torch
from torch import Tensor

from peft_kernels._core.errors import UnsupportedError
from peft_kernels._core.torch_products import is_slow, product_in_float32

SIZES = (384, 192, 96, 48, 16)
"""Rows of a block: multiples of what microkernels take at a time, which is 4, 6, 8, 12, 16, 24 or 48 rows."""

# The bits of a row are those that it has in a block of this size, or of the next one here if its rows disagree there.
_MODELS = (96, 192, 384, 48, 16)
_ALIGNMENT = 64  # bytes, a cache line and the widest vector
NOT_ON_A_CPU = "what torch runs elsewhere than on a CPU promises no order of a row's sums"

_ENOUGH_VALUES = 64  # of a result that is nothing but rounding errors, to tell two orders of sums from each other


def row_product(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """left right + bias, whose rows depend on no other row of ``left``.

    Args:
        left: (M, K), any strides. right: (K, N), any strides. bias: (N,) or None. All of one dtype, on a CPU.

    Raises:
        UnsupportedError: they are elsewhere.
    """
    if is_slow(left.dtype, left.device.type):
        return product_in_float32(left, right, bias, row_product)
    if 1 not in right.stride():
        right = right.contiguous()
    out = torch.empty(left.shape[0], right.shape[1], dtype=left.dtype, device=left.device)
    if out.numel() == 0 or left.shape[1] == 0:
        return out.zero_() if bias is None else out.copy_(bias)
    if out.device.type != "cpu":
        raise UnsupportedError(f"{NOT_ON_A_CPU}; these tensors are on {out.device}")
    sizes = block_sizes(
        *right.shape,
        right.stride(),
        right.data_ptr() % _ALIGNMENT,
        right.dtype,
        bias is not None,
        torch.get_num_threads(),
    )
    start = 0
    for size in _blocks(left.shape[0], sizes):
        rows = slice(start, start + size)
        _multiply(left[rows], right, bias, size, out[rows])
        start += size
    return out


def aligned(factor: Tensor) -> Tensor:
    """A matrix with contiguous rows that begins at a whole cache line: itself, or a copy.

    A factor that stands among others is then read as it would be alone.
    """
    if factor.stride() == (factor.shape[1], 1) and factor.data_ptr() % _ALIGNMENT == 0:
        return factor
    return torch.empty(factor.shape, dtype=factor.dtype, device=factor.device).copy_(factor)


def _blocks(rows: int, sizes: tuple[int, ...]) -> Iterator[int]:
    """Sizes of blocks that hold some rows, the last of them perhaps in part."""
    while rows > 0:
        size = next((size for size in sizes if size <= rows), sizes[-1])
        yield size
        rows -= size


def _multiply(left: Tensor, right: Tensor, bias: Tensor | None, size: int, out: Tensor) -> None:
    """out = left right + bias by a product of ``size`` rows, of which ``left`` has as many or fewer."""
    given = left if _is_laid_out(left, size) else _zeros(left, size)
    if given is not left:
        given[: left.shape[0]] = left
    made = out if _is_laid_out(out, size) else _zeros(out, size)
    if bias is None:
        torch.mm(given, right, out=made)
    else:
        torch.addmm(bias, given, right, out=made)
    if made is not out:
        out.copy_(made[: out.shape[0]])


def _is_laid_out(block: Tensor, size: int) -> bool:
    """Whether a block has all of its rows, and lies in memory as ``_zeros`` makes one."""
    rows, width = block.shape
    return (
        rows == size
        and block.stride() == (width, 1)
        and width * block.element_size() % _ALIGNMENT == 0
        and block.data_ptr() % _ALIGNMENT == 0
    )


def _zeros(like: Tensor, size: int) -> Tensor:
    """A block each of whose rows is whole cache lines.

    Zeros are behind a row's columns too: oneDNN's product of bfloat16 on AMX multiplies what stands there by zero.
    """
    width, step = like.shape[1], _ALIGNMENT // like.element_size()
    return torch.zeros(size, -(-width // step) * step, dtype=like.dtype, device=like.device)[:, :width]


@lru_cache(maxsize=1024)
def block_sizes(
    k: int, n: int, strides: tuple[int, int], offset: int, dtype: torch.dtype, has_bias: bool, threads: int
) -> tuple[int, ...]:
    """Sizes of blocks, the largest first, in each of which each row has the same bits; (1,) where there are none.

    Args:
        k, n, strides, offset, dtype: of the second factor, whose address is ``offset`` bytes behind a cache line's.
        has_bias: whether there is a bias.
        threads: that torch has, which decide how it shares out a product.
    """
    agreeing = dict.fromkeys(SIZES, True)
    model: int | None = None
    generator = torch.Generator().manual_seed(k * n)
    for _ in range(-(-_ENOUGH_VALUES // n)):
        x, right, bias = _cancelling(k, n, strides, offset, dtype, has_bias, generator)
        found = {size: torch.empty(size, n, dtype=dtype) for size in SIZES if agreeing[size]}
        for size, y in found.items():
            _multiply(x.expand(size, k), right, bias, size, y)
            agreeing[size] = bool((y == y[0]).all())
        if model is None or not agreeing[model]:
            model = next((size for size in _MODELS if agreeing[size]), None)
        if model is None:
            return (1,)
        for size, y in found.items():
            agreeing[size] = agreeing[size] and torch.equal(y[0], found[model][0])
    return tuple(size for size in SIZES if agreeing[size])


def _cancelling(
    k: int,
    n: int,
    strides: tuple[int, int],
    offset: int,
    dtype: torch.dtype,
    has_bias: bool,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """A row and a second factor whose products cancel in pairs at random places, and a bias like what is left."""
    normal = partial(torch.randn, generator=generator)
    half, columns = k // 2, min(n, 64)
    places = torch.randperm(k, generator=generator)
    x, few = torch.zeros(k), torch.zeros(k, columns)
    # Of many sizes, so that no sum is exact.
    x_sizes, sizes = (2.0 ** torch.randint(-4, 5, (half,), generator=generator) for _ in range(2))
    x[places[:half]] = x[places[half : 2 * half]] = normal(half) * x_sizes
    few[places[:half]] = normal(half, columns) * sizes.unsqueeze(1)
    few[places[half : 2 * half]] = -few[places[:half]]
    # The last one of an odd number has no partner: small enough to leave the errors of the others to be seen.
    x[places[2 * half :]], few[places[2 * half :]] = 2.0**-6, normal(k - 2 * half, columns) * 2.0**-6
    extent = 1 + (k - 1) * strides[0] + (n - 1) * strides[1]
    memory = torch.empty(extent + _ALIGNMENT // few.to(dtype).element_size(), dtype=dtype)
    right = memory[offset // memory.element_size() :].as_strided((k, n), strides)
    for start in range(0, n, columns):
        right[:, start : start + columns] = few[:, : min(columns, n - start)]
    return x.to(dtype), right, (normal(n) * 2.0**-20).to(dtype) if has_bias else None
