"""The emulator itself: right programs give right results under every schedule, and each fault that it is there for is
seen, where the same program without the fault passes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.simt import build

pytestmark = pytest.mark.cpu_only

CTAS, THREADS = 3, 64

PROGRAM = r"""
#include "core/flags.cuh"
#include "core/shared.cuh"

using namespace peft_kernels;

struct Params {
  const float* x;
  float* y;
  uint64_t* flags;
};

constexpr int kThreads = 64;

// y[block] = sum of the block's 64 values of x, by a tree in shared memory.
template <bool kSync>
void tree(const Params& params) {
  float* sums = static_cast<float*>(shared_memory());
  const unsigned thread = threadIdx.x;
  sums[thread] = params.x[blockIdx.x * kThreads + thread];
  for (unsigned half = kThreads / 2; half > 0; half /= 2) {
    if (kSync || half == kThreads / 2) {
      __syncthreads();
    }
    if (thread < half) {
      sums[thread] += sums[thread + half];
    }
  }
  if (thread == 0) {
    params.y[blockIdx.x] = sums[0];
  }
}

// The same sum by shuffles, one value of each warp through shared memory.
void shuffles(const Params& params) {
  float* sums = static_cast<float*>(shared_memory());
  float value = params.x[blockIdx.x * kThreads + threadIdx.x];
  for (int offset = 16; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(0xFFFFFFFFu, value, offset);
  }
  if (threadIdx.x % 32 == 0) {
    sums[threadIdx.x / 32] = value;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    params.y[blockIdx.x] = sums[0] + sums[1];
  }
}

void exits_early(const Params& params) {
  if (threadIdx.x == 5) {
    return;
  }
  __syncthreads();
  params.y[0] = 0.0f;
}

void two_places(const Params&) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

void lane_elsewhere(const Params& params) {
  if (threadIdx.x % 32 == 7) {
    __syncwarp();
  } else {
    params.y[0] = __shfl_sync(0xFFFFFFFFu, 1.0f, 0);
  }
}

// Both halves of a warp shuffle on their own: allowed.
void halves(const Params& params) {
  const unsigned lane = threadIdx.x % 32;
  int value = static_cast<int>(lane);
  if (lane < 16) {
    value = __shfl_down_sync(0x0000FFFFu, value, 1, 16);
  } else {
    value = __shfl_up_sync(0xFFFF0000u, value, 1, 16);
  }
  if (threadIdx.x < 32 && blockIdx.x == 0) {
    params.y[lane] = static_cast<float>(value);
  }
}

// CTA 1 sums what CTAs 0 and 2 hand it. With kWrongNonce it waits for what nobody publishes.
template <bool kWrongNonce, bool kEarly>
void chain(const Params& params) {
  constexpr uint64_t kNonce = 0x123456789ABCDEFu;
  const unsigned block = blockIdx.x;
  if (block != 1) {
    if (kEarly && threadIdx.x == 0) {
      publish(params.flags + block, kNonce);
    }
    params.y[block * kThreads + threadIdx.x] = params.x[block * kThreads + threadIdx.x];
    __syncthreads();
    if (!kEarly && threadIdx.x == 0) {
      publish(params.flags + block, kNonce);
    }
    return;
  }
  if (threadIdx.x < 2) {
    wait_until_published(params.flags + 2 * threadIdx.x, kNonce + kWrongNonce);
  }
  __syncthreads();
  params.y[kThreads + threadIdx.x] = params.y[threadIdx.x] + params.y[2 * kThreads + threadIdx.x];
}

// Each CTA of a cluster of three reads what its neighbour holds in shared memory.
template <bool kStays>
void neighbours(const Params& params) {
  static_cast<float*>(simt::shared_memory())[threadIdx.x] = params.x[blockIdx.x * kThreads + threadIdx.x];
  simt::cluster_arrive();
  simt::cluster_wait();
  const unsigned other = (simt::cluster_rank() + 1) % simt::cluster_size();
  const uint32_t address = simt::shared_address(static_cast<float*>(simt::shared_memory_of(other)) + threadIdx.x);
  params.y[blockIdx.x * kThreads + threadIdx.x] = *static_cast<float*>(simt::shared_pointer(address));
  if (kStays) {
    simt::cluster_arrive();
    simt::cluster_wait();
  }
}

