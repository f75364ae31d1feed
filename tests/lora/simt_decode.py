"""The decode kernel's device body in the emulator: its program, and how to run a problem on it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from peft_kernels._core import cuda_tools
from tests.lora.cases import Case, Tensors
from tests.simt import build

TEST = r"""
// The workspace is poisoned once: flags keep what the schedule before has left, and each has a nonce of its own.
template <typename T, typename TAdapter>
void test(const simt::Arguments& arguments) {
  decode::Shape shape = {};
  simt::Take take = {arguments, {}};
  fields(take, shape);
  simt::Buffer x = arguments.input("x"), weight = arguments.input("weight"), lora_a = arguments.input("lora_a");
  simt::Buffer lora_b = arguments.input("lora_b"), bias = arguments.input("bias"), scale = arguments.input("scale");
  simt::Buffer y("y", sizeof(T) * static_cast<size_t>(shape.m) * static_cast<size_t>(shape.n));
  simt::Buffer s("s", sizeof(float) * static_cast<size_t>(shape.m) * static_cast<size_t>(shape.r));
  simt::Buffer workspace("workspace", static_cast<size_t>(decode::workspace_bytes(shape)));
  workspace.poison();
  take.memory = {{"x", x.data()},           {"weight", weight.data()}, {"lora_a", lora_a.data()},
                 {"lora_b", lora_b.data()}, {"bias", bias.data()},     {"scale", scale.data()},
                 {"y", y.data()},           {"s", s.data()},           {"workspace", workspace.data()}};

  simt::run_schedules(
      arguments, {&x, &weight, &lora_a, &lora_b, &bias, &scale}, {&y, &s}, [&](uint64_t seed) {
        DecodeParams params = {};
        fields(take, params);
        params.partials = reinterpret_cast<float*>(params.flags + decode::flag_count(shape));
        params.nonce = 0x9E3779B97F4A7C15u + (arguments.integer("repeat_nonce") ? 0 : seed);
        if (arguments.integer("zero_flags")) {
          std::fill_n(params.flags, decode::flag_count(shape), 0);
        }
        // What the last launch has left in the partial sums must not be taken for this one's.
        std::fill_n(reinterpret_cast<uint16_t*>(params.partials),
                    decode::partials(shape) * decode::partial_floats(shape) * 2, simt::kPoison);

        simt::Config config;
        config.grid = {static_cast<unsigned>(params.grid)};
        config.block = {decode::kThreads};
        config.shared_bytes = decode::kSharedBytes;
        config.seed = seed;
        if (decode::tokens_of(shape.m) == 8) {
          simt::launch(config, [&] { decode::decode_body<T, TAdapter, 8>(params, decode::Products<T, TAdapter>{}); });
        } else {
          simt::launch(config, [&] { decode::decode_body<T, TAdapter, 16>(params, decode::Products<T, TAdapter>{}); });
        }
        workspace.check();
      });
}
"""

PROGRAM = (
    r"""
#include "lora/decode.cuh"
#include "simt/take.h"

using namespace peft_kernels::lora;
"""
    + TEST
    + r"""
void test_of(const simt::Arguments& arguments) {
  const std::map<std::string, void (*)(const simt::Arguments&)> tests = {
      {"bfloat16+bfloat16", test<__nv_bfloat16, __nv_bfloat16>},
      {"bfloat16+float32", test<__nv_bfloat16, float>},
      {"float16+float16", test<__half, __half>},
      {"float16+float32", test<__half, float>}};
  tests.at(arguments.text("dtype") + "+" + arguments.text("adapter_dtype"))(arguments);
}

int main(int argc, char** argv) {
  return simt::main_of(argc, argv, test_of);
}
"""
)


def run(
    case: Case,
    tensors: Tensors,
    splits: int = 1,
    down_splits: int = 1,
    grid: int = 3,
    schedules: int = 1,
    first_seed: int = 0,
    scale_tensor: bool = False,
    repeat_nonce: bool = False,
    zero_flags: bool = False,
    faulty: tuple[Path, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """y (m, n) and S (m, r), the same bits under all schedules.

    Args:
        repeat_nonce, zero_flags: what a graph's replays do, and what is done about it.
        faulty: a program of ``tests.simt.faults``, and which of its versions.
    """
    arguments = {
        "m": case.m,
        "n": case.n,
        "k": case.k,
        "r": case.r,
        "splits": splits,
        "down_splits": down_splits,
        "grid": grid,
        "nonce": 0,
        "x_0": case.k,
        "weight_0": case.k,
        "lora_a_0": case.k,
        "lora_b_0": case.r,
        "lora_b_1": 1,
        "bias_0": 1,
        "scale_0": float("nan") if scale_tensor else case.scale,
        "repeat_nonce": int(repeat_nonce),
        "zero_flags": int(zero_flags),
    }
    inputs = {**tensors._asdict(), "scale": torch.tensor([case.scale]) if scale_tensor else None}
    program = None
    if faulty is not None:
        program, arguments["config"] = faulty
    return run_on(case.dtype, case.adapter_dtype or case.dtype, inputs, arguments, schedules, first_seed, program)


def run_on(
    dtype: torch.dtype,
    adapter_dtype: torch.dtype,
    inputs: Mapping[str, Tensor | None],
    arguments: Mapping[str, float | str],
    schedules: int,
    first_seed: int = 0,
    program: Path | None = None,
) -> tuple[Tensor, Tensor]:
    """As ``run``, on tensors that lie in memory as the strides among the arguments say: lora_b_0 and lora_b_1."""
    m, n, r = (int(arguments[name]) for name in ("m", "n", "r"))
    names = {"dtype": cuda_tools.dtype_name(dtype), "adapter_dtype": cuda_tools.dtype_name(adapter_dtype)}
    outputs = {"y": ((m, n), dtype), "s": ((m, r), torch.float32)}
    program = program or build.build(PROGRAM)
    got = build.run(program, inputs, outputs, schedules, first_seed, **{**arguments, **names})
    return got["y"], got["s"]
