"""Two gloo processes with half a batch each must get the gradients that one process gets with all of it."""

from __future__ import annotations

import os
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing import connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

MARKS = [
    pytest.mark.cpu_only,
    pytest.mark.skipif(
        not (dist.is_available() and dist.is_gloo_available()), reason="torch has no gloo: torch.distributed is missing"
    ),
]
WORLD = 2
HOW = ("ddp", "fsdp2")
Loss = Callable[[nn.Module, int | None], Tensor]
# Two processes that import torch take seconds, and minutes on cores that other work keeps busy; nothing that is right
# fails for that. It is what pytest's timeout of a test leaves for saying which process hung.
SECONDS = 540


def run(work: Callable[..., int], folder: Path, *arguments: Any, seconds: float = SECONDS) -> list[int]:
    """Call ``work(rank, *arguments)`` in WORLD processes that are one gloo group.

    Processes meet at a file of ``folder``: a port that is free when it is picked can be another program's, or the
    other end of a process's own connection, by the time that the group listens on it.

    Raises:
        AssertionError: a process failed, which ends the others, or did not end in time; with every traceback there is.
    """
    context = mp.get_context("spawn")
    processes = [context.Process(target=_process, args=(rank, work, folder, arguments)) for rank in range(WORLD)]
    for process in processes:
        process.start()
    try:
        in_time = _wait(processes, seconds)
    finally:
        for process in processes:
            process.kill()
            process.join()
    codes = [process.exitcode for process in processes]
    errors = "\n".join(path.read_text() for path in sorted(folder.glob("*.error")))
    assert in_time, f"still running after {seconds} s: exit codes {codes} {errors}"
    assert codes == [0] * WORLD, f"exit codes {codes} {errors}"
    return [int(Path(folder, f"{rank}.ok").read_text()) for rank in range(WORLD)]


def _wait(processes: list[mp.Process], seconds: float) -> bool:
    """Until all have ended or one has failed, whose group the others would wait for; False when the time is over."""
    deadline = time.monotonic() + seconds
    while (running := [p.sentinel for p in processes if p.exitcode is None]) and not any(p.exitcode for p in processes):
        if not connection.wait(running, timeout=max(0, deadline - time.monotonic())):
            return False
    return True


def _process(rank: int, work: Callable[..., int], folder: Path, arguments: tuple[Any, ...]) -> None:
    # Gloo would look up the host's name, and listen on whatever interface has its address.
    os.environ["GLOO_SOCKET_IFNAME"] = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), WORLD), rank=rank, world_size=WORLD)
        found = work(rank, *arguments)
        # Who ends a group that the other one still works in may bring it down.
        dist.barrier()
        Path(folder, f"{rank}.ok").write_text(str(found))
    except BaseException:
        # Before the group ends, which fails the other process: the cause is written first.
        Path(folder, f"{rank}.error").write_text(f"process {rank}: {traceback.format_exc()}")
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def compare(
    rank: int, how: str, name: str, model: nn.Module, whole: nn.Module, layers: list[nn.Module], loss: Loss
) -> int:
    """Compare gradients of a model under "ddp" or "fsdp2", which sees a share of the batch, and of a whole one.

    Args:
        layers: of the model; FSDP2 shards each of them and then the model.
        loss: model, share of the batch -> a loss that is the mean of what two shares give.

    Returns:
        How many gradients there were.
    """
    got = _gradients(_wrapped(model, layers, how), loss, rank)
    expected = _gradients(whole, loss, None)
    for key, gradient in expected.items():
        assert gradient.any(), (how, name, key)
        full = _full(got[key if how == "fsdp2" else f"module.{key}"])
        # The same float32 sums in another order.
        try:
            torch.testing.assert_close(full, gradient, rtol=1e-4, atol=1e-6)
        except AssertionError as error:
            raise AssertionError(f"{how} {name} {key}") from error
    return len(expected)


def share(batch: Tensor, rank: int | None) -> Tensor:
    """A process's part of a batch, or all of it."""
    return batch if rank is None else batch.chunk(WORLD)[rank]


def _wrapped(model: nn.Module, layers: list[nn.Module], how: str) -> nn.Module:
    if how == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    from torch.distributed.fsdp import fully_shard

    for layer in layers:
        fully_shard(layer)
    return fully_shard(model)


def _gradients(model: nn.Module, loss: Loss, rank: int | None) -> dict[str, Tensor]:
    loss(model, rank).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def _full(tensor: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