// An engine copies x to shared memory and then sets a flag there. Without the wait the copy may come too late.
template <bool kWaits>
void engine(const Params& params) {
  float* stage = static_cast<float*>(shared_memory());
  volatile float* arrived = stage + kThreads;
  if (threadIdx.x == 0) {
    *arrived = 0.0f;
    const float* source = params.x + blockIdx.x * kThreads;
    simt::defer("copy", [=] {
      std::copy(source, source + kThreads, stage);
      *arrived = 1.0f;
    });
  }
  __syncthreads();
  if (kWaits) {
    simt::block_until([=] { return *arrived == 1.0f; }, "the copy's arrival");
  }
  params.y[blockIdx.x * kThreads + threadIdx.x] = stage[threadIdx.x];
}

void leaves_engine_running(const Params& params) {
  if (threadIdx.x == 0) {
    simt::defer("copy", [] {});
    simt::finish_deferred(nullptr);
    simt::defer("late copy", [] {});
  }
  params.y[blockIdx.x * kThreads + threadIdx.x] = 0.0f;
}

// 32 of the 64 threads produce, the others consume, twice through one slot each.
void named_barriers(const Params& params) {
  float* slot = static_cast<float*>(shared_memory());
  const unsigned lane = threadIdx.x % 32;
  for (unsigned turn = 0; turn < 2; ++turn) {
    const unsigned at = blockIdx.x * kThreads + 32 * turn + lane;
    if (threadIdx.x < 32) {
      if (turn > 0) {
        simt::barrier_sync(2, kThreads);
      }
      slot[lane] = params.x[at];
      simt::barrier_arrive(1, kThreads);
    } else {
      simt::barrier_sync(1, kThreads);
      params.y[at] = slot[31 - lane];
      if (turn == 0) {
        simt::barrier_arrive(2, kThreads);
      }
    }
  }
}

void counts(const Params& params) {
  atomicAdd(reinterpret_cast<unsigned*>(params.flags), 1u);
  const unsigned votes = __ballot_sync(0xFFFFFFFFu, threadIdx.x % 3 == 0);
  const int largest = __reduce_max_sync(0xFFFFFFFFu, static_cast<int>(threadIdx.x));
  if (blockIdx.x == 0) {
    params.y[threadIdx.x] = static_cast<float>(__popc(votes) * 100 + largest);
  }
}

// What thread 0 of CTA 0 finds when it starts: how much of its work CTA 2 has done.
void overtaken(const Params& params) {
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    params.y[0] = static_cast<float>(*params.flags);
  }
  for (int i = 0; blockIdx.x == 2 && i < 4; ++i) {
    atomicAdd(params.flags, 1);
  }
}

// The most that it finds in 200 schedules.
void test_overtaking(const simt::Arguments& arguments) {
  simt::Buffer y("y", 192 * sizeof(float)), flags("flags", sizeof(uint64_t));
  float most = 0;
  for (uint64_t seed = 0; seed < 200; ++seed) {
    *flags.data<uint64_t>() = 0;
    simt::Config config;
    config.grid = {3};
    config.block = {kThreads};
    config.seed = seed;
    simt::launch(config, [&] { overtaken({nullptr, y.data<float>(), flags.data<uint64_t>()}); });
    most = std::max(most, *y.data<float>());
  }
  *y.data<float>() = most;
  arguments.write(y);
}

template <int kOffset>
void writes_at(const Params& params) {
  if (threadIdx.x == 0 && blockIdx.x == 0) {
    params.y[kOffset] = 1.0f;
  }
}

void shared_overflow(const Params&) {
  static_cast<float*>(shared_memory())[kThreads + 32 + threadIdx.x] = 0.0f;
}

void misaligned(const Params& params) {
  const uint4 value = *reinterpret_cast<const uint4*>(params.x + 1);
  params.y[0] = __uint_as_float(value.x);
}

void writes_input(const Params& params) {
  const_cast<float*>(params.x)[0] = 3.0f;
}

// The last of all threads to come writes: another one in each schedule.
void depends_on_schedule(const Params& params) {
  __syncthreads();
  params.y[0] = params.x[threadIdx.x];
}

