"""The benchmark of rows: the least work, what is checked against the oracle, and the grids."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("peft")

import peft_kernels as pk
from benchmarks import lora, lora_rows
from benchmarks.family import Grid, discover

CPU = torch.device("cpu")
PROVIDERS = {provider.name: provider for provider in lora_rows.FAMILY.providers}
F32 = {"dtype": "float32", "adapter_dtype": "float32"}
TINY = lora_rows.Problem("m", "q", adapters=3, tokens=7, n=40, k=32, r=5, p=0.0, **F32)
RUN_HERE = ("peft_loop", "peft_in_turn", "calls_torch", "ours_auto", "ours_torch")


def test_it_is_found() -> None:
    assert lora_rows.FAMILY in discover().values()


def test_bytes_are_the_tensors() -> None:
    """Each adapter's factors are read, all of x and W once, and y is written; then their gradients, and dX."""
    for problem in (TINY, replace(TINY, dtype="bfloat16")):
        x, weight, lora_a, lora_b, dy = lora_rows.make_inputs(problem, CPU, seed=0)
        factors = sum(each.nbytes for each in (*lora_a, *lora_b))
        assert lora_rows.input_bytes(problem) == x.nbytes + weight.nbytes + factors + dy.nbytes
        found = {mode: lora_rows.work(problem, mode, PROVIDERS["ours_torch"]) for mode in lora_rows.modes(problem)}
        s = 4 * problem.m * problem.r
        assert found["forward"].bytes == x.nbytes + weight.nbytes + factors + dy.nbytes
        assert found["backward"].bytes == found["forward"].bytes + factors + x.nbytes + s
        assert found["both"].bytes == found["forward"].bytes + found["backward"].bytes + s


def test_work_is_that_of_one_adapter_on_all_rows() -> None:
    one = replace(TINY, adapters=1, tokens=21)
    for mode in lora_rows.modes(TINY):
        provider = PROVIDERS["ours_torch"]
        assert lora_rows.work(TINY, mode, provider).flops == lora_rows.work(one, mode, provider).flops
        assert lora_rows.work(one, mode, provider) == lora.work(one.alone, mode, provider)
        base = PROVIDERS["base"]
        assert lora_rows.work(TINY, mode, base) == lora_rows.work(one, mode, base)


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_every_provider_that_runs_here_is_right(p: float) -> None:
    problem = replace(TINY, p=p)
    check = lora_rows.checker(problem, lora_rows.make_inputs(problem, CPU, seed=0))
    for name in RUN_HERE:
        errors = check(PROVIDERS[name])
        is_compared = not p or name.startswith("ours")
        assert all((error is not None and error < 1e-5) if is_compared else error is None for error in errors.values())
    assert set(check(PROVIDERS["base"]).values()) == {None}


def test_a_wrong_result_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of ours fails the budget, a baseline shows its error."""
    check = lora_rows.checker(TINY, lora_rows.make_inputs(TINY, CPU, seed=0))
    right = pk.lora_linear

    def of_the_first(*arguments: object, **options: object) -> torch.Tensor:
        options["rows"] = pk.Rows.of([0] * TINY.m, known=3)
        return right(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(pk, "lora_linear", of_the_first)
    with pytest.raises(AssertionError, match=r"y\[1\]"):
        check(PROVIDERS["ours_torch"])


def test_peft_s_loop_is_given_each_adapter() -> None:
    call = PROVIDERS["peft_loop"].make(TINY, inputs := lora_rows.make_inputs(TINY, CPU, seed=0))
    y = call.apply()
    gradients = torch.autograd.grad(y, call.wrt, call.dy)
    assert y.shape == (3, 7, 40) and all(gradient.any() for gradient in gradients)
    assert call.wrt[1:] == inputs.wrt[1:]


def test_grids() -> None:
    for device in ("cpu", "cuda"):
        quick, full = (lora_rows.problems(Grid(device, quick)) for quick in (True, False))
        assert set(quick) <= set(full) and len(set(full)) == len(full)
        assert {problem.tokens == 1 for problem in quick} == {True, False}
        assert any(problem.p for problem in full)
