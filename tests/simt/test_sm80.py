"""Twins of csrc/core/sm80 and of tickets: right uses give right results under every schedule, wrong ones are seen."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.simt import build

pytestmark = pytest.mark.cpu_only

CTAS, THREADS = 4, 64

PROGRAM = r"""
#include "core/shared.cuh"
#include "core/sm80/async_copy.cuh"
#include "core/sm80/matrix.cuh"
#include "core/tickets.cuh"

using namespace peft_kernels;

struct Params {
  const int16_t* x;
  int* y;
  uint64_t* tickets;
  uint64_t nonce;
};

constexpr int kThreads = 64;

// Thread i copies eight elements and reads those of another warp; then the next eight, into the same place.
template <bool kWaits, bool kMeets, bool kMeetsAgain>
void exchange(const Params& params) {
  auto* stage = static_cast<int16_t*>(shared_memory());
  const int thread = static_cast<int>(threadIdx.x), other = (thread + 33) % kThreads;
  int sum = 0;
  for (int turn = 0; turn < 2; ++turn) {
    copy_async_16(stage + 8 * thread, params.x + (kThreads * turn + thread) * 8, 16);
    end_copies();
    if (kWaits) {
      wait_for_copies<0>();
    }
    if (kMeets) {
      __syncthreads();
    }
    sum = sum * 100 + stage[8 * other];
    if (kMeetsAgain) {
      __syncthreads();
    }
  }
  wait_for_copies<0>();
  params.y[kThreads * blockIdx.x + threadIdx.x] = sum;
}

// The older of two groups is waited for, which is not the one that is read where kYounger.
template <bool kYounger>
void one_left(const Params& params) {
  auto* stage = static_cast<int16_t*>(shared_memory()) + 16 * threadIdx.x;
  for (int i = 0; i < 2; ++i) {
    copy_async_16(stage + 8 * i, params.x + 8 * threadIdx.x, 16);
    end_copies();
  }
  wait_for_copies<1>();
  params.y[kThreads * blockIdx.x + threadIdx.x] = stage[8 * kYounger];
  wait_for_copies<0>();
}

void tails(const Params& params) {
  auto* stage = static_cast<int16_t*>(shared_memory()) + 16 * threadIdx.x;
  const int count = static_cast<int>(threadIdx.x % 9);
  copy_async_16(stage, params.x + 8 * threadIdx.x, 2 * count);
  copy_async_4(stage + 8, params.x + 8 * threadIdx.x, threadIdx.x % 2 * 4);
  end_copies();
  wait_for_copies<0>();
  int sum = 1000 * stage[9];
  for (int i = 0; i < 8; ++i) {
    sum += stage[i];
  }
  params.y[kThreads * blockIdx.x + threadIdx.x] = sum;
}

void off_boundary(const Params& params) {
  copy_async_16(static_cast<int16_t*>(shared_memory()) + 4, params.x, 16);
}

void never_waits(const Params& params) {
  copy_async_16(static_cast<int16_t*>(shared_memory()) + 8 * threadIdx.x, params.x, 16);
  end_copies();
}

// Element (lane, word, half) of both loads of the matrices that lie one after the other.
template <bool kTransposed>
void matrices(const Params& params) {
  auto* stage = static_cast<int16_t*>(shared_memory());
  if (threadIdx.x >= 32) {
    return;
  }
  for (int i = 0; i < 8; ++i) {
    stage[8 * threadIdx.x + i] = params.x[8 * threadIdx.x + i];
  }
  __syncwarp();
  uint32_t words[4];
  const auto load = kTransposed ? load_matrices_transposed : load_matrices;
  load(words, stage + 8 * threadIdx.x, __builtin_FILE(), __builtin_LINE());
  for (int j = 0; j < 4 && blockIdx.x == 0; ++j) {
    params.y[(4 * threadIdx.x + j) * 2] = static_cast<int>(words[j] & 0xFFFF);
    params.y[(4 * threadIdx.x + j) * 2 + 1] = static_cast<int>(words[j] >> 16);
  }
}

