"""The Hopper GEMM's device body in the emulator: its program, and how to run a problem on it."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.lora_linear.cases import Case, Tensors
from tests.simt import build

PROGRAM = r"""
#include "lora_linear/gemm_sm90_arguments.h"

using namespace peft_kernels;
using namespace peft_kernels::lora_linear;

// The flags are poisoned once and then keep what the schedule before has left; each schedule has a nonce of its own.
template <typename Config>
void test(const simt::Arguments& arguments) {
  simt::Buffer x = arguments.input("x"), w = arguments.input("w"), down = arguments.input("down");
  simt::Buffer up = arguments.input("up"), bias = arguments.input("bias"), scale = arguments.input("scale");
  GemmParams params = {};
  params.m = arguments.integer("m");
  params.n = arguments.integer("n");
  params.k = arguments.integer("k");
  params.r = arguments.integer("r");
  const auto rows = static_cast<size_t>(params.m);
  simt::Buffer y("y", 2 * rows * static_cast<size_t>(params.n)), s("s", 4 * rows * static_cast<size_t>(params.r));
  simt::Buffer flags("flags", 8 * static_cast<size_t>(gemm_flags(params.m)));
  simt::Buffer s_half("s_half", 2 * rows * static_cast<size_t>(Config::kRank));
  flags.poison();

  params.x = x.data();
  params.w = w.data();
  params.down = down.data();
  params.up = up.data();
  params.bias = bias.data();
  params.scale = scale.data<const float>();
  params.y = y.data();
  params.s = s.data<float>();
  params.flags = flags.data<uint64_t>();
  params.s_half = s_half.data();
  params.x_stride = arguments.integer("x_stride");
  params.w_stride = arguments.integer("w_stride");
  params.down_stride = arguments.integer("down_stride");
  params.up_stride = arguments.integer("up_stride");
  params.y_stride = params.n;
  params.scale_value = static_cast<float>(arguments.number("scale_value"));
  params.dtype = Config::kType == HalfType::kBf16 ? Dtype::kBfloat16 : Dtype::kFloat16;
  params.backward = Config::kTransposed;
  check_gemm_params(params);

  simt::run_schedules(arguments, {&x, &w, &down, &up, &bias, &scale}, {&y, &s}, [&](uint64_t seed) {
    params.nonce = 0x9E3779B97F4A7C15u + seed;
    s_half.poison();
    const GemmArguments device = gemm_arguments<Config>(params);

    simt::Config config;
    config.grid = {static_cast<unsigned>(std::min(arguments.integer("grid"), device.order.count()))};
    config.block = {Config::kThreads};
    config.shared_bytes = sizeof(GemmShared<Config>);
    config.seed = seed;
    simt::launch(config, [&] { gemm<Config>(device, *static_cast<GemmShared<Config>*>(simt::shared_memory())); });
    flags.check();
    s_half.check();
  });
}

int main(int argc, char** argv) {
  return simt::main_of(argc, argv, test<GemmConfig<HalfType::TYPE, RANK, Direction::DIRECTION>>);
}
"""


def padded_rank(r: int) -> int:
    """The rank that a kernel is compiled for."""
    return next(rank for rank in (16, 32, 64, 128) if r <= rank)


def forward(
    case: Case, tensors: Tensors, grid: int, schedules: int = 2, *changes: tuple[str, str]
) -> tuple[Tensor, Tensor]:
    """y (M, N) and S (M, r) float32 by the emulated kernel."""
    x, weight, lora_a, lora_b, bias = tensors
    operands = {"x": x, "w": weight, "down": lora_a, "up": aligned_rows(lora_b)}
    sizes = {"m": case.m, "n": case.n, "k": case.k, "r": case.r}
    return _run(case, "kForward", operands, bias, sizes, grid, schedules)


def backward(case: Case, tensors: Tensors, dy: Tensor, grid: int, schedules: int = 2) -> tuple[Tensor, Tensor]:
    """dX (M, K) and dS (M, r) float32 by the emulated kernel."""
    operands = {"x": dy, "w": tensors.weight, "down": aligned_rows(tensors.lora_b), "up": tensors.lora_a}
    sizes = {"m": case.m, "n": case.k, "k": case.n, "r": case.r}
    return _run(case, "kBackward", operands, None, sizes, grid, schedules)


def aligned_rows(matrix: Tensor) -> Tensor:
    """The matrix in rows of 16-byte multiples; what the padding holds must not matter."""
    rows, cols = matrix.shape
    stride = (cols + 7) // 8 * 8
    padded = torch.full((rows, stride), float("nan"), dtype=matrix.dtype)
    padded[:, :cols] = matrix
    return padded[:, :cols]


def _run(
    case: Case,
    direction: str,
    operands: dict[str, Tensor],
    bias: Tensor | None,
    sizes: dict[str, int],
    grid: int,
    schedules: int,
) -> tuple[Tensor, Tensor]:
    kind = "kBf16" if case.dtype == torch.bfloat16 else "kFp16"
    program = build.build(PROGRAM, f"TYPE={kind}", f"RANK={padded_rank(case.r)}", f"DIRECTION={direction}")
    # Whole rows with their padding go to the program.
    stored = {
        name: matrix.as_strided((matrix.shape[0], matrix.stride(0)), (matrix.stride(0), 1))
        for name, matrix in operands.items()
    }
    got = build.run(
        program,
        {**stored, "bias": bias},
        {"y": ((sizes["m"], sizes["n"]), case.dtype), "s": ((sizes["m"], sizes["r"]), torch.float32)},
        schedules=schedules,
        grid=grid,
        scale_value=case.scale,
        **sizes,
        **{f"{name}_stride": matrix.stride(0) for name, matrix in operands.items()},
    )
    return got["y"], got["s"]
