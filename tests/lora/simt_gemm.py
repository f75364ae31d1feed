"""The Hopper GEMM's device body in the emulator: its program, and how to run a problem on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peft_kernels.lora.kernels import dropout
from peft_kernels.lora.kernels.dropout import NO_DROPOUT, Dropout
from python_ref import compare
from python_ref import lora as oracle
from tests.contract.operators import double
from tests.lora import cases
from tests.lora.cases import Case, Tensors
from tests.simt import build
from tests.simt.faults import MAIN

TEST = r"""
// The flags are poisoned once and then keep what the schedule before has left; each schedule has a nonce of its own.
template <typename Config>
void test(const simt::Arguments& arguments) {
  simt::Buffer x = arguments.input("x"), w = arguments.input("w"), down = arguments.input("down");
  simt::Buffer up = arguments.input("up"), bias = arguments.input("bias"), scale = arguments.input("scale");
  simt::Buffer seed_of_mask = arguments.input("seed");
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
  params.seed = seed_of_mask.data<const int64_t>();
  params.threshold = static_cast<uint32_t>(arguments.integer("threshold"));
  params.keep_scale = static_cast<float>(arguments.number("keep_scale"));
  params.y = y.data();
  params.s = s.data<float>();
  params.flags = flags.data<uint64_t>();
  params.s_half = s_half.data();
  params.x_stride = arguments.integer("x_stride");
  params.w_stride = arguments.integer("w_stride");
  params.down_stride = arguments.integer("down_stride");
  params.up_stride = arguments.integer("up_stride");
  params.scale_value = static_cast<float>(arguments.number("scale_value"));
  params.dtype = Config::kType == HalfType::kBf16 ? Dtype::kBfloat16 : Dtype::kFloat16;
  params.backward = Config::kTransposed;
  check_gemm_params(params);

  simt::run_schedules(arguments, {&x, &w, &down, &up, &bias, &scale, &seed_of_mask}, {&y, &s}, [&](uint64_t seed) {
    params.nonce = 0x9E3779B97F4A7C15u + seed;
    s_half.poison();
    const int cluster = static_cast<int>(arguments.integer("cluster"));
    const GemmArguments device = gemm_arguments<Config>(params, cluster, static_cast<int>(arguments.integer("group")),
                                                        static_cast<int>(arguments.integer("grid")));

    simt::Config config;
    config.grid = {static_cast<unsigned>(cluster * device.clusters)};
    config.cluster = {static_cast<unsigned>(cluster)};
    config.block = {Config::kThreads};
    config.shared_bytes = sizeof(GemmShared<Config>);
    config.seed = seed;
    simt::launch(config, [&] { gemm<Config>(device, *static_cast<GemmShared<Config>*>(simt::shared_memory())); });
    flags.check();
    s_half.check();
  });
}
"""

PROGRAM = (
    r"""
#include "lora/gemm_sm90_arguments.h"