// Each CTA leaves its elements in y; the last one to come adds 1000 to all of them.
template <bool kMeets>
void last(const Params& params) {
  int* came = static_cast<int*>(shared_memory());
  const int place = static_cast<int>(kThreads * blockIdx.x + threadIdx.x);
  simt::preempt("before the store");
  params.y[place] = params.x[place];
  if (kMeets) {
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    *came = is_last_to_come(params.tickets, params.nonce, gridDim.x);
  }
  __syncthreads();
  for (unsigned i = threadIdx.x; *came && i < kThreads * gridDim.x; i += kThreads) {
    params.y[i] += 1000;
  }
}

void test(const simt::Arguments& arguments) {
  const std::map<std::string, void (*)(const Params&)> bodies = {
      {"exchange", exchange<true, true, true>},
      {"no wait", exchange<false, true, true>},
      {"no meeting", exchange<true, false, true>},
      {"copied over", exchange<true, true, false>},
      {"older", one_left<false>},
      {"younger", one_left<true>},
      {"tails", tails},
      {"off boundary", off_boundary},
      {"never waits", never_waits},
      {"matrices", matrices<false>},
      {"transposed", matrices<true>},
      {"last", last<true>},
      {"last too early", last<false>}};
  simt::Buffer x = arguments.input("x"), tickets("tickets", 8);
  simt::Buffer y("y", sizeof(int) * static_cast<size_t>(arguments.integer("ctas")) * kThreads);
  tickets.poison();
  simt::run_schedules(arguments, {&x}, {&y}, [&](uint64_t seed) {
    simt::Config config;
    config.grid = {static_cast<unsigned>(arguments.integer("ctas"))};
    config.block = {kThreads};
    config.shared_bytes = 2048;
    config.seed = seed;
    const Params params = {x.data<const int16_t>(), y.data<int>(), tickets.data<uint64_t>(), 0x123456789ABCDEFu + seed};
    simt::launch(config, [&] { bodies.at(arguments.text("body"))(params); });
  });
}

int main(int argc, char** argv) {
  return simt::main_of(argc, argv, test);
}
"""


def run(body: str, x: Tensor, ctas: int = CTAS) -> Tensor:
    outputs = {"y": ((ctas * THREADS,), torch.int32)}
    return build.run(build.build(PROGRAM), {"x": x.short()}, outputs, schedules=30, body=body, ctas=ctas)["y"]


X = torch.arange(2 * THREADS * 8) % 91


def test_copies_of_others_after_a_barrier() -> None:
    first = X.view(2, THREADS, 8)[:, :, 0].roll(-33, dims=1)
    assert torch.equal(run("exchange", X).view(CTAS, THREADS), (first[0] * 100 + first[1]).int().expand(CTAS, -1))


def test_the_older_of_two_groups() -> None:
    assert torch.equal(run("older", X, 1), X[: 8 * THREADS : 8].int())


def test_beyond_the_bytes_are_zeros() -> None:
    rows = X.view(-1, 8)[:THREADS]
    expected = [int(row[: i % 9].sum() + i % 2 * 1000 * row[1]) for i, row in enumerate(rows)]
    assert run("tails", X, 1).tolist() == expected


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("no wait", "the bits of y differ"),
        ("no meeting", "the bits of y differ"),
        ("copied over", "the bits of y differ"),
        ("younger", "the bits of y differ"),
        ("off boundary", "a copy of 16 bytes off its boundary"),
        ("never waits", "exits while an asynchronous operation of it is under way: .*cp.async"),
        ("last too early", "the bits of y differ"),
    ],
)
def test_faults_are_seen(body: str, message: str) -> None:
    with pytest.raises(build.SimtError, match=message):
        run(body, X)


@pytest.mark.parametrize("transposed", [False, True])
def test_fragments_are_where_the_isa_has_them(transposed: bool) -> None:
    """Lane 4 g + t holds row g, columns 2 t and 2 t + 1, of each matrix or of its transpose."""
    x = torch.arange(4 * 8 * 8)
    matrices = x.view(4, 8, 8)
    matrices = matrices.transpose(1, 2) if transposed else matrices
    expected = matrices.reshape(4, 8, 4, 2).permute(1, 2, 0, 3)
    assert torch.equal(run("transposed" if transposed else "matrices", x).view(8, 4, 4, 2), expected.int())


@pytest.mark.thorough
def test_one_of_all_is_the_last() -> None:
    """Whatever the ticket held before: poison, then what the schedule before has left."""
    assert torch.equal(run("last", X), 1000 + X[: CTAS * THREADS].int())
