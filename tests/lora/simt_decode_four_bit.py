"""The decode kernel for weights of four bits in the emulator: its problems, its program, and how to run one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from peft_kernels._core import cuda_tools
from python_ref import four_bit_weight as oracle
from tests.contract.draw import Draw, dtypes_name
from tests.lora import cases
from tests.simt import build

TEST = r"""
// The workspace is poisoned once: flags keep what the schedule before has left, and each has a nonce of its own.
template <typename T, typename TAdapter>
void test(const simt::Arguments& arguments) {
  decode::Shape shape = {};
  simt::Take take = {arguments, {}};
  fields(take, shape);
  simt::Buffer x = arguments.input("x"), codes = arguments.input("codes"), lora_a = arguments.input("lora_a");
  simt::Buffer lora_b = arguments.input("lora_b"), bias = arguments.input("bias"), scale = arguments.input("scale");
  simt::Buffer scales = arguments.input("scales"), code = arguments.input("code"), second = arguments.input("second");
  simt::Buffer offset = arguments.input("offset");
  simt::Buffer y("y", sizeof(T) * static_cast<size_t>(shape.m) * static_cast<size_t>(shape.n));
  simt::Buffer s("s", sizeof(float) * static_cast<size_t>(shape.m) * static_cast<size_t>(shape.r));
  simt::Buffer streamed("streamed", sizeof(int64_t));
  simt::Buffer workspace("workspace", static_cast<size_t>(decode::workspace_bytes(shape)));
  workspace.poison();
  take.memory = {{"x", x.data()},           {"codes", codes.data()},   {"lora_a", lora_a.data()},
                 {"lora_b", lora_b.data()}, {"bias", bias.data()},     {"scale", scale.data()},
                 {"scales", scales.data()}, {"code", code.data()},     {"second", second.data()},
                 {"offset", offset.data()}, {"y", y.data()},           {"s", s.data()},
                 {"workspace", workspace.data()}};

  simt::run_schedules(
      arguments, {&x, &codes, &lora_a, &lora_b, &bias, &scale, &scales, &code, &second, &offset}, {&y, &s, &streamed},
      [&](uint64_t seed) {
        DecodeFourBitParams params = {};
        fields(take, params);
        params.layer.partials = reinterpret_cast<float*>(params.layer.flags + decode::flag_count(shape));
        params.layer.nonce = 0x9E3779B97F4A7C15u + seed;
        // What the last launch has left in the partial sums must not be taken for this one's.
        std::fill_n(reinterpret_cast<uint16_t*>(params.layer.partials),
                    decode::partials(shape) * decode::partial_floats(shape) * 2, simt::kPoison);
        const int64_t before = peft_kernels::twin::streamed_bytes;

        simt::Config config;
        config.grid = {static_cast<unsigned>(params.layer.grid)};
        config.block = {decode::kThreads};
        config.shared_bytes = decode::kFourBitSharedBytes;
        config.seed = seed;
        if (decode::tokens_of(shape.m) == 8) {
          simt::launch(config, [&] { decode::decode_four_bit_body<T, TAdapter, 8>(params); });
        } else {
          simt::launch(config, [&] { decode::decode_four_bit_body<T, TAdapter, 16>(params); });
        }
        *streamed.data<int64_t>() = peft_kernels::twin::streamed_bytes - before;
        workspace.check();
      });
}
"""

PROGRAM = (
    r"""
#include "lora/decode_four_bit.cuh"
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


@dataclass(frozen=True)
class Case:
    """A layer for a few tokens, and how its weight is stored; ``second`` is the nested block, 0 where there is none."""

    m: int
    n: int
    k: int
    r: int
    kind: str = "nf4"
    block: int = 64
    second: int = 0
    dtype: torch.dtype = torch.bfloat16
    adapter_dtype: torch.dtype | None = None
    bias: bool = True
    scalars: bool = True
    """Whether scale and offset are tensors."""

    @property
    def layer(self) -> cases.Case:
        """The same on a decoded weight."""
        return cases.Case(self.m, self.n, self.k, self.r, self.dtype, self.adapter_dtype, bias=self.bias)

    def __str__(self) -> str:
        nested, dtypes = f"-nested{self.second}" * bool(self.second), dtypes_name(self.dtype, self.adapter_dtype)
        return f"{self.kind}-{self.m}x{self.n}x{self.k}-r{self.r}-{dtypes}-block{self.block}{nested}"


