"""FusedLoRALinear under DDP and FSDP2: two processes with half a batch each give the gradients of one with it all."""

from __future__ import annotations

import copy
import os
import socket
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from peft_kernels import FusedLoRALinear

pytestmark = [
    pytest.mark.cpu_only,
    pytest.mark.skipif(
        not (dist.is_available() and dist.is_gloo_available()), reason="torch has no gloo: torch.distributed is missing"
    ),
]

WORLD, ROWS, K, N = 2, 8, 16, 12


def _model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(FusedLoRALinear(K, N, r=3), nn.Tanh(), FusedLoRALinear(N, N, r=4, lora_alpha=4))
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.lora_B["default"].normal_()
    return model


def _batch() -> Tensor:
    return torch.randn(WORLD * ROWS, K, generator=torch.Generator().manual_seed(1))


def _gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model(x).square().sum(-1).mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def _full(tensor: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _wrapped(model: nn.Module, how: str) -> nn.Module:
    if how == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    from torch.distributed.fsdp import fully_shard

    for layer in (model[0], model[2]):
        fully_shard(layer)
    return fully_shard(model)


def _worker(rank: int, how: str, port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    try:
        whole = _model()
        model = _wrapped(copy.deepcopy(whole), how)
        got = _gradients(model, _batch()[rank * ROWS : (rank + 1) * ROWS])
        expected = _gradients(whole, _batch())
        for name, gradient in expected.items():
            full = _full(got[name if how == "fsdp2" else f"module.{name}"])
            torch.testing.assert_close(full, gradient)
        Path(folder, f"{rank}.ok").write_text(str(len(expected)))
    except BaseException:
        Path(folder, f"{rank}.error").write_text(traceback.format_exc())
        raise
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_two_processes(how: str, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = mp.get_context("spawn")
    processes = [context.Process(target=_worker, args=(rank, how, port, str(tmp_path))) for rank in range(WORLD)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
        if process.is_alive():
            process.kill()
    errors = "\n".join(path.read_text() for path in sorted(tmp_path.glob("*.error")))
    assert [process.exitcode for process in processes] == [0] * WORLD, errors
    assert [Path(tmp_path, f"{rank}.ok").read_text() for rank in range(WORLD)] == ["4"] * WORLD
