"""Choice of a backend: order, forcing, reasons, the warning."""

from __future__ import annotations

import dataclasses
import importlib
import sys
import threading
import warnings

import pytest
import torch

import peft_kernels as pk
from peft_kernels._core import dispatch
from peft_kernels._core.dispatch import Implementation
from peft_kernels.info import families


@dataclasses.dataclass(frozen=True)
class Problem:
    device: torch.device


def _implementation(name: str, why_not: str | None = None, why_not_auto: str | None = None) -> Implementation:
    return Implementation(
        name=name,
        why_not_environment=lambda: None,
        why_not=lambda problem: why_not,
        why_not_auto=lambda problem: why_not_auto,
        forward=lambda: None,
        backward=lambda: None,
    )


def _choose(backend: str, *implementations: Implementation, device: str = "cpu") -> str:
    return dispatch.choose("family", implementations, Problem(torch.device(device)), backend).name


def test_auto_takes_the_first_without_a_reason() -> None:
    cuda, triton, torch_ = _implementation("cuda", "no GPU"), _implementation("triton"), _implementation("torch")
    assert _choose("auto", cuda, triton, torch_) == "triton"


def test_auto_passes_over_what_only_runs_on_request() -> None:
    triton, torch_ = _implementation("triton", why_not_auto="never verified"), _implementation("torch")
    assert _choose("auto", triton, torch_) == "torch"
    assert _choose("triton", triton, torch_) == "triton"


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
    monkeypatch.setattr(dispatch, "_warned", set())
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


def test_block_is_of_its_thread() -> None:
    seen = []
    with pk.use_backend("torch"):
        thread = threading.Thread(target=lambda: seen.append(dispatch._forced.get()))
        thread.start()
        thread.join()
    assert seen == [None]


def test_unknown_names_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="use_backend must be one of 'auto', 'torch', 'triton', 'cuda', got 'cudnn'"):
        pk.use_backend("cudnn").__enter__()
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "tritn")
    with pytest.raises(ValueError, match=r"PEFT_KERNELS_BACKEND must be one of .*got 'tritn'"):
        dispatch.requested_backend(None)


@pytest.mark.parametrize("family", families())
def test_what_is_borrowed_is_declared(family: str) -> None:
    """A record names the backends whose code its own calls, and no others."""
    implementations = importlib.import_module(f"peft_kernels.{family}.op").IMPLEMENTATIONS
    names = [implementation.name for implementation in implementations]
    for implementation in implementations:
        module = sys.modules[implementation.forward.__module__]
        imported = {name for name in names if f"{name}_impl" in vars(module)}
        assert imported - {implementation.name} == set(implementation.borrows)
