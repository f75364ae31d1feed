"""The decode kernel's device body in the emulator: its program, and how to run a problem on it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tests.lora.cases import Case, Tensors
from tests.simt import build

PROGRAM = r"""
#include "lora/decode.cuh"

using namespace peft_kernels::lora;

// The workspace is poisoned once: flags keep what the schedule before has left, and each has a nonce of its own.
template <typename T, typename TAdapter>
void test(const simt::Arguments& arguments) {
  const auto size = [&](const char* name) { return static_cast<int>(arguments.integer(name)); };
  const decode::Shape shape = {size("m"), size("n"), size("k"), size("r"), size("splits"), size("down_splits")};
  simt::Buffer x = arguments.input("x"), weight = arguments.input("weight"), lora_a = arguments.input("lora_a");
  simt::Buffer lora_b = arguments.input("lora_b"), bias = arguments.input("bias"), scale = arguments.input("scale");
  simt::Buffer y("y", sizeof(T) * static_cast<size_t>(shape.m) * static_cast<size_t>(shape.n));
  simt::Buffer s("s", sizeof(float) * static_cast<size_t>(shape.m) * static_cast<size_t>(shape.r));
  simt::Buffer workspace("workspace", static_cast<size_t>(decode::workspace_bytes(shape)));
  workspace.poison();

  simt::run_schedules(
      arguments, {&x, &weight, &lora_a, &lora_b, &bias, &scale}, {&y, &s}, [&](uint64_t seed) {
        DecodeParams params = {};
        params.x = x.data();
        params.weight = weight.data();
        params.lora_a = lora_a.data();
        params.lora_b = lora_b.data();
        params.bias = bias.data();
        params.scale = scale.data<const float>();
        params.y = y.data();
        params.s = s.data<float>();
        params.flags = workspace.data<uint64_t>();
        params.partials = reinterpret_cast<float*>(params.flags + decode::flag_count(shape));
        params.x_stride = arguments.integer("x_stride");
        params.weight_stride = arguments.integer("weight_stride");
        params.a_stride = arguments.integer("a_stride");
        params.b_stride_n = arguments.integer("b_stride_n");
        params.b_stride_r = arguments.integer("b_stride_r");
        params.bias_stride = arguments.integer("bias_stride");
        params.nonce = 0x9E3779B97F4A7C15u + (arguments.integer("repeat_nonce") ? 0 : seed);
        if (arguments.integer("zero_flags")) {
          std::fill_n(params.flags, decode::flag_count(shape), 0);
        }
        params.scale_value = static_cast<float>(arguments.number("scale_value"));
        params.shape = shape;
        // What the last launch has left in the partial sums must not be taken for this one's.
        std::fill_n(reinterpret_cast<uint16_t*>(params.partials),
                    decode::partials(shape) * decode::partial_floats(shape) * 2, simt::kPoison);

        simt::Config config;
        config.grid = {static_cast<unsigned>(size("grid"))};
        config.block = {decode::kThreads};
        config.shared_bytes = decode::kSharedBytes;
        config.seed = seed;
        simt::launch(config, [&] { decode::decode_body<T, TAdapter>(params); });
        workspace.check();
      });
}

void test_of(const simt::Arguments& arguments) {
  const std::map<std::string, void (*)(const simt::Arguments&)> tests = {
      {"bfloat16+bfloat16", test<__nv_bfloat16, __nv_bfloat16>},
      {"bfloat16+float32", test<__nv_bfloat16, float>},
      {"float16+float16", test<__half, __half>},
      {"float16+float32", test<__half, float>}};
  tests.at(arguments.text("dtypes"))(arguments);
}

int main(int argc, char** argv) {
  return simt::main_of(argc, argv, test_of);
}
"""


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
    source: str = PROGRAM,
) -> tuple[Tensor, Tensor]:
    """y (m, n) and S (m, r), the same bits under all schedules.

    Args:
        repeat_nonce, zero_flags: what a graph's replays do, and what is done about it.
    """
    arguments = {
        "m": case.m,
        "n": case.n,
        "k": case.k,
        "r": case.r,
        "splits": splits,
        "down_splits": down_splits,
        "grid": grid,
        "x_stride": case.k,
        "weight_stride": case.k,
        "a_stride": case.k,
        "b_stride_n": case.r,
        "b_stride_r": 1,
        "bias_stride": 1,
        "scale_value": float("nan") if scale_tensor else case.scale,
        "repeat_nonce": int(repeat_nonce),
        "zero_flags": int(zero_flags),
    }
    inputs = {**tensors._asdict(), "scale": torch.tensor([case.scale]) if scale_tensor else None}
    return run_on(case.dtype, case.adapter_dtype or case.dtype, inputs, arguments, schedules, first_seed, source)


def run_on(
    dtype: torch.dtype,
    adapter_dtype: torch.dtype,
    inputs: Mapping[str, Tensor | None],
    arguments: Mapping[str, float],
    schedules: int,
    first_seed: int = 0,
    source: str = PROGRAM,
) -> tuple[Tensor, Tensor]:
    """As ``run``, on tensors that lie in memory as the strides among the arguments say."""
    m, n, r = (int(arguments[name]) for name in ("m", "n", "r"))
    names = "+".join(str(each).removeprefix("torch.") for each in (dtype, adapter_dtype))
    outputs = {"y": ((m, n), dtype), "s": ((m, r), torch.float32)}
    got = build.run(build.build(source), inputs, outputs, schedules, first_seed, dtypes=names, **arguments)
    return got["y"], got["s"]
