"""The harness's maths and its order of doing things; its CUDA path runs on stand-ins for events and graphs."""

from __future__ import annotations

import copy
import dataclasses
import resource
import signal
import types
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import peft_kernels as pk
from benchmarks import environment, harness, memory, record, timing
from benchmarks.family import Call, Family, Provider, Work, discover
from benchmarks.roofline import Ceilings
from benchmarks.timing import Runner
from peft_kernels._core import extension
from peft_kernels._core.operator import OPERATORS
from peft_kernels.four_bit_weight import problem as four_bit_weight

MIB = 1 << 20
FLOATS = MIB // 4


class FakeClock:
    """Time passes only where a fake runner lets it pass."""

    def __init__(self) -> None:
        self.now = 0.0
        self.finished = False

    def mark(self) -> float:
        return self.now

    def finish(self) -> None:
        self.finished = True

    def elapsed_us(self, start: float, stop: float) -> float:
        assert self.finished
        return stop - start


@pytest.mark.parametrize("count", [1, 2, 5, 10, 37])
@pytest.mark.parametrize("q", [0.0, 0.2, 0.5, 0.8, 1.0])
def test_quantile_is_torchs(count: int, q: float) -> None:
    values = torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(count))
    assert timing.quantile(values.tolist(), q) == pytest.approx(torch.quantile(values, q).item(), rel=1e-12)


def test_quantile_of_nothing() -> None:
    with pytest.raises(ValueError, match="no values"):
        timing.quantile([], 0.5)


@pytest.mark.parametrize("set_bytes", [1, 1000, 33 << 20, 60 << 20, 1 << 30])
def test_rotated_sets_exceed_twice_the_cache(set_bytes: int) -> None:
    cache = 50 << 20
    sets = timing.set_count(set_bytes, cache, memory_bytes=1 << 40)
    assert sets >= 2
    assert (sets - 1) * set_bytes > 2 * cache or set_bytes > cache
    # One less would not do.
    assert sets == 2 or (sets - 2) * set_bytes <= 2 * cache


def test_rotated_sets_fit_into_the_memory() -> None:
    assert timing.set_count(1 << 20, 1 << 30, memory_bytes=40 << 20) == 10
    assert timing.set_count(1 << 30, 1 << 20, memory_bytes=1 << 30) == 2


@pytest.mark.parametrize("sets", [1, 2, 3, 7, 300])
@pytest.mark.parametrize("call_us", [0.0, 1.0, 99.0, 1e6])
def test_every_set_is_called_equally_often(sets: int, call_us: float) -> None:
    calls = timing.calls_per_turn(call_us, sets, target_us=2000.0)
    assert calls % sets == 0
    assert sets <= calls <= max(sets, timing.MAX_CALLS)
    assert calls * call_us >= 2000.0 or calls + sets > timing.MAX_CALLS


def test_repetition_count_stays_in_bounds() -> None:
    assert timing.repetition_count(100.0, 1000.0, least=5, most=200) == 10
    assert timing.repetition_count(1e9, 1000.0, least=5, most=200) == 5
    assert timing.repetition_count(0.0, 1000.0, least=5, most=200) == 200


def test_each_provider_goes_first_equally_often() -> None:
    orders = list(timing.turns(["a", "b", "c"], 6))
    assert orders[:4] == [("a", "b", "c"), ("b", "c", "a"), ("c", "a", "b"), ("a", "b", "c")]
    assert [order[0] for order in orders].count("b") == 2
    assert list(timing.turns([], 2)) == [(), ()]


def test_interleave_takes_turns_and_divides_by_calls() -> None:
    clock, log = FakeClock(), []

    def runner(name: str, us: float, calls: int) -> Runner:
        def run() -> None:
            log.append(name)
            clock.now += us

        return Runner(run, calls, "host")

    samples = timing.interleave({"a": runner("a", 10.0, 2), "b": runner("b", 9.0, 3)}, 3, clock)
    assert log == ["a", "b", "b", "a", "a", "b"]
    assert samples == {"a": [5.0] * 3, "b": [3.0] * 3}


