"""The decode kernel for tokens of several adapters in the emulator: its problems, its program, and how to run one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from peft_kernels._core import cuda_tools
from peft_kernels._core.rows import Rows
from peft_kernels.lora.kernels import cuda_decode
from python_ref import lora as oracle
from tests.contract.draw import Draw, dtypes_name
from tests.simt import build

TEST = r"""
// The workspace is poisoned once: flags keep what the schedule before has left, and each has a nonce of its own.
template <typename T, typename TAdapter>
void test(const simt::Arguments& arguments) {
  decode::Shape shape = {};
  simt::Take take = {arguments, {}};
  fields(take, shape);
  simt::Buffer x = arguments.input("x"), weight = arguments.input("weight"), lora_a = arguments.input("lora_a");
  simt::Buffer lora_b = arguments.input("lora_b"), bias = arguments.input("bias"), scales = arguments.input("scales");
  simt::Buffer slot = arguments.input("slot"), order = arguments.input("order"), table = arguments.input("table");
  simt::Buffer y("y", sizeof(T) * static_cast<size_t>(shape.m) * static_cast<size_t>(shape.n));
  simt::Buffer s("s", sizeof(float) * static_cast<size_t>(shape.m * arguments.integer("s_0")));
  simt::Buffer workspace("workspace", static_cast<size_t>(decode::workspace_bytes(shape)));
  workspace.poison();
  take.memory = {{"x", x.data()},           {"weight", weight.data()}, {"lora_a", lora_a.data()},
                 {"lora_b", lora_b.data()}, {"bias", bias.data()},     {"scales", scales.data()},
                 {"slot", slot.data()},     {"order", order.data()},   {"table", table.data()},
                 {"y", y.data()},           {"workspace", workspace.data()},
                 {"s", s.data<float>() + arguments.integer("s_column")}};

  simt::run_schedules(
      arguments, {&x, &weight, &lora_a, &lora_b, &bias, &scales, &slot, &order, &table}, {&y, &s}, [&](uint64_t seed) {
        DecodeRowsParams params = {};
        fields(take, params);
        DecodeParams& layer = params.layer;
        layer.partials = reinterpret_cast<float*>(layer.flags + decode::flag_count(shape));
        layer.nonce = 0x9E3779B97F4A7C15u + (arguments.integer("repeat_nonce") ? 0 : seed);
        if (arguments.integer("zero_flags")) {
          std::fill_n(layer.flags, decode::flag_count(shape), 0);
        }
        // What the last launch has left in the partial sums must not be taken for this one's.
        std::fill_n(reinterpret_cast<uint16_t*>(layer.partials),
                    decode::partials(shape) * decode::partial_floats(shape) * 2, simt::kPoison);

        simt::Config config;
        config.grid = {static_cast<unsigned>(layer.grid)};
        config.block = {decode::kThreads};
        config.shared_bytes = decode::kRowsSharedBytes;
        config.seed = seed;
        if (decode::tokens_of(shape.m) == 8) {
          simt::launch(config, [&] { decode::decode_rows_body<T, TAdapter, 8>(params); });
        } else {
          simt::launch(config, [&] { decode::decode_rows_body<T, TAdapter, 16>(params); });
        }
        workspace.check();
      });
}
"""

PROGRAM = (
    r"""
