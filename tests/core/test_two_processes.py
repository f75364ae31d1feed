"""What a failure of tests that run two processes says, and how soon."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist

from tests import two_processes

pytestmark = two_processes.MARKS


def _sum(rank: int, addend: int) -> int:
    gathered = [None] * two_processes.WORLD
    dist.all_gather_object(gathered, rank + addend)
    return sum(gathered)


def _one_fails(rank: int) -> int:
    if rank == 1:
        raise ValueError("the cause")
    return _sum(rank, 0)


@pytest.mark.thorough
def test_a_failure_ends_the_other_process_and_shows_its_traceback(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"(?s)process 1: .*ValueError: the cause"):
        two_processes.run(_one_fails, tmp_path)


def test_a_process_that_does_not_end_is_told_from_one_that_fails(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"still running after 0\.1 s: exit codes \[-9, -9\]"):
        two_processes.run(_sum, tmp_path, 3, seconds=0.1)