def test_interleave_restores_the_garbage_collector_after_an_error() -> None:
    import gc

    def fail() -> None:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        timing.interleave({"a": Runner(fail, 1, "host")}, 1, FakeClock())
    assert gc.isenabled()


def test_summarize() -> None:
    found = timing.summarize(Runner(lambda: None, 4, "events", "why"), [5.0, 1.0, 3.0, 2.0, 4.0])
    assert (found.median_us, found.repetitions, found.calls, found.timing, found.note) == (3.0, 5, 4, "events", "why")
    assert found.p20_us == pytest.approx(1.8)
    assert found.p80_us == pytest.approx(4.2)


def test_host_timing_rotates_over_the_sets() -> None:
    counts = [0, 0, 0]

    def call(index: int) -> None:
        counts[index] += 1

    found = timing.time_on_host({"a": [lambda i=i: call(i) for i in range(3)]}, target_us=2000.0, least=4)
    assert found["a"].timing == "host"
    assert found["a"].repetitions >= 4
    assert max(counts) - min(counts) <= 1


class FakeCuda:
    """Stands in for what the CUDA path uses of torch.cuda; a call lasts 100 us, a launch gap 10 more."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, captures: bool) -> None:
        self.now, self.captures, self.capturing, self.calls, self.replays = 0.0, captures, False, 0, 0
        outer = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = outer.now

            def elapsed_time(self, other: Event) -> float:
                return (other.at - self.at) / 1e3

        class CUDAGraph:
            recorded = 0

            def replay(self) -> None:
                outer.replays += 1
                outer.now += 100.0 * self.recorded

        @contextmanager
        def graph(target: CUDAGraph, pool: object, stream: object):
            assert (pool, stream) == ("pool", "stream")
            outer.capturing, before = True, outer.calls
            try:
                yield
            finally:
                outer.capturing = False
            if not outer.captures:
                raise RuntimeError("operation not permitted when stream is capturing\nmore")
            target.recorded = outer.calls - before

        fakes = {"Event": Event, "CUDAGraph": CUDAGraph, "graph": graph}
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: "stream")
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")

    def call(self) -> None:
        self.calls += 1
        if not self.capturing:
            self.now += 110.0


def test_cuda_timing_replays_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch, captures=True)
    found = timing.time_on_cuda({"a": [cuda.call] * 3, "b": [cuda.call] * 3}, target_us=21_000.0, least=5)
    for one in found.values():
        assert (one.timing, one.note) == ("graph", None)
        assert one.median_us == pytest.approx(100.0)
        assert one.calls == 21  # 2 ms of calls that seem to last 110 us, in threes
        assert one.repetitions == 10
    assert cuda.replays == 2 * (10 + 1)


def test_cuda_timing_falls_back_to_events_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch, captures=False)
    found = timing.time_on_cuda({"a": [cuda.call] * 2}, target_us=1000.0, least=5)["a"]
    assert found.timing == "events"
    assert found.note == "not captured: RuntimeError: operation not permitted when stream is capturing"
    assert found.median_us == pytest.approx(110.0)


@pytest.mark.gpu
def test_graph_and_event_times_agree_on_a_large_product() -> None:
    a = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda.synchronize()
        found = timing.time_on_cuda({"graph": [lambda: a @ a] * 2}, target_us=50_000.0, least=10)["graph"]
        assert found.timing == "graph"
        clock = timing.EventClock()
        samples = timing.interleave({"events": Runner(lambda: a @ a, 1, "events")}, 20, clock)["events"]
    assert found.median_us == pytest.approx(timing.quantile(samples, 0.5), rel=0.3)


def test_running_peak() -> None:
    assert memory.running_peak([]) == 0
    assert memory.running_peak([5, -5, 3, 4, -1]) == 7
    assert memory.running_peak([-5, 3], base=10) == 10


def _chain() -> torch.Tensor:
    a = torch.zeros(FLOATS)
    b = a + 1
    del a
    c = b * 2
    del b
    return c


def _side_by_side() -> torch.Tensor:
    a, b, c = (torch.zeros(FLOATS) for _ in range(3))
    return torch.stack([a, b, c])


@pytest.mark.parametrize(("function", "mib"), [(_chain, 2), (_side_by_side, 6), (lambda: None, 0)])
def test_peak_memory_of_known_functions(function, mib: int) -> None:
    # Numbers in the operations are tensors of a few bytes for a moment.
    assert 0 <= memory.peak_bytes(function, torch.device("cpu")) - mib * MIB < 64


def test_peak_memory_of_a_backward_pass_counts_what_the_forward_pass_keeps() -> None:
    x, dy = torch.ones(FLOATS, requires_grad=True), torch.ones(FLOATS)
    kept: list[torch.Tensor] = []

    def backward() -> object:
        return torch.autograd.grad(kept[0], x, dy)

    # exp keeps its result, which is the output; its gradient is a second one.
    peak = memory.peak_bytes(backward, torch.device("cpu"), before=lambda: kept.append(x.exp()))
    assert peak == 2 * MIB


@pytest.mark.gpu
def test_peak_memory_on_cuda() -> None:
    def chain() -> torch.Tensor:
        return (torch.zeros(FLOATS, device="cuda") + 1) * 2

    chain()
    assert memory.peak_bytes(chain, torch.device("cuda", torch.cuda.current_device())) == 2 * MIB


@dataclass(frozen=True)
class ToyProblem:
    m: int
    p: float = 0.0


def _make(scale: float, problem: ToyProblem, inputs: torch.Tensor) -> Call:
    return Call(lambda: inputs * scale, (inputs,), torch.ones_like(inputs))


class ToyRefusal(Exception):
    pass


def _refuse(problem: ToyProblem, inputs: torch.Tensor) -> Call:
    raise ToyRefusal("too\n small")


def _check(provider: Provider, problem: ToyProblem, inputs: torch.Tensor) -> dict[str, float]:
    y = provider.make(problem, inputs).apply()
    return {"y": ((y - 2 * inputs).norm() / (2 * inputs).norm()).item()}


TOY = Family(
    name="toy",
    problems=lambda grid: [ToyProblem(4), ToyProblem(8)],
    modes=lambda problem: ("forward", "backward", "both"),
    make_inputs=lambda problem, device, seed: torch.full((problem.m,), seed + 1.0, device=device, requires_grad=True),
    input_bytes=lambda problem: 1 << 30,
    work=lambda problem, mode, provider: Work(8 * problem.m, problem.m),
    dtype=lambda problem: torch.float32,
    providers=(
        Provider("base", "limit", lambda *_: None, lambda problem, inputs: _make(2.0, problem, inputs)),
        Provider("peft", "baseline", lambda *_: None, lambda problem, inputs: _make(2.0, problem, inputs)),
        Provider("other", "baseline", lambda *_: "not here", _refuse),
        Provider("ours_refusing", "ours", lambda *_: None, _refuse, (ToyRefusal,)),
        Provider("ours_broken", "ours", lambda *_: None, _refuse),
        Provider("ours_wrong", "ours", lambda *_: None, lambda problem, inputs: _make(2.1, problem, inputs)),
        Provider("ours_nan", "ours", lambda *_: None, lambda problem, inputs: _make(float("nan"), problem, inputs)),
    ),
    summarize_by=("p",),
    checker=lambda problem, inputs: lambda provider: _check(provider, problem, inputs),
)

HEADER = {
    "schema": record.SCHEMA,
    "run": "2026-01-01T00:00:00+00:00",
    "commit": "c" * 40,
    "dirty": False,
    "sources": "0123456789abcdef",
    "device": {"type": "cpu", "name": "Toy CPU", "cache_bytes": 1, "memory_bytes": 1 << 40},
    "versions": {"torch": "2"},
    "ceilings": {"copy_bytes_per_s": 1e12, "matmul_flops_per_s": {"float32": 1e12}},
}


@pytest.fixture(scope="module")
def session() -> harness.Session:
    return harness.Session(torch.device("cpu"), True, Ceilings(1e12, {"float32": 1e12}), HEADER)


@pytest.fixture(scope="module")
def measured(session: harness.Session) -> list[dict]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(harness.TARGET_US, "cpu", 5000.0)
        return harness.measure_problem(TOY, ToyProblem(4), session)


def test_each_provider_and_mode_has_a_valid_record(measured: list[dict]) -> None:
    assert len(measured) == 3 * len(TOY.providers)
    for line in measured:
        record.check(line)


def test_statuses_tell_refusals_from_failures(measured: list[dict]) -> None:
    found = {line["provider"]: (line["status"], line["reason"]) for line in measured}
    assert found["base"] == ("ok", None)
    assert found["other"] == ("skipped", "not here")
    assert found["ours_refusing"] == ("skipped", "ToyRefusal: too small")
    assert found["ours_broken"] == ("failed", "ToyRefusal: too small")
    for name in ("ours_wrong", "ours_nan"):
        assert found[name][0] == "failed"
        assert "wrong result" in found[name][1]


def test_what_is_left_out_is_not_run(session: harness.Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(harness.TARGET_US, "cpu", 1000.0)
    names = frozenset(provider.name for provider in TOY.providers) - {"base"}
    records = harness.measure_problem(TOY, ToyProblem(4), dataclasses.replace(session, without=names))
    assert {line["provider"] for line in records if line["status"] == "ok"} == {"base"}
    assert {line["reason"] for line in records if line["provider"] == "ours_broken"} == {"left out with --without"}


def test_a_problem_that_does_not_fit_is_recorded(session: harness.Session, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill_up(*_: object) -> None:
        raise torch.OutOfMemoryError("tried to allocate")

    monkeypatch.setattr(harness, "time_on_host", fill_up)
    records = harness.measure_problem(TOY, ToyProblem(4), session)
    for line in records:
        record.check(line)
    assert not any(line["status"] == "ok" for line in records)
    assert "side by side" in records[0]["reason"]


def test_measured_fields(measured: list[dict]) -> None:
    (line,) = [line for line in measured if (line["provider"], line["mode"]) == ("peft", "forward")]
    assert (line["bytes"], line["flops"]) == (32, 4)
    assert line["roofline_us"] == pytest.approx(32e-6)
    assert line["roofline_fraction"] == pytest.approx(32e-6 / line["median_us"])
    assert 4 * 4 <= line["peak_memory_bytes"] < 4 * 4 + 64
    assert line["error"] == {"y": 0.0}
    assert line["timing"] == "host"


def test_forward_has_no_graph_and_backward_keeps_it() -> None:
    x = torch.ones(3, requires_grad=True)
    call = Call(lambda: x * x, (x,), torch.ones(3))
    assert not harness.closures(call, "forward")().requires_grad
    backward = harness.closures(call, "backward")
    assert torch.equal(backward()[0], backward()[0])
    y, dx = harness.closures(call, "both")()
    assert y.requires_grad
    assert torch.equal(dx, 2 * x)
    assert x.grad is None


def test_resume_leaves_out_what_this_commit_has(measured: list[dict], session: harness.Session) -> None:
    problems = TOY.problems(None)
    assert harness.remaining(problems, measured, session) == [ToyProblem(8)]
    changes = (("commit", "d" * 40), ("dirty", True), ("sources", "other"), ("versions", {"torch": "3"}))
    for field, value in changes:
        assert harness.remaining(problems, [{**line, field: value} for line in measured], session) == problems
    without = [{name: value for name, value in line.items() if name != "sources"} for line in measured]
    assert harness.remaining(problems, without, session) == problems


def test_resume_asks_again_for_what_an_earlier_run_left_out(measured: list[dict], session: harness.Session) -> None:
    problems = TOY.problems(None)
    left_out = [
        {**line, "status": "skipped", "reason": "left out with --without"} if line["provider"] == "peft" else line
        for line in measured
    ]
    assert harness.remaining(problems, left_out, session) == problems
    as_before = dataclasses.replace(session, without=frozenset({"peft"}))
    assert harness.remaining(problems, left_out, as_before) == [ToyProblem(8)]
    later = [{**line, "run": "2026-01-02T00:00:00+00:00"} for line in measured]
    assert harness.remaining(problems, [*left_out, *later], session) == [ToyProblem(8)]


def test_budget_stops_before_a_problem_that_would_not_end_in_it() -> None:
    now = [0.0]
    ran = []
    for seconds in harness.within_budget([4.0, 1.0, 3.0, 1.0], 10.0, now=lambda: now[0]):
        now[0] += seconds
        ran.append(seconds)
    # After 5 s the longest took 4 s, so a third starts; after 8 s another of 4 s would end too late.
    assert ran == [4.0, 1.0, 3.0]
    assert list(harness.within_budget([1, 2], None)) == [1, 2]


def test_records_survive_a_round_trip_and_are_only_appended(measured: list[dict], tmp_path) -> None:
    target = record.path(tmp_path, "toy-cpu", "toy")
    record.append(target, measured)
    record.append(target, measured[:1])
    assert record.load(target) == [*measured, measured[0]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 99}, "schema is 99"),
        ({"status": "fine"}, "unknown"),
        ({"mode": "sideways"}, "mode is 'sideways'"),
        ({"median_us": None}, "median_us is None"),
        ({"median_us": 0.0}, "p20 <= median"),
        ({"repetitions": True}, "repetitions is True"),
        ({"reason": "because"}, "a reason belongs"),
        ({"extra": 1}, "extra is unknown"),
    ],
)
def test_a_wrong_record_is_refused(measured: list[dict], change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        record.check({**measured[0], **change})


def test_every_field_is_demanded(measured: list[dict]) -> None:
    for name in measured[0]:
        if name in ("status", "sources"):  # the oldest records do not say of which sources they are
            continue
        line = copy.copy(measured[0])
        del line[name]
        with pytest.raises(ValueError, match=f"{name} is missing"):
            record.check(line)


def test_nothing_is_written_if_one_record_is_wrong(measured: list[dict], tmp_path) -> None:
    target = tmp_path / "toy.jsonl"
    with pytest.raises(ValueError, match="schema"):
        record.append(target, [measured[0], {**measured[0], "schema": 99}])
    assert not target.exists()


def test_load_names_the_line(measured: list[dict], tmp_path) -> None:
    target = tmp_path / "toy.jsonl"
    record.append(target, measured[:1])
    whole = target.read_text()
    for text, message in (
        ("[1]", r"must be an object, got \[1\]"),
        ("null", "got null"),
        ('{"a": 1}', "schema is missing"),
    ):
        target.write_text(f"{whole}{text}\n")
        with pytest.raises(ValueError, match=rf"toy\.jsonl:2: .*{message}"):
            record.load(target)


@pytest.mark.parametrize("left", [1, 40, 200])
def test_a_torn_line_costs_no_other(measured: list[dict], tmp_path, left: int) -> None:
    """As a run leaves it that is killed inside its write."""
    target = tmp_path / "toy.jsonl"
    record.append(target, measured[:2])
    whole = target.read_bytes().splitlines(keepends=True)
    target.write_bytes(whole[0] + whole[1][:left])
    record.append(target, measured[1:2])
    with pytest.warns(UserWarning, match=r"toy\.jsonl:2: torn, left out"):
        assert record.load(target) == measured[:2]


def test_a_write_that_fails_leaves_the_file_as_it_was(measured: list[dict], tmp_path) -> None:
    target = tmp_path / "toy.jsonl"
    record.append(target, measured[:1])
    before, (soft, hard) = target.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 40, hard))
    try:
        with pytest.raises(OSError, match=r"written to its end|too large"):
            record.append(target, measured[:1])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert target.read_bytes() == before


def test_discover_finds_every_operator_by_its_file() -> None:
    found = discover()
    assert all(name == family.name for name, family in found.items())
    # Tests declare others, which the package does not have; of those that are run by way of others one has its own.
    named = {four_bit_weight.NAME, "lora_rows"}
    assert set(found) == {name for name in OPERATORS if hasattr(pk, name) or name in named}


def test_slug() -> None:
    assert environment.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    assert environment.slug("AMD EPYC (TM) 9654") == "amd-epyc-tm-9654"


def test_sources_are_told_apart_by_their_contents(tmp_path: Path) -> None:
    """In a copied tree, which has no git, nothing else tells."""

    def write(name: str, text: str) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return environment.sources(tmp_path)

    states = [
        write("peft_kernels/a.py", "x = 1"),
        write("peft_kernels/a.py", "x = 2"),
        write("csrc/k.cu", "k"),
        write("tests/test_it.py", "t"),
    ]
    assert len(set(states)) == len(states)
    # Results, and what a build or an interpreter leaves behind, are no sources.
    for name in ("benchmarks/results/cpu/x.jsonl", "peft_kernels/__pycache__/a.pyc", "peft_kernels/_C.so", "a.md"):
        assert write(name, "new") == states[-1]
    assert write("peft_kernels/a.py", "x = 1") not in states
    moved = environment.sources(tmp_path)
    (tmp_path / "peft_kernels/a.py").rename(tmp_path / "peft_kernels/b.py")
    assert environment.sources(tmp_path) != moved


def test_what_the_extension_was_built_for_is_a_version(monkeypatch: pytest.MonkeyPatch) -> None:
    record = {"built": True, "archs": ["80", "90a"], "nvcc": "13.0.88"}
    monkeypatch.setattr(extension, "build_record", lambda: record)
    assert environment.versions()["extension"] == "80+90a, nvcc 13.0.88"
    for changes in ({"built": False}, {"archs": []}):
        monkeypatch.setattr(extension, "build_record", lambda changes=changes: {**record, **changes})
        assert environment.versions()["extension"] in (None, "host, nvcc 13.0.88")

    def none() -> None:
        raise FileNotFoundError

    monkeypatch.setattr(extension, "build_record", none)
    assert environment.versions()["extension"] is None


def test_a_tool_that_is_not_there_gives_none() -> None:
    assert environment._output(["no-such-tool-at-all"]) is None
    assert environment._number("1980") == 1980.0
    assert environment._number("[N/A]") is None


def test_clocks_are_read_from_the_driver_tool(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = types.SimpleNamespace(
        uuid="1234", name="G", major=9, minor=0, total_memory=5, L2_cache_size=6, multi_processor_count=7
    )
    commands = []

    def answer(command: list[str]) -> str:
        commands.append(command)
        return "570.1, 1500, 1980, 2619"

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(environment, "matmul_operands", lambda device, dtype: (torch.ones(1, 1), torch.ones(1, 1)))
    monkeypatch.setattr(environment, "_output", answer)
    found = environment.describe_device(torch.device("cuda"))
    assert "--id=GPU-1234" in commands[0]
    assert (found["driver"], found["sm_clock_mhz"], found["max_sm_clock_mhz"]) == ("570.1", 1500.0, 1980.0)
    assert set(found) == set(environment.describe_device(torch.device("cpu")))