#include "lora/decode_rows.cuh"
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
    """Tokens that have a slot each, what is no slot being none; slots that have a rank each."""

    slots: tuple[int, ...]
    ranks: tuple[int, ...]
    n: int
    k: int
    dtype: torch.dtype = torch.bfloat16
    adapter_dtype: torch.dtype | None = None
    bias: bool = True

    @property
    def m(self) -> int:
        return len(self.slots)

    @property
    def width(self) -> int:
        return max(self.ranks)

    @property
    def most_chosen(self) -> int:
        return cuda_decode.most_chosen(self.m, len(self.ranks), sum(self.ranks), self.width)

    @property
    def firsts(self) -> list[int]:
        return [sum(self.ranks[:slot]) for slot in range(len(self.ranks))]

    def of(self, slot: int) -> slice:
        """A slot's rows of A."""
        return slice(self.firsts[slot], self.firsts[slot] + self.ranks[slot])

    @property
    def adapters(self) -> list[int]:
        """Of each token the slot whose update it has, or -1."""
        return [slot if 0 <= slot < len(self.ranks) and self.ranks[slot] else -1 for slot in self.slots]

    def __str__(self) -> str:
        slots, ranks = (".".join(map(str, each)) for each in (self.slots, self.ranks))
        return f"{self.m}x{self.n}x{self.k}-t{slots}-r{ranks}-{dtypes_name(self.dtype, self.adapter_dtype)}"


class Tensors(NamedTuple):
    x: Tensor
    weight: Tensor
    lora_a: Tensor
    lora_b: Tensor
    bias: Tensor | None
    scales: Tensor


def make(case: Case, seed: int = 0) -> Tensors:
    """The low-rank term is about as large as the base product. What no token uses is nan, a scale of rank 0 too."""
    draw, total = Draw(seed), sum(case.ranks)
    up = draw.normal(case.n, total)
    for slot, rank in enumerate(case.ranks):
        up[:, case.of(slot)] *= max(1, rank) ** -0.5
    return _as_asked(
        case,
        draw.normal(case.m, case.k),
        draw.normal(case.n, case.k, std=case.k**-0.5),
        draw.normal(total, case.k, std=case.k**-0.5),
        up,
        draw.normal(case.n),
        0.5 + draw.normal(len(case.ranks)).abs(),
    )


def make_exact(case: Case, seed: int = 0) -> Tensors:
    """Small integers whose every product and sum is exact in bfloat16, in any order; scales are 0.5, 1 and -1."""
    draw, total = Draw(seed), sum(case.ranks)
    return _as_asked(
        case,
        draw.single_signs(case.m, case.k),
        draw.integers(1, case.n, case.k),
        draw.integers(1, total, case.k),
        draw.integers(1, case.n, total),
        draw.integers(1, case.n),
        torch.tensor([0.5, 1.0, -1.0])[torch.arange(len(case.ranks)) % 3],
    )


def _as_asked(case: Case, *drawn: Tensor) -> Tensors:
    x, weight, lora_a, lora_b, bias, scales = drawn
    adapter = case.adapter_dtype or case.dtype
    for slot in set(range(len(case.ranks))) - set(case.adapters):
        lora_a[case.of(slot)], lora_b[:, case.of(slot)], scales[slot] = torch.nan, torch.nan, torch.nan
    bias = bias.to(case.dtype) if case.bias else None
    half = x.to(case.dtype), weight.to(case.dtype), lora_a.to(adapter), lora_b.to(adapter)
    return Tensors(*half, bias, scales.float())


def expected(case: Case, tensors: Tensors) -> tuple[Tensor, Tensor]:
    """y and S in float64; S (m, width) in the order of the tokens, 0 where a token has no rank."""
    wide = [None if tensor is None else tensor.double() for tensor in tensors]
    x, weight, lora_a, lora_b, bias, scales = wide
    s = torch.zeros(case.m, case.width, dtype=torch.float64)
    for token, slot in enumerate(case.adapters):
        if slot >= 0:
            s[token, : case.ranks[slot]] = lora_a[case.of(slot)] @ x[token]
    slots = [
        oracle.Slot(lora_a[case.of(slot)], lora_b[:, case.of(slot)], float(scales[slot]))
        for slot in range(len(case.ranks))
    ]
    return oracle.rows_forward(x, weight, slots, case.adapters, bias), s


