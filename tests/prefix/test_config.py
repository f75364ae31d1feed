"""The pure functions that choose configs: bounds that hold for every problem."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_kernels._core.device import Hardware
from peft_kernels.prefix import torch_fused
from peft_kernels.prefix.kernels import config
from peft_kernels.prefix.problem import PrefixAttentionProblem
from peft_kernels.prefix.torch_config import (
    LEAST_SCALE,
    PADDING_COLUMNS,
    torch_block,
    torch_config,
    torch_part,
    torch_range_rows,
)

HARDWARE = [
    Hardware(arch=80, sm_count=108),
    Hardware(arch=89, sm_count=142),
    Hardware(arch=90, sm_count=132),
    Hardware(arch=100, sm_count=148),
]


@st.composite
def problems(draw: Any) -> PrefixAttentionProblem:
    h_kv = draw(st.integers(1, 64))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    return PrefixAttentionProblem(
        b=draw(st.integers(1, 64)),
        h=h_kv * draw(st.integers(1, 16)),
        h_kv=h_kv,
        s=draw(st.integers(1, 1 << 16)),
        l=draw(st.integers(0, 1 << 16)),
        p=draw(st.integers(0, 1024)),
        d=draw(st.integers(1, 256)),
        dtype=dtype,
        prefix_dtype=draw(st.sampled_from([dtype, torch.float32])),
        device=torch.device("cpu"),
        causal=draw(st.booleans()),
        scale=1.0,
        shared=draw(st.booleans()),
        padded=draw(st.booleans()),
    )


@given(problems(), st.sampled_from(HARDWARE))
def test_blocks_are_what_products_take(problem: PrefixAttentionProblem, hardware: Hardware) -> None:
    choices = (config.forward_config, config.grad_q_config, config.grad_kv_config, config.grad_prefix_config)
    for chosen in (choose(problem, hardware) for choose in choices):
        assert problem.d <= chosen.BLOCK_D
        for size in (chosen.BLOCK_M, chosen.BLOCK_N, chosen.BLOCK_D, getattr(chosen, "BLOCK_P", 16)):
            assert size >= 16 and size & (size - 1) == 0, "tl.dot needs powers of two, at least 16"
        # A block of rows and two of keys, in each of the stages; accumulators and scores are in registers.
        stages = (chosen.BLOCK_M + 2 * chosen.BLOCK_N * chosen.num_stages) * chosen.BLOCK_D * problem.dtype.itemsize
        assert stages <= 2 * 99 * 1024


@given(problems(), st.sampled_from(HARDWARE))
def test_no_range_of_rows_is_much_too_small(problem: PrefixAttentionProblem, hardware: Hardware) -> None:
    """Splitting stops at one block of rows a program, and where every multiprocessor has a program."""
    chosen = config.grad_prefix_config(problem, hardware)
    owners, batches = (1, problem.b) if problem.shared else (problem.b, 1)
    items = batches * -(-problem.group * problem.s // chosen.BLOCK_M)
    tiles = -(-problem.p // chosen.BLOCK_N) * problem.h_kv * owners
    assert 1 <= chosen.splits <= items
    assert chosen.splits == 1 or chosen.splits * tiles <= hardware.sm_count


@given(problems(), st.sampled_from(HARDWARE))
def test_keys_are_split_where_programs_are_few(problem: PrefixAttentionProblem, hardware: Hardware) -> None:
    """Never into more programs than multiprocessors, nor into ranges of less than four blocks."""
    chosen = config.forward_config(problem, hardware)
    tiles = -(-problem.group * problem.s // chosen.BLOCK_M) * problem.b * problem.h_kv
    assert chosen.splits >= 1
    if chosen.splits > 1:
        assert chosen.splits * tiles <= hardware.sm_count
        assert problem.l >= 4 * chosen.BLOCK_N * chosen.splits
    elif 2 * tiles <= hardware.sm_count:
        assert problem.l < 8 * chosen.BLOCK_N
    merge = config.merge_config(problem.d, chosen.splits)
    assert problem.d <= merge.BLOCK_D and merge.BLOCK_S & (merge.BLOCK_S - 1) == 0
    assert merge.BLOCK_S * merge.BLOCK_D <= 8192 and max(8, 2 * chosen.splits - 1) >= merge.BLOCK_S


@given(
    st.integers(1, 1 << 12), st.integers(1, 128), st.integers(1, 16), st.integers(0, 1 << 20), st.integers(0, 1 << 22)
)
@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_torch_blocks_hold_their_elements(
    device_type: str, batch: int, heads: int, group: int, queries: int, keys: int
) -> None:
    sizes = {"b": batch, "h": heads * group, "h_kv": heads, "s": queries, "l": keys, "p": 0}
    block_batch, block_heads, rows = torch_block(_problem(**sizes, device=torch.device(device_type)))
    assert 1 <= block_batch <= batch
    assert 1 <= block_heads <= heads
    assert 1 <= rows <= max(1, queries)
    assert block_batch == 1 or (block_heads == heads and rows >= queries)
    # At least one query of one group, however long its row is.
    limit = 1 << 18 if device_type == "cpu" else 1 << 26
    assert block_batch * block_heads * rows * group * max(1, keys) <= max(limit, group * max(1, keys))


def test_torch_blocks_take_small_batch_rows_together() -> None:
    """A batch of short texts is one block, not as many as it has texts."""
    assert torch_block(_problem(b=32, h=12, h_kv=12, s=8, l=8, p=8)) == (32, 12, 8)


def _problem(**changes: Any) -> PrefixAttentionProblem:
    problem = PrefixAttentionProblem(
        b=1, h=32, h_kv=8, s=512, l=512, p=64, d=128, dtype=torch.bfloat16, prefix_dtype=torch.bfloat16,
        device=torch.device("cpu"), causal=True, scale=0.1, shared=True, padded=False,
    )  # fmt: skip
    return replace(problem, **changes)


@pytest.mark.parametrize(
    ("changes", "on_cpu", "on_cuda"),
    [
        ({}, ("ranges", "ranges"), ("fused", "fused")),
        ({"dtype": torch.float16}, ("ranges", "ranges"), ("fused", "fused")),
        ({"dtype": torch.float32}, ("ranges", "ranges"), ("blocks", "blocks")),
        ({"dtype": torch.float64}, ("ranges", "ranges"), ("blocks", "blocks")),
        ({"padded": True}, ("ranges", "ranges"), ("fused", "fused")),
        ({"s": 1, "l": 4096}, ("ranges", "ranges"), ("fused", "fused")),
        ({"d": 256}, ("ranges", "ranges"), ("fused", "fused")),
        ({"d": 257}, ("ranges", "ranges"), ("blocks", "blocks")),
        ({"d": 249, "padded": True}, ("ranges", "ranges"), ("blocks", "blocks")),
        ({"s": 513}, ("blocks", "blocks"), ("blocks", "blocks")),
        ({"s": 513, "causal": False}, ("ranges", "ranges"), ("fused", "fused")),
        ({"padded": True, "p": 0}, ("blocks", "blocks"), ("blocks", "blocks")),
        ({"dtype": torch.float32, "d": 16}, ("ranges", "blocks"), ("blocks", "blocks")),
        ({"dtype": torch.float32, "scale": -0.3}, ("ranges", "blocks"), ("blocks", "blocks")),
        ({"scale": 0.0}, ("ranges", "ranges"), ("blocks", "blocks")),
        ({"scale": -1.0}, ("ranges", "ranges"), ("blocks", "blocks")),
        ({"l": 0, "p": 0, "causal": False}, ("blocks", "blocks"), ("blocks", "blocks")),
    ],
    ids=str,
)
def test_torch_takes_its_fused_attention_where_it_can(
    changes: dict[str, Any], on_cpu: tuple[str, str], on_cuda: tuple[str, str]
) -> None:
    for device, expected in (("cpu", on_cpu), ("cuda", on_cuda)):
        chosen = torch_config(_problem(**changes, device=torch.device(device)))
        assert (chosen.forward, chosen.backward) == expected, device


def test_padding_is_beyond_any_score() -> None:
    """With the least scale, a padded key's score in the fused path is far below -104, where float32's exp is zero."""
    assert -(torch_fused._PADDING_FACTOR**2) * PADDING_COLUMNS * LEAST_SCALE < -1e6
    assert torch.finfo(torch.float16).max > torch_fused._PADDING_FACTOR
    assert PADDING_COLUMNS * torch.float16.itemsize % 16 == 0


@given(problems())
def test_torch_s_ranges_have_small_masks(problem: PrefixAttentionProblem) -> None:
    rows = torch_range_rows(problem)
    assert 1 <= rows <= problem.s
    # Without a causal mask a range's mask has one row.
    assert not problem.causal or rows == 1 or rows * (problem.p + problem.l) <= 1 << 20


@given(problems(), st.integers(1, 64))
def test_what_torch_casts_at_a_time_is_small(problem: PrefixAttentionProblem, threads: int) -> None:
    assert torch_part(problem, problem.dtype, threads) == (problem.b, problem.h_kv)
    batch, heads = torch_part(replace(problem, dtype=torch.float16), torch.float32, threads)
    assert 1 <= batch <= problem.b and 1 <= heads <= problem.h_kv
    assert batch == 1 or heads == problem.h_kv
    each = 2 * (problem.group * problem.s + problem.p + problem.l) * problem.d
    assert batch * heads <= threads or batch * heads * each <= threads << 21


def test_decoding_fills_the_device() -> None:
    """8 key heads of one batch row on 132 multiprocessors: 16 ranges of 256 keys; 16 batch rows need none."""
    hopper = Hardware(arch=90, sm_count=132)
    assert config.forward_config(_problem(s=1, l=4096), hopper).splits == 16
    assert config.forward_config(_problem(b=16, s=1, l=4096), hopper).splits == 1
    assert config.forward_config(_problem(s=1, l=500), hopper).splits == 1
    assert config.forward_config(_problem(s=2048, l=2048), hopper).splits == 1


@pytest.mark.parametrize("arch", [80, 89, 90, 100])
def test_decoding_takes_a_small_block(arch: int) -> None:
    problem = _problem(s=1, l=4096)
    assert config.forward_config(problem, Hardware(arch=arch, sm_count=100)).BLOCK_M == 16
