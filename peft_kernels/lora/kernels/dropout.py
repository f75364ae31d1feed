"""Which elements of x the low-rank branch drops: one recipe, the same bits on torch, Triton and CUDA.

Philox4x32 with 7 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11), key = the 64-bit seed,
counter = (column // 8, row low, row high, lane). One call decides on 8 columns: column c takes the 16-bit half c % 8 of
the four output words, low half first, and is kept when that half is at least ``threshold``.

A lane is a part of a call's low-rank updates that has a mask of its own. Its number, a 32-bit unsigned word, is all
that tells its mask from the other lanes' under the call's one seed; a single layer is lane 0.

Ten rounds are the usual margin. Seven are enough for the statistical tests of BigCrush (its authors' library Random123
documents so), which ask for more than independent decisions do, and the rounds are what dropout costs a kernel.

torch has no unsigned 32-bit product, so the words live in int64 tensors. A 32 x 32 bit product fits in 64 bits, and
int64 products wrap modulo 2^64, so the bits are right although their sign is not.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

ROUNDS = 7
DECISIONS_PER_CALL = 8
LEVELS = 1 << 16  # a decision is a 16-bit draw

_MULTIPLIER_0 = 0xD2511F53
_MULTIPLIER_1 = 0xCD9E8D57
_WEYL_0 = 0x9E3779B9
_WEYL_1 = 0xBB67AE85
_LOW = 0xFFFFFFFF
_INTEGER_OF_SIZE = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class Dropout(NamedTuple):
    """Seed (0-d int64; None: nothing is dropped), what ``threshold`` and ``keep_scale`` return, and the mask's lane."""

    seed: Tensor | None
    threshold: int
    keep_scale: float
    lane: int = 0


class Lanes(NamedTuple):
    """Lanes whose columns of S stand side by side in this order: how many each has, and its number."""

    ranks: tuple[int, ...]
    numbers: tuple[int, ...]


NO_DROPOUT = Dropout(seed=None, threshold=0, keep_scale=1.0)


class Rows(NamedTuple):
    """Which part of a mask: ``rows`` rows from ``first_row`` on, all ``cols`` columns; ``limit`` as ``threshold`` gives
    it, ``seed`` 0-d int64, ``lane`` as ``as_lane`` returns it.
    """

    seed: Tensor
    first_row: int
    rows: int
    cols: int
    limit: int
    lane: int = 0


def threshold(p: float, operator: str = "lora_linear") -> int:
    """Quantise a dropout probability to 1/65536; below 1 something is always kept. ``operator`` is for the message.

    Raises:
        ValueError: p is not in [0, 1).
    """
    if not 0.0 <= p < 1.0:
        raise ValueError(f"{operator}: dropout_p must be in [0, 1), got {p}")
    return min(int(p * LEVELS + 0.5), LEVELS - 1)


def keep_scale(limit: int) -> float:
    """One over the exact probability that an element is kept."""
    return LEVELS / (LEVELS - limit)


def draw_seed(device: torch.device) -> Tensor:
    """Draw a seed from torch's generator of the device, so that checkpointing and CUDA graphs replay it."""
    return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=device)


def as_seed(seed: int | Tensor, device: torch.device, operator: str = "lora_linear") -> Tensor:
    """Turn the public argument into a 0-d int64 tensor; an int is written by a fill, which a CUDA graph can capture.

    Raises:
        ValueError: seed is neither an int that fits int64 nor a tensor.
    """
    if isinstance(seed, Tensor):
        return seed
    if isinstance(seed, bool) or not isinstance(seed, int) or not -(2**63) <= seed < 2**63:
        raise ValueError(f"{operator}: seed must be None, a 64-bit int or a 0-d int64 tensor, got {seed!r}")
    return torch.full((), seed, dtype=torch.int64, device=device)


def as_lane(lane: int, operator: str = "lora_linear_dropout_mask") -> int:
    """Check a lane, and return it.

    Raises:
        ValueError: lane is no int in 0 ... 2^32 - 1.
    """
    if isinstance(lane, bool) or not isinstance(lane, (int, torch.SymInt)) or not 0 <= lane <= _LOW:
        raise ValueError(f"{operator}: lane must be an int in 0 ... 2^32 - 1, got {lane!r}")
    return lane


def require_lane_0(dropout: Dropout) -> None:
    """Guard a kernel that has no parameter for the lane.

    Raises:
        ValueError: the dropout is another lane's.
    """
    if dropout.lane != 0:
        raise ValueError(f"lora_linear: this kernel draws the mask of lane 0 alone, got lane {dropout.lane}")


