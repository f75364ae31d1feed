"""Two gloo processes with half a batch each must get the gradients that one process gets with all of it."""

from __future__ import annotations

import copy
import os
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing import connection
from pathlib import Path
from typing import Any, NamedTuple

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
# Two processes that import torch take seconds, and minutes on cores that other work keeps busy; nothing that is right
# fails for that. It is what pytest's timeout of a test leaves for saying which process hung.
SECONDS = 540


class Training(NamedTuple):
    """What is trained: functions at the top of a module, which another process can import.

    Attributes:
        model: makes the model, the same in each call.
        batch: makes a batch; its first dimension is split between the processes.
        layers: of a model; FSDP2 shards each of them and then the model.
    """

    model: Callable[[], nn.Module]
    batch: Callable[[], Tensor]
    layers: Callable[[nn.Module], list[nn.Module]]


def check(training: Training, how: str, folder: Path, parameters: int) -> None:
    """Compare gradients of ``parameters`` parameters under "ddp" or "fsdp2"; a failure has the process's traceback."""
    assert run(_compare, folder, training, how) == [parameters] * WORLD


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
        Path(folder, f"{rank}.ok").write_text(str(work(rank, *arguments)))
    except BaseException:
        # Before the group ends, which fails the other process: the cause is written first.
        Path(folder, f"{rank}.error").write_text(f"process {rank}: {traceback.format_exc()}")
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _compare(rank: int, training: Training, how: str) -> int:
    whole, batch = training.model(), training.batch()
    model = _wrapped(copy.deepcopy(whole), training, how)
    got = _gradients(model, batch.chunk(WORLD)[rank])
    expected = _gradients(whole, batch)
    for name, gradient in expected.items():
        full = _full(got[name if how == "fsdp2" else f"module.{name}"])
        assert gradient.any(), name
        torch.testing.assert_close(full, gradient)
    return len(expected)


def _wrapped(model: nn.Module, training: Training, how: str) -> nn.Module:
    if how == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    from torch.distributed.fsdp import fully_shard

    for layer in training.layers(model):
        fully_shard(layer)
    return fully_shard(model)


def _gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Of the mean over the batch of each row's sum of squares."""
    y = model(x)
    y.square().flatten(1).sum(1).mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def _full(tensor: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
