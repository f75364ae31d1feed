"""The benchmark of groups: the least work, what is checked against the oracle, and the shapes of the grids."""

from __future__ import annotations

import dataclasses
from dataclasses import replace

import pytest
import torch

pytest.importorskip("peft")

import peft_kernels as pk
from benchmarks import harness, lora, lora_group, shapes, tables, tune
from benchmarks.family import Grid, Provider, Work, discover
from benchmarks.roofline import Ceilings
from tests.benchmarks.test_harness import HEADER

CPU = torch.device("cpu")
PROVIDERS = {provider.name: provider for provider in lora_group.FAMILY.providers}
KNOWN = ("calls_torch", "ours_auto", "ours_torch")
F32 = {"dtype": "float32", "adapter_dtype": "float32"}
TINY = lora_group.Problem("m", "q,k,v", "40+24+8", m=24, k=32, r=5, p=0.0, **F32)
LARGE = replace(TINY, n="4096+1024+1024", m=8192, k=4096, r=16, dtype="bfloat16", adapter_dtype="bfloat16")
MODES = ("forward", "backward", "both")


def _bytes(*tensors: torch.Tensor) -> int:
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors)


def test_forward_bytes_are_the_tensors() -> None:
    for problem in (TINY, replace(TINY, dtype="bfloat16"), replace(TINY, n="8+8")):
        x, weights, lora_a, lora_b, dys = lora_group.make_inputs(problem, CPU, seed=0)
        # dY_j is not read, y_j of the same size is written.
        size = _bytes(x, *weights, *lora_a, *lora_b, *dys)
        assert lora_group.input_bytes(problem) == size
        assert lora_group.work(problem, "forward", PROVIDERS["peft"]).bytes == size


def test_backward_bytes_are_the_tensors() -> None:
    """x and each dY_j once, dX once."""
    x, weights, lora_a, lora_b, dys = lora_group.make_inputs(TINY, CPU, seed=0)
    size = _bytes(*dys, x, *weights, *lora_a, *lora_b) + _bytes(x, *lora_a, *lora_b)
    s = 4 * TINY.m * TINY.r * 3
    assert lora_group.work(TINY, "backward", PROVIDERS["ours_torch"]).bytes == size + s
    forward = lora_group.work(TINY, "forward", PROVIDERS["ours_torch"]).bytes
    assert lora_group.work(TINY, "both", PROVIDERS["ours_torch"]).bytes == forward + size + 2 * s


def test_bytes_of_the_frozen_layers_are_the_tensors() -> None:
    x, weights, _, _, dys = lora_group.make_inputs(TINY, CPU, seed=0)
    size = _bytes(x, *weights, *dys)
    flops = 2 * 24 * 32 * (40 + 24 + 8)
    # Backward writes dX, which is as large as x.
    found = {mode: lora_group.work(TINY, mode, PROVIDERS["base"]) for mode in MODES}
    assert found == {"forward": Work(size, flops), "backward": Work(size, flops), "both": Work(2 * size, 2 * flops)}


def test_flops_are_those_of_the_products() -> None:
    frozen = 2 * 24 * 32 * (40 + 24 + 8)
    up_and_down = 2 * 24 * 5 * (3 * 32 + 40 + 24 + 8)
    assert lora_group.work(TINY, "forward", PROVIDERS["peft"]).flops == frozen + up_and_down
    assert lora_group.work(TINY, "backward", PROVIDERS["peft"]).flops == frozen + 2 * up_and_down


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["base", "peft"])
def test_one_member_is_a_layer(name: str, mode: str) -> None:
    alone = replace(LARGE, n="4096")
    assert lora_group.work(alone, mode, PROVIDERS[name]) == lora.work(alone.members[0], mode, PROVIDERS[name])
    assert lora_group.input_bytes(alone) == lora.input_bytes(alone.members[0])


def test_bytes_of_the_design() -> None:
    """Both ways, of an 8B model's q, k and v: y 101 MB and W 50, twice; x, x and dX 67 each; factors and S little."""
    work = lora_group.work(LARGE, "both", PROVIDERS["ours_triton"])
    assert work.bytes / 1e6 == pytest.approx(2 * (100.7 + 50.3) + 3 * 67.1 + 4, abs=2)
    assert work.flops == pytest.approx(4 * 8192 * 4096 * 6144, rel=0.02)


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("dtypes", [("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float32")])
def test_providers_agree_with_the_oracle(p: float, dtypes: tuple[str, str]) -> None:
    problem = replace(TINY, p=p, dtype=dtypes[0], adapter_dtype=dtypes[1])
    check = lora_group.checker(problem, lora_group.make_inputs(problem, CPU, seed=3))
    for name in ("base", "peft", "addmm", *KNOWN):
        if PROVIDERS[name].why_not(problem, CPU) is not None:
            assert (name, p) == ("addmm", 0.1)
            continue
        errors = check(PROVIDERS[name])
        assert set(errors) == {"y", "dx", "da", "db"}
        for error in errors.values():
            assert (error is not None) == (name != "base" and (p == 0 or name in KNOWN))
            assert error is None or error < (1e-5 if dtypes[0] == "float32" else 1e-2)


