"""What a launcher needs to know of the device that it launches on; the only place that queries one."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch


@dataclass(frozen=True)
class Hardware:
    """Facts that configs are chosen from.

    Attributes:
        arch: compute capability as one number: 80, 89, 90, 100.
        sm_count: streaming multiprocessors, the size of a persistent grid.
    """

    arch: int
    sm_count: int


# Triton's interpreter runs on CPU tensors. It gets the configs of sm_90, because these are the ones with most code in
# them, and a grid that is smaller than any test's tile count, so that persistent loops are walked more than once.
INTERPRETER = Hardware(arch=90, sm_count=3)


def hardware(device: torch.device) -> Hardware:
    """Look up a device once; CPU tensors get the interpreter's description."""
    if device.type != "cuda":
        return INTERPRETER
    return _cuda_hardware(torch.cuda.current_device() if device.index is None else device.index)


def not_nvidia() -> str:
    """Reason why no kernel runs where torch is built for AMD's GPUs, whose devices it calls CUDA too."""
    return f"the kernels are for NVIDIA GPUs, and torch is built for AMD's (ROCm {torch.version.hip})"


@cache
def _cuda_hardware(index: int) -> Hardware:
    properties = torch.cuda.get_device_properties(index)
    return Hardware(
        arch=properties.major * 10 + properties.minor,
        sm_count=properties.multi_processor_count,
    )