def keep_bits(seed: Tensor, first_row: int, rows: int, cols: int, limit: int, lane: int = 0) -> Tensor:
    """Compute the keep-mask of some rows, as integers whose bits are all set where the element is kept.

    Args:
        seed: 0-d int64 tensor; the mask is made on its device.
        first_row: index of the first row in the whole (M, K) matrix.
        rows, cols: size of the mask.
        limit: as ``threshold`` returns it.
        lane: 32-bit unsigned number of the mask among those of the seed.

    Returns:
        (rows, cols) int32 tensor, -1 where the element is kept, else 0.
    """
    device = seed.device
    groups = (cols + DECISIONS_PER_CALL - 1) // DECISIONS_PER_CALL
    row = torch.arange(first_row, first_row + rows, dtype=torch.int64, device=device).unsqueeze(1)
    col = torch.arange(groups, dtype=torch.int64, device=device).unsqueeze(0)
    words = torch.stack([word.to(torch.int32) for word in _philox(seed, col, row & _LOW, row >> 32, lane)], dim=-1)
    # Little-endian, so the low half comes first. Flipping the top bit maps a half h from 0 ... 65535 to h - 32768 of
    # signed 16 bits. It is kept, h >= limit, when limit - 1 - h is negative; the shift spreads the sign to all bits.
    halves = words.view(torch.int16).bitwise_xor_(-(LEVELS // 2)).view(rows, groups * DECISIONS_PER_CALL)
    return halves.to(torch.int32).neg_().add_(limit - 1 - LEVELS // 2).bitwise_right_shift_(31)[:, :cols]


def keep_mask(seed: Tensor, rows: int, cols: int, limit: int | Tensor, lane: int = 0) -> Tensor:
    """The same mask as bool, of a whole matrix, with nothing written in place: for vmap and dispatch modes.

    ``limit`` may be (rows, 1), one for each row.
    """
    row = torch.arange(rows, dtype=torch.int64, device=seed.device)[:, None]
    col = torch.arange(-(-cols // DECISIONS_PER_CALL), dtype=torch.int64, device=seed.device)
    words = _philox(seed, col, row & _LOW, row >> 32, lane, in_place=False)
    halves = torch.stack([half for word in words for half in (word & (LEVELS - 1), word >> 16)], dim=-1)
    return halves.flatten(1)[:, :cols] >= limit


def drop_(x: Tensor, bits: Tensor) -> Tensor:
    """``drop``, in place."""
    integer = _INTEGER_OF_SIZE[x.element_size()]
    x.view(integer).bitwise_and_(bits.to(integer))
    return x


def drop(x: Tensor, bits: Tensor) -> Tensor:
    """Select the elements of a floating tensor that ``keep_bits`` keeps: a dropped inf or nan is zero like any other.

    On a CPU this takes an eighth of the time of ``torch.where`` with a bool mask (one core, AVX-512, 2026-11-24).
    """
    integer = _INTEGER_OF_SIZE[x.element_size()]
    return (x.resolve_neg().view(integer) & bits.to(integer)).view(x.dtype)


def _philox(seed: Tensor, c0: Tensor, c1: Tensor, c2: Tensor, lane: int, in_place: bool = True) -> tuple[Tensor, ...]:
    """Run the rounds on counters that broadcast against each other.

    The counters stay unbroadcast: until the words of rows and columns mix in the third round, each product is made on
    a row or a column alone.
    """
    key_0, key_1 = seed & _LOW, (seed >> 32) & _LOW
    c3 = torch.full((), lane, dtype=torch.int64, device=seed.device)
    for _ in range(ROUNDS):
        product_0, product_1 = c0 * _MULTIPLIER_0, c2 * _MULTIPLIER_1
        c0, c2 = _mixed(product_1, c1, key_0, in_place), _mixed(product_0, c3, key_1, in_place)
        # Only multiplicands need clean upper halves, so c1 and c3 carry the whole product until the next mask.
        c1, c3 = product_1, product_0
        key_0, key_1 = (key_0 + _WEYL_0) & _LOW, (key_1 + _WEYL_1) & _LOW
    return c0, c1 & _LOW, c2, c3 & _LOW


def _mixed(product: Tensor, carried: Tensor, key: Tensor, in_place: bool) -> Tensor:
    """The product's upper half, mixed with another word and the key; in place from the first full-sized tensor on."""
    if not in_place:
        return ((product >> 32) ^ carried ^ key) & _LOW
    return ((product >> 32) ^ carried).bitwise_xor_(key).bitwise_and_(_LOW)