def test_frozen_layers_are_torch_s() -> None:
    inputs = lora_group.make_inputs(TINY, CPU, seed=1)
    call = PROVIDERS["base"].make(TINY, inputs)
    ys = call.apply()
    (dx,) = torch.autograd.grad(ys, call.wrt, call.dy)
    for y, weight in zip(ys, inputs.weights, strict=True):
        assert torch.equal(y, inputs.x @ weight.t())
    exact = sum(dy.double() @ weight.double() for dy, weight in zip(inputs.dys, inputs.weights, strict=True))
    # Sums of 72 products of float32 that are added one after another.
    assert torch.allclose(dx.double(), exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("name", KNOWN)
def test_a_wrong_backend_does_not_pass_the_check(name: str, p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = replace(TINY, p=p)
    check = lora_group.checker(problem, lora_group.make_inputs(problem, CPU, seed=3))
    check(PROVIDERS[name])
    # By a factor that is a little too large, or other masks.
    monkeypatch.setattr(lora_group, *(("_CHECK_SEED", 2) if p else ("SCALE", 2.001)))
    with pytest.raises(AssertionError, match="relative error"):
        check(PROVIDERS[name])


@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("name", ["y", "da", "db"])
def test_one_wrong_member_is_seen(name: str, which: int) -> None:
    """A nan too, which Python's max passes over where it stands behind a number."""
    inputs = lora_group.make_inputs(TINY, CPU, seed=3)
    reference = lora_group._reference(TINY, inputs, calls=False)
    exact = reference.oracle[name]
    right = [value.float() for value in exact]
    assert lora_group._largest_error(right, exact) < 1e-6
    for fault in (1.1, float("nan")):
        wrong = [value * fault if index == which else value for index, value in enumerate(right)]
        assert not lora_group._largest_error(wrong, exact) < 0.05


def test_gradient_of_x_is_that_of_all_members(monkeypatch: pytest.MonkeyPatch) -> None:
    check = lora_group.checker(TINY, lora_group.make_inputs(TINY, CPU, seed=3))
    group = pk.lora_group

    def without_the_last(x: torch.Tensor, *arguments: object, **options: object) -> tuple[torch.Tensor, ...]:
        *ys, _ = group(x, *arguments, **options)
        return *ys, group(x.detach(), *arguments, **options)[-1]

    monkeypatch.setattr(pk, "lora_group", without_the_last)
    with pytest.raises(AssertionError, match=r"dx\[0\]"):
        check(PROVIDERS["ours_torch"])


def test_large_problems_are_checked_on_their_first_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(lora._ORACLE_PRODUCTS, "cpu", 1)
    monkeypatch.setattr(lora, "_ORACLE_ROWS", 8)
    problem = replace(TINY, p=0.1)
    check = lora_group.checker(problem, lora_group.make_inputs(problem, CPU, seed=3))
    for name in KNOWN:
        errors = check(PROVIDERS[name])
        assert (errors["da"], errors["db"]) == (None, None)
        assert max(errors["y"], errors["dx"]) < 1e-5


def test_each_member_draws_a_mask_of_its_own() -> None:
    """Calls as well: with one seed for all they would be another function than PEFT's."""
    x, weights, lora_a, lora_b, dys = lora_group.make_inputs(replace(TINY, n="8+8", p=0.5), CPU, seed=0)
    same = lora_group.Inputs(x, (weights[0],) * 2, (lora_a[0],) * 2, (lora_b[0],) * 2, dys)
    for name in KNOWN:
        with torch.no_grad():
            first, second = PROVIDERS[name].make(replace(TINY, n="8+8", p=0.5), same).apply()
        assert not torch.equal(first, second)


def test_compiled_peft_is_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_, graphs = torch.compile, []

    def counting(graph: torch.fx.GraphModule, inputs: object) -> object:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda function, **options: compile_(function, backend=counting, **options))
    torch._dynamo.reset()
    inputs = lora_group.make_inputs(TINY, CPU, seed=0)
    call, eager = (PROVIDERS[name].make(TINY, inputs) for name in ("peft_compiled", "peft"))
    for y, expected in zip(call.apply(), eager.apply(), strict=True):
        assert torch.equal(y, expected)
    assert len(graphs) == 1
    torch._dynamo.reset()


def test_a_problem_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the harness, whose calls have one output elsewhere."""
    monkeypatch.setitem(harness.TARGET_US, "cpu", 1000.0)
    session = harness.Session(CPU, True, Ceilings(1e12, {"float32": 1e12}), HEADER)
    records = harness.measure_problem(lora_group.FAMILY, TINY, session)
    statuses = {line["provider"]: (line["status"], line["reason"]) for line in records}
    for name in ("base", "peft", "addmm", *KNOWN):
        assert statuses[name] == ("ok", None)
    assert not [name for name, (status, _) in statuses.items() if status == "failed"]
    assert {line["mode"] for line in records} == set(MODES)
    comparisons = tables.compare(records)
    assert all(each.speed_up("calls_torch") is not None for each in comparisons)
    assert all(each.best("ours") in ("ours_auto", "ours_torch") for each in comparisons)


def test_a_group_is_beside_what_a_layer_is() -> None:
    """The same baselines and backends, and calls on each backend."""
    backends = [name.removeprefix("ours_") for name in lora_group.FAMILY.names("ours")]
    assert [f"ours_{name}" for name in backends] == lora.FAMILY.names("ours")
    calls = [f"calls_{name}" for name in backends if name != "auto"]
    assert lora_group.FAMILY.names("limit", "baseline") == [*lora.FAMILY.names("limit", "baseline"), *calls]


def test_kernels_are_not_timed_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ours_triton", "calls_triton"):
        triton: Provider = PROVIDERS[name]
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        assert "interpreter" in (triton.why_not(TINY, CPU) or "")
        monkeypatch.delenv("TRITON_INTERPRET")
        assert triton.why_not(TINY, CPU) is None


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
@pytest.mark.parametrize("quick", [False, True])
def test_grids_have_no_problem_twice(device_type: str, quick: bool) -> None:
    grid = lora_group.problems(Grid(device_type, quick))
    assert len(grid) == len(set(grid))
    assert len(grid) > len(lora_group.problems(Grid(device_type, True))) or quick
    assert {problem.p for problem in grid} == set(shapes.DROPOUTS)
    assert any(problem.adapter_dtype != problem.dtype for problem in grid)
    assert {lora_group.modes(problem) for problem in grid} == {("forward",), MODES}
    assert {len(problem.widths) for problem in grid} == ({3} if quick and device_type == "cpu" else {2, 3})


def test_the_full_grid_covers_models_tokens_and_ranks() -> None:
    grid = lora_group.problems(Grid("cuda", False))
    assert {problem.model for problem in grid} == {model.name for model in shapes.GROUPED}
    assert {problem.m for problem in grid} == set(shapes.TOKENS)
    assert {problem.r for problem in grid} == set(shapes.RANKS)


def test_groups_follow_the_configs() -> None:
    found = {(group.model, group.name): (group.k, group.n) for m in shapes.GROUPED for group in shapes.groups(m)}
    assert found["Llama-3-8B", "q,k,v"] == (4096, (4096, 1024, 1024))
    assert found["Llama-3-70B", "q,k,v"] == (8192, (8192, 1024, 1024))
    assert found["Llama-3.2-1B", "q,k,v"] == (2048, (2048, 512, 512))
    assert found["Qwen2.5-7B", "gate,up"] == (3584, (18944, 18944))
    assert found["Qwen2.5-32B", "q,k,v"] == (5120, (5120, 1024, 1024))
    assert found["Qwen2.5-32B", "gate,up"] == (5120, (27648, 27648))


def test_a_problem_s_members_are_layers() -> None:
    assert [member.n for member in TINY.members] == [40, 24, 8]
    assert {dataclasses.astuple(replace(member, n=0)) for member in TINY.members} == {
        ("m", "q,k,v", 24, 0, 32, 5, "float32", "float32", 0.0)
    }
    assert "q,k,v 40+24+8 m=24" in tables.label(dataclasses.asdict(TINY))


def test_operators_of_a_family_tune_its_configs() -> None:
    folders = {name: tune.config_of(family).__name__.split(".")[1] for name, family in discover().items()}
    assert folders["lora_linear"] == folders["lora_group"] == "lora"
    assert folders["prompt_tuning"] == "prompt"


def test_inputs_without_memory_keep_their_shape() -> None:
    inputs = lora_group.make_inputs(TINY, CPU, seed=0)
    twice = inputs._replace(weights=(inputs.weights[0],) * 3)
    found = tune._meta(twice)
    assert isinstance(found, lora_group.Inputs)
    assert found.weights[0] is found.weights[2]
    assert [tensor.requires_grad for tensor in (found.x, *found.weights, *found.lora_a, *found.dys)] == [
        *[True], *[False] * 3, *[True] * 3, *[False] * 3,
    ]  # fmt: skip
    assert {tensor.device.type for tensor in (found.x, *found.weights, *found.lora_b, *found.dys)} == {"meta"}