def eager(case: Case, tensors: Tensors) -> tuple[Tensor, Tensor]:
    """y by eager torch in the case's dtypes, S in float32."""
    slots = [
        oracle.Slot(tensors.lora_a[case.of(slot)], tensors.lora_b[:, case.of(slot)], float(tensors.scales[slot]))
        for slot in range(len(case.ranks))
    ]
    y = oracle.eager_rows(tensors.x, tensors.weight, slots, case.adapters, tensors.bias)
    s = torch.zeros(case.m, case.width)
    for token, slot in enumerate(case.adapters):
        if slot >= 0:
            s[token, : case.ranks[slot]] = tensors.lora_a[case.of(slot)].float() @ tensors.x[token].float()
    return y, s


def run(
    case: Case,
    tensors: Tensors,
    splits: int = 1,
    down_splits: int = 1,
    grid: int = 3,
    schedules: int = 1,
    first_seed: int = 0,
    spare: tuple[int, int] = (0, 0),
    repeat_nonce: bool = False,
    zero_flags: bool = False,
    faulty: tuple[Path, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """y (m, n) and S (m, width), the same bits under all schedules; S in the order of the tokens, 0 where none is kept.

    Args:
        spare: columns of S before and behind its own, which must stay as they are.
        repeat_nonce, zero_flags: what a graph's replays do, and what is done about it.
        faulty: a program of ``tests.simt.faults``, and which of its versions.
    """
    known = [slot if 0 <= slot < len(case.ranks) else -1 for slot in case.slots]
    rows = Rows.of(torch.tensor(known), known=len(case.ranks))
    stride, count = spare[0] + case.width + spare[1], len(case.ranks)
    arguments = {
        "m": case.m,
        "n": case.n,
        "k": case.k,
        "r": case.most_chosen,
        "splits": splits,
        "down_splits": down_splits,
        "grid": grid,
        "nonce": 0,
        "x_0": case.k,
        "weight_0": case.k,
        "lora_a_0": case.k,
        "lora_b_0": sum(case.ranks),
        "lora_b_1": 1,
        "bias_0": 1,
        "scales_0": 1,
        "slot_0": 1,
        "order_0": 1,
        "table_0": count,
        "slots": count,
        "a_rows": sum(case.ranks),
        "s_0": stride,
        "s_column": spare[0],
        "repeat_nonce": int(repeat_nonce),
        "zero_flags": int(zero_flags),
    }
    table = torch.tensor([case.firsts, case.ranks], dtype=torch.int32)
    slot = torch.tensor(case.slots, dtype=torch.int32)
    inputs = {**tensors._asdict(), "slot": slot, "order": rows.order, "table": table}
    program = None
    if faulty is not None:
        program, arguments["config"] = faulty
    y, kept = run_on(case.dtype, case.adapter_dtype or case.dtype, inputs, arguments, schedules, first_seed, program)
    assert kept[:, : spare[0]].isnan().all() and kept[:, spare[0] + case.width :].isnan().all()
    s = torch.zeros(case.m, case.width)
    for place, token in enumerate(rows.order.tolist()):
        rank = case.ranks[case.adapters[token]] if case.adapters[token] >= 0 else 0
        own = kept[place, spare[0] : spare[0] + case.width]
        assert own[rank:].isnan().all(), "S has more columns than the token's rank"
        s[token, :rank] = own[:rank]
    return y, s


def run_on(
    dtype: torch.dtype,
    adapter_dtype: torch.dtype,
    inputs: Mapping[str, Tensor | None],
    arguments: Mapping[str, float | str],
    schedules: int,
    first_seed: int = 0,
    program: Path | None = None,
) -> tuple[Tensor, Tensor]:
    """y (m, n) and S (m, s_0), nan where nothing was written, of tensors that lie as the strides among them say."""
    m, n, stride = (int(arguments[name]) for name in ("m", "n", "s_0"))
    names = {"dtype": cuda_tools.dtype_name(dtype), "adapter_dtype": cuda_tools.dtype_name(adapter_dtype)}
    outputs = {"y": ((m, n), dtype), "s": ((m, stride), torch.float32)}
    program = program or build.build(PROGRAM)
    got = build.run(program, inputs, outputs, schedules, first_seed, **{**arguments, **names})
    return got["y"], got["s"]
