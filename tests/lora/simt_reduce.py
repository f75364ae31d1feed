"""The reduce kernel's device body in the emulator: its program, and how to run a problem on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from peft_kernels._core.cuda_tools import dtype_name
from tests.simt import build

TEST = r"""
// The workspace is poisoned once: tickets keep what the schedule before has left, and each has a nonce of its own.
template <typename C>
void test(const simt::Arguments& arguments) {
  const std::vector<std::string> inputs = {"dy", "s", "scale", "x", "ds", "seed", "lora_b"};
  const std::vector<std::string> outputs = {"db", "dbias", "da", "ds_parts"};
  std::map<std::string, simt::Buffer> buffers;
  std::vector<simt::Buffer*> in, out;
  simt::Take take = {arguments, {{"workspace", nullptr}}};
  for (const auto& name : inputs) {
    in.push_back(&buffers.emplace(name, arguments.input(name)).first->second);
  }
  for (const auto& name : outputs) {
    const auto bytes = static_cast<size_t>(arguments.integer(name + "_bytes"));
    out.push_back(&buffers.emplace(name, simt::Buffer(name, bytes)).first->second);
  }
  for (const auto& [name, buffer] : buffers) {
    take.memory[name] = buffer.data();
  }
  ReduceParams given = {};
  fields(take, given);
  const reduce::Variant variant = variant_of(given);
  if (variant.ranks != C::kRanks || variant.exact != C::kExact || variant.narrow != C::kNarrow) {
    throw simt::Error("the launcher would take another variant");
  }
  const reduce::Plan plan = planned(given).plan;
  simt::Buffer workspace("workspace", static_cast<size_t>(reduce::workspace_bytes(plan, variant)));
  workspace.poison();
  given.tickets = workspace.data<uint64_t>();

  simt::run_schedules(arguments, in, out, [&](uint64_t seed) {
    ReduceParams params = planned(given);
    params.nonce = 0x9E3779B97F4A7C15u + (arguments.integer("repeat_nonce") ? 0 : seed);
    if (arguments.integer("zero_tickets")) {
      std::fill_n(params.tickets, reduce::ticket_count(plan), 0);
    }
    // What the last launch has left in the partial sums must not be taken for this one's.
    std::fill_n(reinterpret_cast<uint16_t*>(params.partials), plan.slots() * variant.slot_floats() * 2, simt::kPoison);

    simt::Config config;
    config.grid = {static_cast<unsigned>(plan.ctas)};
    config.block = {reduce::kThreads};
    config.shared_bytes = static_cast<size_t>(variant.shared_bytes());
    config.seed = seed;
    config.resident_ctas = static_cast<unsigned>(arguments.integer("resident"));
    simt::launch(config, [&] { reduce::reduce_body<C>(params); });
    workspace.check();
  });
}
"""

PROGRAM = (
    r"""
#include "lora/reduce.cuh"
#include "simt/take.h"

using namespace peft_kernels::lora;
"""
    + TEST
    + r"""
template <typename T>
void test_of(const simt::Arguments& arguments) {
  const std::map<std::string, void (*)(const simt::Arguments&)> tests = {
      {"32", test<reduce::Config<T, 32, false, false>>},
      {"128", test<reduce::Config<T, 128, false, false>>},
      {"32 narrow", test<reduce::Config<T, 32, false, true>>},
      {"32 exact narrow", test<reduce::Config<T, 32, true, true>>}};
  tests.at(arguments.text("variant"))(arguments);
}

