"""The least work of a problem, the time that measured ceilings leave to it, and the shapes of the grids."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("peft")

from benchmarks import lora, roofline, shapes
from benchmarks.family import Grid, Provider, Work
from benchmarks.roofline import Ceilings, measure_ceilings, roofline_us

CPU = torch.device("cpu")
PROVIDERS = {provider.name: provider for provider in lora.FAMILY.providers}
LARGE = lora.Problem("m", "q", m=8192, n=4096, k=4096, r=16, dtype="bfloat16", adapter_dtype="bfloat16", p=0.0)
TINY = lora.Problem("m", "q", m=24, n=40, k=32, r=5, dtype="float32", adapter_dtype="float32", p=0.0)


@pytest.mark.parametrize(("work", "us"), [(Work(10**9, 1), 1e3), (Work(1, 10**12), 1e4), (Work(10**9, 10**12), 1e4)])
def test_the_longer_bound_counts(work: Work, us: float) -> None:
    assert roofline_us(work, torch.bfloat16, Ceilings(1e12, {"bfloat16": 1e14})) == pytest.approx(us)


def test_ceilings_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(roofline._MATMUL_SIZE, "cpu", 64)
    monkeypatch.setitem(roofline._COPY_BYTES, "cpu", 1 << 20)
    found = measure_ceilings(CPU, (torch.float32,))
    assert found.copy_bytes_per_s > 0
    assert found.matmul_flops_per_s["float32"] > 0


def test_bytes_of_one_kernel_each_way() -> None:
    """The limit that the design gives for this problem: 404 MB."""
    work = lora.work(LARGE, "both", PROVIDERS["peft"])
    assert round(work.bytes / 1e6) == 404
    assert work.flops == pytest.approx(4 * 8192 * 4096 * 4096, rel=0.02)


def test_forward_bytes_are_the_tensors() -> None:
    for problem in (TINY, replace(TINY, dtype="bfloat16"), replace(TINY, dtype="bfloat16", adapter_dtype="bfloat16")):
        inputs = lora.make_inputs(problem, CPU, seed=0)
        # dY is not read, y of the same size is written.
        size = sum(tensor.numel() * tensor.itemsize for tensor in inputs)
        assert lora.input_bytes(problem) == size
        assert lora.work(problem, "forward", PROVIDERS["peft"]).bytes == size


def test_backward_bytes_are_the_tensors() -> None:
    x, weight, lora_a, lora_b, dy = lora.make_inputs(TINY, CPU, seed=0)
    s = 4 * TINY.m * TINY.r
    tensors = (x, weight, lora_a, lora_b, dy, x, lora_a, lora_b)
    size = sum(tensor.numel() * tensor.itemsize for tensor in tensors)
    assert lora.work(TINY, "backward", PROVIDERS["peft"]).bytes == size + s
    forward = lora.work(TINY, "forward", PROVIDERS["peft"]).bytes
    assert lora.work(TINY, "both", PROVIDERS["peft"]).bytes == forward + size + 2 * s


def test_flops_are_those_of_the_products() -> None:
    m, n, k, r = TINY.m, TINY.n, TINY.k, TINY.r
    up_and_down = 2 * m * r * (k + n)
    assert lora.work(TINY, "forward", PROVIDERS["peft"]).flops == 2 * m * n * k + up_and_down
    assert lora.work(TINY, "backward", PROVIDERS["peft"]).flops == 2 * m * n * k + 2 * up_and_down


def test_the_frozen_layer_does_less() -> None:
    for mode in ("forward", "backward", "both"):
        base, adapted = (lora.work(LARGE, mode, PROVIDERS[name]) for name in ("base", "peft"))
        assert base.bytes < adapted.bytes
        assert base.flops < adapted.flops
    assert lora.work(LARGE, "both", PROVIDERS["base"]).flops == 4 * 8192 * 4096 * 4096


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("dtypes", [("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float32")])
def test_providers_agree_with_the_oracle(p: float, dtypes: tuple[str, str]) -> None:
    problem = replace(TINY, p=p, dtype=dtypes[0], adapter_dtype=dtypes[1])
    inputs = lora.make_inputs(problem, CPU, seed=3)
    check = lora.checker(problem, inputs)
    for name in ("base", "peft", "addmm", "ours_torch"):
        provider = PROVIDERS[name]
        if provider.why_not(problem, CPU) is not None:
            assert (name, p) == ("addmm", 0.1)
            continue
        errors = check(provider)
        assert set(errors) == {"y", "dx", "da", "db"}
        for error in errors.values():
            known = name != "base" and (p == 0 or name == "ours_torch")
            assert (error is not None) == known
            assert error is None or error < (1e-5 if dtypes[0] == "float32" else 1e-2)


def test_a_wrong_backend_does_not_pass_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = lora.make_inputs(TINY, CPU, seed=3)
    check = lora.checker(TINY, inputs)
    monkeypatch.setattr(lora, "SCALE", 2.001)
    with pytest.raises(AssertionError, match="relative error"):
        check(PROVIDERS["ours_torch"])


def test_large_problems_are_checked_on_their_first_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(lora._ORACLE_PRODUCTS, "cpu", 1)
    monkeypatch.setattr(lora, "_ORACLE_ROWS", 8)
    problem = replace(TINY, p=0.1)
    errors = lora.checker(problem, lora.make_inputs(problem, CPU, seed=3))(PROVIDERS["ours_torch"])
    assert (errors["da"], errors["db"]) == (None, None)
    assert max(errors["y"], errors["dx"]) < 1e-5


def test_peft_layer_copies_nothing_and_trains_the_given_tensors() -> None:
    inputs = lora.make_inputs(TINY, CPU, seed=0)
    layer = lora._peft_layer(TINY, inputs)
    assert layer.base_layer.weight.data_ptr() == inputs.weight.data_ptr()
    assert layer.lora_A["default"].weight is inputs.lora_a
    assert layer.scaling["default"] == lora.SCALE
    assert layer.training


def test_kernels_are_not_timed_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    triton: Provider = PROVIDERS["ours_triton"]
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "interpreter" in (triton.why_not(TINY, CPU) or "")
    monkeypatch.delenv("TRITON_INTERPRET")
    assert triton.why_not(TINY, CPU) is None


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
@pytest.mark.parametrize("quick", [False, True])
def test_grids_have_no_problem_twice(device_type: str, quick: bool) -> None:
    grid = lora.problems(Grid(device_type, quick))
    assert len(grid) == len(set(grid))
    assert len(grid) > len(lora.problems(Grid(device_type, True))) or quick
    assert {problem.p for problem in grid} == set(shapes.DROPOUTS)
    assert any(problem.adapter_dtype != problem.dtype for problem in grid)
    assert {lora.modes(problem) for problem in grid} == {("forward",), ("forward", "backward", "both")}


def test_the_full_grid_covers_models_tokens_and_ranks() -> None:
    grid = lora.problems(Grid("cuda", False))
    assert {problem.model for problem in grid} == {model.name for model in shapes.MODELS}
    assert {problem.m for problem in grid} == set(shapes.TOKENS)
    assert {problem.r for problem in grid} == set(shapes.RANKS)


def test_projections_follow_the_configs() -> None:
    found = {(layer.model, layer.name): (layer.k, layer.n) for m in shapes.MODELS for layer in shapes.projections(m)}
    assert found["Llama-3-8B", "k,v"] == (4096, 1024)
    assert found["Llama-3-70B", "k,v"] == (8192, 1024)
    assert found["Qwen2.5-7B", "k,v"] == (3584, 512)
    assert found["Llama-3.2-1B", "k,v"] == (2048, 512)
    assert found["Llama-3-70B", "down"] == (28672, 8192)
    assert found["Qwen2.5-7B", "gate,up"] == (3584, 18944)


def test_attention_wider_than_the_model_has_two_shapes() -> None:
    wide = replace(shapes.LLAMA_3_8B, head_dim=256)
    names = {layer.name: (layer.k, layer.n) for layer in shapes.projections(wide)}
    assert (names["q"], names["o"]) == ((4096, 8192), (8192, 4096))