void test(const simt::Arguments& arguments) {
  const std::map<std::string, void (*)(const Params&)> kernels = {
      {"tree", tree<true>}, {"tree_unsynced", tree<false>}, {"shuffles", shuffles}, {"exits_early", exits_early},
      {"two_places", two_places}, {"lane_elsewhere", lane_elsewhere}, {"halves", halves},
      {"chain", chain<false, false>}, {"chain_wrong", chain<true, false>}, {"chain_early", chain<false, true>},
      {"neighbours", neighbours<true>}, {"neighbours_leave", neighbours<false>}, {"engine", engine<true>},
      {"engine_unwaited", engine<false>}, {"leaves_engine_running", leaves_engine_running},
      {"named_barriers", named_barriers}, {"counts", counts}, {"writes_behind", writes_at<192>},
      {"writes_slack", writes_at<-1>}, {"writes_far", writes_at<100000>}, {"shared_overflow", shared_overflow},
      {"misaligned", misaligned}, {"writes_input", writes_input}, {"depends_on_schedule", depends_on_schedule}};
  if (arguments.text("kernel") == "overtaken") {
    return test_overtaking(arguments);
  }
  const auto kernel = kernels.at(arguments.text("kernel"));
  simt::Buffer x = arguments.input("x"), y("y", 192 * sizeof(float)), flags("flags", 3 * sizeof(uint64_t));
  simt::run_schedules(arguments, {&x}, {&y}, [&](uint64_t seed) {
    simt::Config config;
    config.grid = {3};
    config.block = {kThreads};
    config.cluster = {static_cast<unsigned>(arguments.integer("cluster"))};
    config.resident_ctas = static_cast<unsigned>(arguments.integer("resident"));
    config.shared_bytes = (kThreads + 32) * sizeof(float);
    config.seed = seed;
    std::memset(flags.data<char>(), 0, flags.bytes());
    const Params params{x.data<const float>(), y.data<float>(), flags.data<uint64_t>()};
    simt::launch(config, [&] { kernel(params); });
    flags.check();
    if (arguments.text("kernel") == "counts" && *flags.data<unsigned>() != 192) {
      throw simt::Error("an atomicAdd was lost");
    }
  });
}

