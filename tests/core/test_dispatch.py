"""Choice of a backend: order, forcing, reasons, the warning."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import inspect
import sys
import threading
import warnings
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import peft_kernels as pk
from peft_kernels._core import dispatch, verdicts
from peft_kernels._core.dispatch import Implementation
from peft_kernels._core.operator import OPERATORS, Operator


@dataclasses.dataclass(frozen=True)
class Problem:
    device: torch.device


def _implementation(name: str, why_not: str | None = None, **others: Any) -> Implementation:
    return Implementation(name, lambda: None, lambda: None, why_not=lambda problem: why_not, **others)


def _choose(backend: str, *implementations: Implementation, device: str = "cpu") -> str:
    return dispatch.select_backend("family", implementations, Problem(torch.device(device)), backend).name


def test_auto_takes_the_first_without_a_reason() -> None:
    cuda, triton, torch_ = _implementation("cuda", "no GPU"), _implementation("triton"), _implementation("torch")
    assert _choose("auto", cuda, triton, torch_) == "triton"


def test_auto_passes_over_what_is_not_known_to_be_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """A forced backend is not asked."""
    asked: list[tuple[object, ...]] = []
    answers = ["it was wrong: m37", None]
    monkeypatch.setattr(verdicts, "why_not", lambda *arguments: asked.append(arguments) or answers.pop(0))
    qualification: Any = object()
    triton, torch_ = _implementation("triton", qualification=qualification), _implementation("torch")
    assert [_choose("auto", triton, torch_) for _ in range(2)] == ["torch", "triton"]
    assert asked == [("triton", qualification, Problem(torch.device("cpu")))] * 2
    assert _choose("triton", triton, torch_) == "triton"
    assert len(asked) == 2


def test_what_runs_the_problem_is_asked_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """No check is begun of a kernel that would refuse the problem."""
    monkeypatch.setattr(verdicts, "why_not", lambda *arguments: pytest.fail("was asked"))
    qualification: Any = object()
    triton = _implementation("triton", "M is odd", qualification=qualification)
    assert _choose("auto", triton, _implementation("torch")) == "torch"


def test_forced_backend_says_why_it_cannot() -> None:
    triton, torch_ = _implementation("triton", "M is odd"), _implementation("torch")
    with pytest.raises(
        pk.UnsupportedError, match=r"family: backend 'triton' cannot run this problem: M is odd; .*can$"
    ):
        _choose("triton", triton, torch_)
    with pytest.raises(pk.UnsupportedError, match="no 'cuda' implementation of it; it has: triton, torch"):
        _choose("cuda", triton, torch_)


def test_nothing_runs() -> None:
    with pytest.raises(pk.UnsupportedError, match=r"no backend can run this problem \(torch: broken\)"):
        _choose("auto", _implementation("torch", "broken"))


def test_warns_once_where_a_gpu_idles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_said", set())
    implementations = _implementation("triton", "M is odd"), _implementation("torch")
    with pytest.warns(UserWarning, match=r"family: runs on the torch backend \(triton: M is odd\)"):
        _choose("auto", *implementations, device="cuda")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _choose("auto", *implementations, device="cuda")
        _choose("auto", *implementations, device="cpu")


def test_precedence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(dispatch.ENVIRONMENT_VARIABLE, raising=False)
    assert dispatch.requested_backend(None) == "auto"
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "cuda")
    assert dispatch.requested_backend(None) == "cuda"
    with pk.use_backend("triton"):
        assert dispatch.requested_backend(None) == "triton"
        assert dispatch.requested_backend("torch") == "torch"
        with pk.use_backend("auto"):
            assert dispatch.requested_backend(None) == "auto"
        assert dispatch.requested_backend(None) == "triton"
    assert dispatch.requested_backend(None) == "cuda"


def test_block_ends_where_it_raises() -> None:
    with pytest.raises(ZeroDivisionError), pk.use_backend("triton"):
        raise ZeroDivisionError
    assert dispatch.requested_backend("auto") == "auto"
    assert dispatch._forced.get() is None


def test_block_holds_in_threads_that_it_starts() -> None:
    seen: dict[str, str] = {}
    before, go = threading.Event(), threading.Event()

    def ask(name: str) -> None:
        if name == "before":
            before.set()
            go.wait(10)
        seen[name] = dispatch.requested_backend(None)
        if name == "outer":
            with pk.use_backend("triton"):
                seen["its own"] = dispatch.requested_backend(None)

    threads = [threading.Thread(target=ask, args=(name,)) for name in ("before", "outer", "inner")]
    threads[0].start()
    before.wait(10)
    with pk.use_backend("torch"):
        threads[1].start()
        threads[1].join()
        with pk.use_backend("cuda"):
            threads[2].start()
            threads[2].join()
        go.set()
        threads[0].join()
    assert seen == {"before": "auto", "outer": "torch", "its own": "triton", "inner": "cuda"}
    assert not dispatch._blocks


class TestBlockThatIsNoWith:
    def test_a_call_alone_warns_at_its_line(self) -> None:
        with pytest.warns(UserWarning, match=r"forced nothing; with use_backend\('triton'\): \.\.\. does") as seen:
            pk.use_backend("triton")
            line = inspect.currentframe().f_lineno - 1
            gc.collect()
        (warning,) = seen
        assert (warning.filename, warning.lineno) == (__file__, line)
        assert dispatch.requested_backend("auto") == "auto"

    def test_a_refused_name_warns_of_nothing_else(self) -> None:
        with pytest.raises(ValueError, match="use_backend must be one of"):
            pk.use_backend("cudnn")

    @pytest.mark.parametrize("use", ["with", "stack", "decorator", "never called"])
    def test_used_ones_do_not_warn(self, use: str, recwarn: pytest.WarningsRecorder) -> None:
        block = pk.use_backend("triton")
        if use == "with":
            with block:
                pass
        elif use == "stack":
            with contextlib.ExitStack() as stack:
                stack.enter_context(block)
        else:
            function = block(lambda: dispatch.requested_backend(None))
            assert use == "never called" or function() == "triton"
            del function
        del block
        gc.collect()
        assert not recwarn.list

    def test_decorator_opens_a_block_for_each_call(self) -> None:
        @pk.use_backend("triton")
        def count(down: int) -> list[str]:
            """Say which backend each depth has."""
            inner = count(down - 1) if down else []
            return [dispatch.requested_backend(None), *inner]

        assert count(2) == ["triton"] * 3 and count.__doc__
        with pk.use_backend("torch"):
            assert count(0) == ["triton"]
            assert dispatch.requested_backend(None) == "torch"
        assert not dispatch._blocks

    def test_a_block_that_was_kept_opens_again_but_not_inside_itself(self) -> None:
        block = pk.use_backend("triton")
        for _ in range(2):
            with block:
                assert dispatch.requested_backend(None) == "triton"
                with pytest.raises(RuntimeError, match="is open already; call use_backend again"):
                    block.__enter__()
                assert dispatch.requested_backend(None) == "triton"
            assert not dispatch._blocks
        assert "with use_backend('triton'): ..." in repr(block)

    def test_refuses_what_runs_later(self, recwarn: pytest.WarningsRecorder) -> None:
        def generator() -> Iterator[int]:
            yield 1

        async def coroutine() -> None:
            pass

        async def both() -> AsyncIterator[int]:
            yield 1

        for function in (generator, coroutine, both, nn.Linear):
            with pytest.raises(ValueError, match=r"must run when it is called, got .*; open the block inside"):
                pk.use_backend("triton")(function)
            gc.collect()
        assert not recwarn.list


def test_compiled_call_is_traced_again_in_another_block() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: pk.prompt_tuning(x, x), fullgraph=True, backend="aot_eager")
    x = torch.ones(1, 2, 3)
    assert pk.explain(compiled, x).startswith("prompt_tuning: torch\n  triton: ")
    for _ in range(2):
        # torch.compile raises an exception of its own, with ours in its text.
        with pk.use_backend("cuda"), pytest.raises(Exception, match="no 'cuda' implementation"):
            compiled(x)
        with pk.use_backend("torch"):
            assert "'torch' is forced" in pk.explain(compiled, x)
        compiled(x)


def test_warning_has_no_sizes_and_points_at_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_said", set())
    with pytest.warns(UserWarning, match="takes at most 16 tokens") as seen:
        for m in range(17, 60):
            reason = f"decode: it takes at most 16 tokens, got {m}; gemm: N must be a multiple of 8, got {m}"
            _choose("auto", _implementation("cuda", reason), _implementation("torch"), device="cuda")
    (warning,) = seen
    assert str(warning.message).endswith("(cuda: decode: it takes at most 16 tokens; gemm: N must be a multiple of 8)")
    assert warning.filename == __file__


def test_each_choice_is_logged_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(dispatch, "_said", set())
    with caplog.at_level("DEBUG", logger="peft_kernels"):
        for reason in ("M is odd, got 3", "M is odd, got 5", "M is large"):
            _choose("auto", _implementation("triton", reason), _implementation("torch"))
    assert [record.getMessage() for record in caplog.records] == [
        "family: runs on the torch backend (triton: M is odd)",
        "family: runs on the torch backend (triton: M is large)",
    ]


def test_explain_names_backend_and_refusals() -> None:
    implementations = _implementation("cuda", "no GPU"), _implementation("triton"), _implementation("torch")
    text = dispatch.explain_backend("family", implementations, Problem(torch.device("cpu")), "auto", implementations[1])
    assert text.splitlines() == ["family: triton", "  cuda: no GPU", "  torch: comes after"]


def test_explain_counts_and_leaves_the_generator_alone() -> None:
    layer = pk.FusedLoRALinear(4, 3, r=2, lora_dropout=0.5)
    state = torch.get_rng_state()
    text = pk.explain(lambda x: layer(layer(x)[:, :1].expand(-1, 4)), torch.ones(2, 4))
    assert text.startswith("lora_linear: torch (2 times)\n  cuda: ")
    assert torch.equal(torch.get_rng_state(), state)
    assert pk.explain(abs, -1) == "nothing of peft_kernels was called"
    refused = pk.explain(pk.prompt_tuning, torch.ones(1, 1, 1), torch.ones(1, 1, 1), backend="cuda")
    assert refused.startswith("refused: prompt_tuning: there is no 'cuda'")


def test_unknown_names_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="use_backend must be one of 'auto', 'torch', 'triton', 'cuda', got 'cudnn'"):
        pk.use_backend("cudnn").__enter__()
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "tritn")
    with pytest.raises(ValueError, match=r"PEFT_KERNELS_BACKEND must be one of .*got 'tritn'"):
        dispatch.requested_backend(None)


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=lambda operator: operator.name)
def test_what_is_borrowed_is_declared(operator: Operator) -> None:
    """A record names the backends whose code its own calls, and no others."""
    names = [implementation.name for implementation in operator.implementations]
    for implementation in operator.implementations:
        module = sys.modules[implementation.forward.__module__]
        imported = {name for name in names if f"{name}_impl" in vars(module)}
        assert imported - {implementation.name} == set(implementation.borrows)
