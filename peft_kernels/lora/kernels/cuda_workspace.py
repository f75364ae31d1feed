"""Workspaces of CUDA launches whose blocks hand results to each other through flags (csrc/core/flags.cuh).

A flag is published when it equals the launch's nonce, 64 bits that no earlier launch of this process had: a random
start, which no other process's is likely to have, and a counter. Whatever else the memory holds, from an earlier launch
or from somebody else, is not this launch's, so a workspace is plain ``torch.empty``: no memset, no state between
launches, any number of streams.

A CUDA graph replays its launches with the nonces that they were captured with, and would find what the replay before
has published. Under capture the flags are therefore zeroed, by a node of the graph that runs before the launch in every
replay; a nonce is never zero.
"""

from __future__ import annotations

import itertools
import secrets
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from peft_kernels._core import cuda_tools

_FLAG_BYTES = 8


class Workspace(NamedTuple):
    """One launch's workspace.

    Attributes:
        tensor: int64; begins with the flags. The caller keeps it until the launch is queued, as any tensor.
        nonce: what the launch publishes, 1 to 2^64 - 1.
    """

    tensor: Tensor
    nonce: int


def allocate(flags: int, size: int, device: torch.device) -> Workspace:
    """Take a workspace from torch's allocator, for one launch on the current stream.

    Args:
        flags: how many the workspace begins with.
        size: bytes of the whole.
    """
    tensor = torch.empty(-(-size // _FLAG_BYTES), dtype=torch.int64, device=device)
    if cuda_tools.is_capturing(device):
        tensor[:flags].zero_()
    return Workspace(tensor, _next_nonce())


def _next_nonce() -> int:
    # next() of a counter is atomic: threads never draw the same.
    return (_start() + next(_counter)) % 2**64 or _next_nonce()


_counter = itertools.count()


@cache
def _start() -> int:
    return secrets.randbits(64)
