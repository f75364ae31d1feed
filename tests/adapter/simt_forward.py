"""The CUDA backend on CPU tensors: its own Python, and in place of the launch the device body in the host's emulator.

The program is csrc/adapter/forward_sm90.cuh as the GPU gets it, compiled by g++ (tests/simt). What stands
between them, the launcher, is compiled but not run.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from peft_kernels._core import cuda_tools, extension
from peft_kernels.adapter import cuda_impl
from peft_kernels.adapter.kernels.config import CudaForwardConfig
from tests.simt import build

PROGRAM = r"""
#include "adapter/forward_sm90.cuh"
#include "core/shared.cuh"
#include "core/sm90/tensor_map.h"

using namespace peft_kernels;
using namespace peft_kernels::adapter;

template <sm90::HalfType kType, int kRank>
void forward(const simt::Arguments& arguments) {
  const int64_t m = arguments.integer("m"), n = arguments.integer("n"), k = arguments.integer("k");
  const int64_t r = arguments.integer("r");
  simt::Buffer x = arguments.input("x"), residual = arguments.input("residual");
  simt::Buffer down_weight = arguments.input("down_weight"), up_weight = arguments.input("up_weight");
  simt::Buffer down_bias = arguments.input("down_bias"), up_bias = arguments.input("up_bias");
  simt::Buffer scale = arguments.input("scale");
  simt::Buffer z("z", static_cast<size_t>(4 * m * r)), y("y", static_cast<size_t>(2 * m * n));

  const auto box = [&](const simt::Buffer& matrix, int64_t rows, int64_t cols, int64_t stride, int box_rows) {
    return sm90::encode(kType, {matrix.data(), rows, cols, stride, static_cast<uint32_t>(box_rows), kBlockC});
  };
  ForwardMaps maps = {};
  maps.x = box(x, m, k, arguments.integer("x_stride"), kBlockM);
  maps.down_weight = box(down_weight, r, k, arguments.integer("down_weight_stride"), kRank);
  maps.up_weight = box(up_weight, n, r, arguments.integer("up_weight_stride"), kBlockC);
  maps.y = box(y, m, n, n, kBlockM);
  const bool serial = arguments.integer("serial") != 0, loads_residual = residual.bytes() > 0;
  if (loads_residual) {
    maps.residual = box(residual, m, n, arguments.integer("residual_stride"), kBlockM);
  }
  const ForwardArguments given{down_bias.data<const uint16_t>(),
                               up_bias.data<const uint16_t>(),
                               scale.data<const float>(),
                               z.data<float>(),
                               static_cast<int>(m),
                               static_cast<int>(n),
                               static_cast<int>(k),
                               static_cast<int>(r),
                               static_cast<float>(arguments.number("scale_value")),
                               serial || loads_residual,
                               loads_residual,
                               value_of<Activation>(arguments.text("activation"), "activation")};

  const int cluster = static_cast<int>(arguments.integer("cluster"));
  simt::Config config;
  config.grid.x = static_cast<unsigned>((m + kBlockM - 1) / kBlockM * cluster);
  config.block.x = kThreads;
  config.cluster.x = static_cast<unsigned>(cluster);
  config.shared_bytes = static_cast<size_t>(ForwardPlan<kRank>::bytes(slots_of(k, n, cluster)));
  config.resident_ctas = static_cast<unsigned>(arguments.integer("resident_clusters") * cluster);
  const std::vector<simt::Buffer*> inputs = {&x, &residual, &down_weight, &up_weight, &down_bias, &up_bias, &scale};
  simt::run_schedules(arguments, inputs, {&z, &y}, [&](uint64_t seed) {
    config.seed = seed;
    simt::launch(config, [&] { forward_cta<kType, kRank>(static_cast<uint8_t*>(shared_memory()), maps, given); });
  });
}

void choose(const simt::Arguments& arguments) {
  const bool wide = arguments.integer("r") > 64;
  if (arguments.text("dtype") == "bfloat16") {
    wide ? forward<sm90::HalfType::kBf16, 128>(arguments) : forward<sm90::HalfType::kBf16, 64>(arguments);
  } else {
    wide ? forward<sm90::HalfType::kFp16, 128>(arguments) : forward<sm90::HalfType::kFp16, 64>(arguments);
  }
}

int main(int argc, char** argv) {
  return simt::main_of(argc, argv, choose);
}
"""


# What the extension says of itself; test_cuda.py compares the two.
LIMITS = SimpleNamespace(MAX_RANK=128, max_columns=lambda r: 8 * 64 * (22 if r <= 64 else 16))


@contextlib.contextmanager
def kernel(
    schedules: int = 2, first_seed: int = 0, cluster: int | None = None, resident_clusters: int = 0
) -> Iterator[None]:
    """Let the CUDA backend accept CPU tensors and launch in the emulator.

    Args:
        schedules: how many each launch runs under; their bits must be the same.
        first_seed: of the schedules. What a schedule favours is drawn with it, so tests should not share a few.
        cluster: instead of the config's choice.
        resident_clusters: how many the machine holds at a time; 0: all.
    """

    def forward(**given: Any) -> None:
        _launch(given, schedules, first_seed, resident_clusters)

    module = SimpleNamespace(**vars(LIMITS), forward=forward)
    with contextlib.ExitStack() as stack:
        for target, name, value in (
            (extension, "load", lambda: SimpleNamespace(adapter=module)),
            (cuda_impl, "_why_not_device", lambda device: None),
            (cuda_tools, "stream_of", lambda device: contextlib.nullcontext(0)),
        ):
            stack.enter_context(mock.patch.object(target, name, value))
        if cluster is not None:
            chosen = CudaForwardConfig(CLUSTER=cluster)
            stack.enter_context(mock.patch.object(cuda_impl, "cuda_forward_config", lambda *_: chosen))
        yield


def _launch(given: dict[str, Any], schedules: int, first_seed: int, resident_clusters: int) -> None:
    """What _C.adapter.forward does, with the same arguments: addresses, row strides, sizes."""
    m, n, k, r = (given[name] for name in "mnkr")
    shapes = {"x": (m, k), "residual": (m, n), "down_weight": (r, k), "up_weight": (n, r)}
    inputs = {name: _memory(*given[name], shape) for name, shape in shapes.items() if given[name]}
    for name, size in (("down_bias", r), ("up_bias", n)):
        if given[name]:
            inputs[name] = _memory(given[name], size, (1, size))
    scale, scale_value = given["scale"]
    if scale:
        inputs["scale"] = _memory(scale, 2, (1, 2))
    numbers = {f"{name}_stride": given[name][1] for name in shapes if given[name]} | {"scale_value": scale_value}
    for name in ("m", "n", "k", "r", "serial", "activation", "dtype", "cluster"):
        numbers[name] = int(given[name]) if isinstance(given[name], bool) else given[name]
    got = build.run(
        build.build(PROGRAM),
        inputs,
        {"z": ((m, r), torch.float32), "y": ((m, n), torch.int16)},
        schedules=schedules,
        first_seed=first_seed,
        resident_clusters=resident_clusters,
        **numbers,
    )
    for name, tensor in got.items():
        ctypes.memmove(given[name], tensor.data_ptr(), tensor.numel() * tensor.element_size())


def _memory(address: int, stride: int, shape: tuple[int, int]) -> Tensor:
    """A copy of the two-byte values from a matrix's first element to its last, whatever lies between its rows."""
    rows, cols = shape
    content = ctypes.string_at(address, 2 * ((rows - 1) * stride + cols))
    return torch.frombuffer(bytearray(content), dtype=torch.int16)