class Weight(NamedTuple):
    """Codes and scales as bitsandbytes has them."""

    packed: Tensor
    scales: Tensor
    code: Tensor | None
    second: Tensor | None
    offset: Tensor | None


def make_weight(case: Case, seed: int = 0) -> Weight:
    """All bytes; scales of both signs, as large as products of k should be small."""
    draw, blocks = Draw(seed), case.n * case.k // case.block

    def bytes_(count: int) -> Tensor:
        return torch.randint(256, (count,), generator=draw.generator).to(torch.uint8)

    packed = bytes_(case.n * case.k // 2)
    if not case.second:
        return Weight(packed, draw.normal(blocks, std=case.k**-0.5).float(), None, None, None)
    second = draw.normal(-(-blocks // case.second), std=case.k**-0.5).float()
    offset = draw.normal(1, std=case.k**-0.5)[0].float()
    return Weight(packed, bytes_(blocks), draw.normal(256).float(), second, offset)


def decoded(case: Case, weight: Weight) -> Tensor:
    """The weight (n, k) in the case's dtype."""
    nested = None if case.second == 0 else (weight.code, weight.second, case.second, weight.offset)
    shape = case.n, case.k
    return oracle.eager(weight.packed, case.kind, shape, case.dtype, weight.scales, case.block, nested)


def make(case: Case, seed: int = 0) -> tuple[cases.Tensors, Weight]:
    """The layer's tensors, its weight decoded, and the weight."""
    weight = make_weight(case, seed)
    tensors = cases.make(case.layer, torch.device("cpu"), seed)
    return tensors._replace(weight=decoded(case, weight)), weight


def make_cancelling(case: Case) -> tuple[cases.Tensors, Weight]:
    """Nested scales whose product with the second level, once rounded, is minus the offset: W and y are zero."""
    tensors, weight = make(case)
    assert weight.code is not None and weight.second is not None
    code, second = torch.full_like(weight.code, 0.3), torch.full_like(weight.second, 0.7)
    weight = weight._replace(code=code, second=second, offset=-(code[0] * second[0]))
    none = torch.zeros_like(tensors.lora_b)
    return tensors._replace(weight=decoded(case, weight), lora_b=none, bias=None), weight


def run(
    case: Case,
    tensors: cases.Tensors,
    weight: Weight,
    splits: int = 1,
    down_splits: int = 1,
    grid: int = 3,
    schedules: int = 1,
    first_seed: int = 0,
    faulty: tuple[Path, int] | None = None,
) -> tuple[Tensor, Tensor, int]:
    """y (m, n), S (m, r), and the bytes of W and A that the launch has read.

    Args:
        faulty: a program of ``tests.simt.faults``, and which of its versions.
    """
    values, nan = oracle.TABLES[case.kind], float("nan")
    offset = 0.0 if weight.offset is None else float(weight.offset)
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
        "lora_a_0": case.k,
        "lora_b_0": case.r,
        "lora_b_1": 1,
        "bias_0": 1,
        "scale_0": nan if case.scalars else case.layer.scale,
        "offset_0": nan if case.scalars else offset,
        "values": values[0],
        **{f"values_{i}": value for i, value in enumerate(values[1:])},
        "block_shift": case.block.bit_length() - 1,
        "second_shift": max(0, case.second.bit_length() - 1),
    }
    scalars = {"scale": torch.tensor([case.layer.scale]), "offset": torch.tensor([offset])}
    inputs = {
        **tensors._replace(weight=None)._asdict(),  # type: ignore[arg-type]
        "codes": weight.packed,
        "scales": weight.scales,
        "code": weight.code,
        "second": weight.second,
        **(scalars if case.scalars else {}),
    }
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
) -> tuple[Tensor, Tensor, int]:
    """As ``run``, on tensors that lie in memory as the strides among the arguments say."""
    m, n, r = (int(arguments[name]) for name in ("m", "n", "r"))
    names = {"dtype": cuda_tools.dtype_name(dtype), "adapter_dtype": cuda_tools.dtype_name(adapter_dtype)}
    outputs = {"y": ((m, n), dtype), "s": ((m, r), torch.float32), "streamed": ((1,), torch.int64)}
    program = program or build.build(PROGRAM)
    got = build.run(program, inputs, outputs, schedules, first_seed, **{**arguments, **names})
    return got["y"], got["s"], int(got["streamed"])