int main(int argc, char** argv) {
  return simt::main_of(argc, argv, test);
}
"""


@pytest.fixture(scope="module")
def program() -> Path:
    return build.build(PROGRAM)


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.arange(CTAS * THREADS, dtype=torch.float32) - 50


def _run(program: Path, x: Tensor, kernel: str, schedules: int = 30, cluster: int = 1, resident: int = 0) -> Tensor:
    shape = {"y": ((CTAS * THREADS,), torch.float32)}
    return build.run(program, {"x": x}, shape, schedules, kernel=kernel, cluster=cluster, resident=resident)["y"]


@pytest.mark.parametrize("kernel", ["tree", "shuffles"])
def test_reductions(program: Path, x: Tensor, kernel: str) -> None:
    y = _run(program, x, kernel)
    assert torch.equal(y[:CTAS], x.view(CTAS, THREADS).sum(1))
    assert y[CTAS:].isnan().all()  # poison


@pytest.mark.thorough
def test_other_stacks(x: Tensor) -> None:
    """What machines other than x86-64 use."""
    program = build.build(PROGRAM, "SIMT_UCONTEXT")
    assert torch.equal(_run(program, x, "tree")[:CTAS], x.view(CTAS, THREADS).sum(1))
    with pytest.raises(build.SimtError, match="deadlock"):
        _run(program, x, "exits_early")


def test_missing_syncthreads_is_caught(program: Path, x: Tensor) -> None:
    with pytest.raises(build.SimtError, match="bits of y differ between schedules"):
        _run(program, x, "tree_unsynced")


def test_missing_syncthreads_is_caught_without_a_second_schedule(program: Path, x: Tensor) -> None:
    expected = x.view(CTAS, THREADS).sum(1)
    shape = {"y": ((CTAS * THREADS,), torch.float32)}
    wrong = 0
    for seed in range(8):
        arguments = {"kernel": "tree_unsynced", "cluster": 1, "resident": 0}
        y = build.run(program, {"x": x}, shape, schedules=1, first_seed=seed, **arguments)["y"]
        wrong += not torch.equal(y[:CTAS], expected)
    assert wrong >= 6


@pytest.mark.parametrize(
    ("kernel", "report"),
    [
        ("exits_early", r"deadlock.*threads 0 to 4: waits at __syncthreads.*\n.*threads 5 to 5: exited"),
        ("two_places", r"divergence: comes to __syncthreads \(.*cpp:\d+\).*others wait at __syncthreads"),
        ("lane_elsewhere", r"divergence: lane \d+ comes to .* while others wait at"),
        ("chain_wrong", r"deadlock.*CTA 1 threads 0 to 1: is at wait_until_published"),
    ],
)
def test_divergence_and_deadlock_are_caught(program: Path, x: Tensor, kernel: str, report: str) -> None:
    with pytest.raises(build.SimtError, match=f"(?s){report}"):
        _run(program, x, kernel)


def test_halves_of_a_warp_may_shuffle_alone(program: Path, x: Tensor) -> None:
    y = _run(program, x, "halves")
    assert y[:32].tolist() == [*range(1, 16), 15, 16, *range(16, 31)]


@pytest.mark.parametrize("resident", [0, 2])
def test_flags_between_ctas(program: Path, x: Tensor, resident: int) -> None:
    y = _run(program, x, "chain", resident=resident).view(CTAS, THREADS)
    rows = x.view(CTAS, THREADS)
    assert torch.equal(y[1], rows[0] + rows[2])


def test_ctas_that_are_not_resident_deadlock(program: Path, x: Tensor) -> None:
    """CTA 1 waits for CTA 2, which gets no room before CTA 1 ends."""
    with pytest.raises(build.SimtError, match=r"(?s)deadlock.*1 clusters of 1 CTAs have not been dispatched"):
        _run(program, x, "chain", resident=1)


def test_publishing_too_early_is_caught(program: Path, x: Tensor) -> None:
    with pytest.raises(build.SimtError, match="bits of y differ between schedules"):
        _run(program, x, "chain_early", schedules=100)


def test_some_schedules_let_a_block_overtake_another(program: Path, x: Tensor) -> None:
    """A fair scheduler starts every thread long before any block is through with its work."""
    assert _run(program, x, "overtaken")[0] == 4 * THREADS


def test_clusters(program: Path, x: Tensor) -> None:
    y = _run(program, x, "neighbours", cluster=3)
    assert torch.equal(y, x.roll(-THREADS))
    with pytest.raises(build.SimtError, match="of its cluster, which has exited"):
        _run(program, x, "neighbours_leave", cluster=3, schedules=100)


def test_asynchronous_engine(program: Path, x: Tensor) -> None:
    assert torch.equal(_run(program, x, "engine"), x)
    with pytest.raises(build.SimtError, match=r"bits of y differ between schedules|operation of it is under way: copy"):
        _run(program, x, "engine_unwaited", schedules=100)
    with pytest.raises(build.SimtError, match=r"exits while an asynchronous operation of it is under way: late copy"):
        _run(program, x, "leaves_engine_running", schedules=100)


def test_named_barriers(program: Path, x: Tensor) -> None:
    assert torch.equal(_run(program, x, "named_barriers", schedules=100), x.view(-1, 32).flip(1).flatten())


def test_atomics_and_votes(program: Path, x: Tensor) -> None:
    y = _run(program, x, "counts")
    votes = [sum(thread % 3 == 0 for thread in range(first, first + 32)) for first in (0, 32)]
    assert y[:64].tolist() == [votes[0] * 100 + 31] * 32 + [votes[1] * 100 + 63] * 32


@pytest.mark.parametrize(
    ("kernel", "report"),
    [
        ("writes_behind", "access outside every buffer.* by CTA 0 thread 0"),
        ("writes_slack", "a write before y, at byte -4"),
        ("writes_far", "access outside every buffer"),
        ("shared_overflow", "wrote outside its shared memory, at offset 384 of 384 bytes"),
        ("misaligned", "misaligned address"),
        ("writes_input", "the input x was written to"),
        ("depends_on_schedule", "bits of y differ between schedules"),
    ],
)
def test_wrong_accesses_are_caught(program: Path, x: Tensor, kernel: str, report: str) -> None:
    with pytest.raises(build.SimtError, match=report):
        _run(program, x, kernel)


def test_no_compiler_no_test(monkeypatch: pytest.MonkeyPatch) -> None:
    # Neither must remember what an earlier test of this process found.
    monkeypatch.setattr(build, "_toolkit_includes", build._toolkit_includes.__wrapped__)
    monkeypatch.setattr(build.shutil, "which", lambda name, path=None: None)
    with pytest.raises(pytest.skip.Exception, match="there is no nvcc"):
        build.compiler.__wrapped__()
    monkeypatch.setattr(build, "_toolkit_includes", lambda: ())
    with pytest.raises(AssertionError, match=r"there is no g\+\+"):
        build.compiler.__wrapped__()


def test_program_that_does_not_compile_fails() -> None:
    with pytest.raises(AssertionError, match="error:"):
        build.build("__shared__ float sums[64];")
