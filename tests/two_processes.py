"""Two gloo processes with half a batch each must get the gradients that one process gets with all of it."""

from __future__ import annotations

import copy
import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

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
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = mp.get_context("spawn")
    arguments = (training, how, port, str(folder))
    processes = [context.Process(target=_worker, args=(rank, *arguments)) for rank in range(WORLD)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
        if process.is_alive():
            process.kill()
    errors = "\n".join(path.read_text() for path in sorted(folder.glob("*.error")))
    assert [process.exitcode for process in processes] == [0] * WORLD, errors
    assert [Path(folder, f"{rank}.ok").read_text() for rank in range(WORLD)] == [str(parameters)] * WORLD


def _worker(rank: int, training: Training, how: str, port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    try:
        whole, batch = training.model(), training.batch()
        model = _wrapped(copy.deepcopy(whole), training, how)
        got = _gradients(model, batch.chunk(WORLD)[rank])
        expected = _gradients(whole, batch)
        for name, gradient in expected.items():
            full = _full(got[name if how == "fsdp2" else f"module.{name}"])
            assert gradient.any(), name
            torch.testing.assert_close(full, gradient)
        Path(folder, f"{rank}.ok").write_text(str(len(expected)))
    except BaseException:
        Path(folder, f"{rank}.error").write_text(traceback.format_exc())
        raise
    finally:
        dist.destroy_process_group()


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