using namespace peft_kernels;
using namespace peft_kernels::lora;
"""
    + TEST
    + "TESTS"
    + MAIN
)

# What a kernel is compiled for: dtype, padded rank, direction, columns of a tile, whether it drops. Not all, for the
# time that compiling takes.
CONFIGS = (
    ("kBf16", 16, "kForward", 256, False),
    ("kBf16", 64, "kForward", 128, False),
    ("kFp16", 32, "kForward", 256, False),
    ("kFp16", 128, "kForward", 128, False),
    ("kBf16", 16, "kBackward", 256, False),
    ("kBf16", 128, "kBackward", 192, False),
    ("kFp16", 32, "kBackward", 128, False),
    ("kFp16", 64, "kBackward", 256, False),
    ("kBf16", 16, "kForward", 256, True),
    ("kBf16", 128, "kForward", 128, True),
    ("kFp16", 32, "kForward", 256, True),
    ("kFp16", 64, "kForward", 192, True),
    ("kBf16", 16, "kBackward", 256, True),
    ("kBf16", 64, "kBackward", 192, True),
    ("kFp16", 32, "kBackward", 256, True),
    ("kFp16", 128, "kBackward", 128, True),
)


def program(text: str = PROGRAM) -> Path:
    """The compiled program, with a test for each of CONFIGS."""
    entries = ", ".join(
        f'{{"{name(kind, rank, direction, drops)}", test<GemmConfig<HalfType::{kind}, {rank}, '
        f"Direction::{direction}, {width}, {str(drops).lower()}>>}}"
        for kind, rank, direction, width, drops in CONFIGS
    )
    tests = f"const std::map<std::string, void (*)(const simt::Arguments&)> tests = {{{entries}}};"
    return build.build(text.replace("TESTS", tests))


def name(kind: str, rank: int, direction: str, drops: bool) -> str:
    return f"{kind}-{rank}-{direction}{'-dropout' * drops}"


def dropout_of(case: Case) -> Dropout:
    """The dropout of cases.SEED."""
    if not case.p:
        return NO_DROPOUT
    limit = dropout.threshold(case.p)
    return Dropout(torch.tensor(cases.SEED), limit, dropout.keep_scale(limit))


def forward(case: Case, tensors: Tensors, grid: int, schedules: int, cluster: int = 0) -> tuple[Tensor, Tensor]:
    """y (M, N) and S (M, r) float32 by the emulated kernel."""
    x, weight, lora_a, lora_b, bias = tensors
    operands = {"x": x, "w": weight, "down": lora_a, "up": lora_b}
    config = name(_kind(case), padded_rank(case.r), "kForward", case.p > 0)
    return run(
        program(), config, operands, bias, case, (case.m, case.n, case.k), grid, schedules, cluster, dropout_of(case)
    )


def backward(
    case: Case, tensors: Tensors, dy: Tensor, grid: int, schedules: int, cluster: int = 0
) -> tuple[Tensor, Tensor]:
    """dX (M, K) and dS (M, r) float32 by the emulated kernel."""
    operands = {"x": dy, "w": tensors.weight, "down": tensors.lora_b, "up": tensors.lora_a}
    config = name(_kind(case), padded_rank(case.r), "kBackward", case.p > 0)
    return run(
        program(), config, operands, None, case, (case.m, case.k, case.n), grid, schedules, cluster, dropout_of(case)
    )


def run(
    compiled: Path,
    config: str,
    operands: dict[str, Tensor],
    bias: Tensor | None,
    case: Case,
    sizes: tuple[int, int, int],
    grid: int,
    schedules: int,
    cluster: int = 0,
    drop: Dropout = NO_DROPOUT,
) -> tuple[Tensor, Tensor]:
    """y and S of one product by at most ``grid`` clusters, by default of two blocks where there are two row blocks;
    what lies between the operands' rows is nan and must not matter."""
    stored = {key: _in_rows_of_8(matrix) for key, matrix in operands.items()}
    m, n, k = sizes
    got = build.run(
        compiled,
        {**stored, "bias": bias, "seed": drop.seed},
        {"y": ((m, n), case.dtype), "s": ((m, case.r), torch.float32)},
        schedules=schedules,
        config=config,
        grid=grid,
        cluster=cluster or (1 if m <= 128 else 2),
        group=2,
        m=m,
        n=n,
        k=k,
        r=case.r,
        scale_value=case.scale,
        threshold=drop.threshold,
        keep_scale=drop.keep_scale,
        **{f"{key}_stride": matrix.shape[1] for key, matrix in stored.items()},
    )
    return got["y"], got["s"]


def check_forward(case: Case, tensors: Tensors, y: Tensor, s: Tensor) -> None:
    *factors, bias = double(tensors)
    masked: Any = {"dropout_mask": cases.keep_mask(case, y.device), "dropout_p": case.p}
    exact = oracle.forward(*factors, case.scale, bias, **masked)
    compare.assert_close(f"{case} y", y, oracle.eager(*tensors[:4], case.scale, tensors.bias, **masked), exact[0])
    in_float32 = (tensor.float() for tensor in tensors[:4])
    compare.assert_close(f"{case} S", s, oracle.forward(*in_float32, case.scale, **masked)[1], exact[1])


def check_backward(case: Case, tensors: Tensors, dy: Tensor, dx: Tensor, ds: Tensor) -> None:
    eager, exact = cases.run_eager(case, tensors, dy), cases.run_oracle(case, tensors, dy)
    compare.assert_close(f"{case} dX", dx, eager.x, exact.x)
    exact_ds = case.scale * (dy.double() @ tensors.lora_b.double())
    compare.assert_close(f"{case} dS", ds, case.scale * (dy.float() @ tensors.lora_b.float()), exact_ds)


def with_an_infinite_row(case: Case) -> Tensors:
    """Factors without signs, so that the row of y is inf and not nan."""
    tensors = cases.make(case, torch.device("cpu"))
    tensors.x[7, 5] = float("inf")
    for factor in (tensors.weight, tensors.lora_a, tensors.lora_b):
        factor.abs_()
    return tensors


def padded_rank(r: int) -> int:
    return next(rank for rank in (16, 32, 64, 128) if r <= rank)


def _kind(case: Case) -> str:
    return "kBf16" if case.dtype == torch.bfloat16 else "kFp16"


def _in_rows_of_8(matrix: Tensor) -> Tensor:
    rows, cols = matrix.shape
    stored = torch.full((rows, (cols + 7) // 8 * 8), float("nan"), dtype=matrix.dtype)
    stored[:, :cols] = matrix
    return stored