int main(int argc, char** argv) {
  return simt::main_of(argc, argv, [](const simt::Arguments& arguments) {
    (arguments.text("dtype") == "bfloat16" ? test_of<__nv_bfloat16> : test_of<__half>)(arguments);
  });
}
"""
)


@dataclass(frozen=True)
class Task:
    """What is asked of one launch; sizes as in ``Case``, a threshold of 0 drops nothing."""

    m: int
    n: int
    k: int
    r: int
    dtype: torch.dtype
    adapter_dtype: torch.dtype
    db: bool = True
    dbias: bool = True
    da: bool = True
    ds: bool = False
    threshold: int = 0
    multiprocessors: int = 3

    def __str__(self) -> str:
        asked = "+".join(name for name in Results._fields if getattr(self, name))
        sizes = f"{self.m}x{self.n}x{self.k}-r{self.r}-{dtype_name(self.dtype)}+{dtype_name(self.adapter_dtype)}"
        return f"{sizes}-{asked}-t{self.threshold}-sm{self.multiprocessors}"

    @property
    def variant(self) -> str:
        """Which of the kernels the launcher takes."""
        exact = self.adapter_dtype == torch.float32
        if exact or self.ds:
            return f"32{' exact' * exact} narrow"
        return "32" if self.r <= 32 else "128"


class Operands(NamedTuple):
    """Of a launch: dy (m, n), s and ds (m, r) float32, x (m, k), lora_b (n, r), seed."""

    dy: Tensor
    s: Tensor
    x: Tensor
    ds: Tensor
    lora_b: Tensor
    seed: int = 0


class Results(NamedTuple):
    db: Tensor | None
    dbias: Tensor | None
    da: Tensor | None
    ds: Tensor | None


def run(
    task: Task,
    operands: Operands,
    scale: float | Tensor = 0.75,
    keep_scale: float = 1.0,
    schedules: int = 1,
    first_seed: int = 0,
    resident: int = 0,
    repeat_nonce: bool = False,
    zero_tickets: bool = False,
    faulty: tuple[Path, int] | None = None,
) -> Results:
    """The gradients that the task asks for, the same bits under all schedules; ds is the sum of its parts.

    Args:
        resident: blocks on the machine at a time; 0: all.
        repeat_nonce, zero_tickets: what a graph's replays do, and what is done about it.
        faulty: a program of ``tests.simt.faults``, and which of its versions.
    """
    m, n, k, r = task.m, task.n, task.k, task.r
    dy, x = in_rows_of_8(operands.dy), in_rows_of_8(operands.x)
    up, down = task.db or task.dbias or task.ds, task.da
    inputs = {
        "dy": dy if up else None,
        "s": operands.s if task.db else None,
        "scale": scale.reshape(1) if isinstance(scale, Tensor) else None,
        "x": x if down else None,
        "ds": operands.ds if down else None,
        "seed": torch.tensor([operands.seed]) if task.threshold else None,
        "lora_b": operands.lora_b if task.ds else None,
    }
    tiles = -(-n // 256)
    shapes = {
        "db": ((n, r), task.adapter_dtype, task.db),
        "dbias": ((n,), task.dtype, task.dbias),
        "da": ((r, k), task.adapter_dtype, task.da),
        "ds_parts": ((tiles, m, r), torch.float32, task.ds),
    }
    arguments: dict[str, float | str] = {
        "m": m,
        "n": n,
        "k": k,
        "r": r,
        "dy_0": dy.shape[1],
        "x_0": x.shape[1],
        "db_0": r,
        "db_1": 1,
        "da_0": k,
        "da_1": 1,
        "lora_b_0": r,
        "lora_b_1": 1,
        "scale_0": float("nan") if isinstance(scale, Tensor) else scale,
        "keep_scale": keep_scale,
        "threshold": task.threshold,
        "multiprocessors": task.multiprocessors,
        "nonce": 0,
        "variant": task.variant,
        "resident": resident,
        "repeat_nonce": int(repeat_nonce),
        "zero_tickets": int(zero_tickets),
    }
    program = None
    if faulty is not None:
        program, arguments["config"] = faulty
    got = run_program(task, inputs, shapes, arguments, schedules, first_seed, program)
    parts = got.get("ds_parts")
    return Results(got.get("db"), got.get("dbias"), got.get("da"), None if parts is None else parts.sum(0))


def run_program(
    task: Task,
    inputs: Mapping[str, Tensor | None],
    shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype, bool]],
    arguments: Mapping[str, float | str],
    schedules: int,
    first_seed: int,
    program: Path | None = None,
) -> dict[str, Tensor]:
    """The outputs, on tensors that lie in memory as the strides among the arguments say.

    Args:
        shapes: and dtype of each output, and whether it is asked for.
    """
    outputs = {name: (shape, dtype) for name, (shape, dtype, asked) in shapes.items() if asked}
    sizes = {f"{name}_bytes": 0 for name in shapes}
    sizes |= {f"{name}_bytes": torch.Size(shape).numel() * dtype.itemsize for name, (shape, dtype) in outputs.items()}
    names = {"dtype": dtype_name(task.dtype), "adapter_dtype": dtype_name(task.adapter_dtype)}
    numbers = {**arguments, **sizes, **names}
    return build.run(program or build.build(PROGRAM), inputs, outputs, schedules, first_seed, **numbers)


def in_rows_of_8(matrix: Tensor) -> Tensor:
    """Rows on 16-byte boundaries; what lies between them is nan and must not matter."""
    rows, cols = matrix.shape
    stored = torch.full((rows, -(-cols // 8) * 8), float("nan"), dtype=matrix.dtype)
    stored[:, :cols] = matrix
    return stored
