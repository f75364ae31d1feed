"""Host-side questions about Triton: reasons why it cannot run."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from contextlib import nullcontext
from types import ModuleType, SimpleNamespace

import pytest
import torch

from peft_kernels._core import cuda_tools, extension, triton_tools
from peft_kernels._core.operator import OPERATORS


@pytest.fixture(autouse=True)
def forget() -> None:
    triton_tools.why_not_installed.cache_clear()
    yield
    triton_tools.why_not_installed.cache_clear()


def test_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert triton_tools.why_not_environment() == "the package triton is not installed"
    assert triton_tools.why_not_device(torch.device("cpu")) == "the package triton is not installed"


@pytest.mark.parametrize("version", ["2.3.1", "3.3.1+git12"])
def test_too_old(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    stand_in = ModuleType("triton")
    stand_in.__version__ = version
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "triton", stand_in)
    assert triton_tools.why_not_installed() == f"triton {version} is installed, the kernels need 3.4 or newer"


def test_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "triton", None)  # its import raises
    assert (triton_tools.why_not_installed() or "").startswith("triton cannot be imported (ModuleNotFoundError: ")


@pytest.mark.parametrize("installed", [False, True])
def test_amd_is_named(monkeypatch: pytest.MonkeyPatch, installed: bool) -> None:
    """torch on ROCm calls its devices CUDA, and says 9.4 for the capability of an MI300."""
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 4))
    monkeypatch.setattr(triton_tools, "why_not_installed", lambda: None if installed else "not installed")
    monkeypatch.setattr(triton_tools, "interpreting", lambda: False)
    extension.why_not.cache_clear()
    reasons = [
        extension.why_not(),
        triton_tools.why_not_environment(),
        triton_tools.why_not_device(torch.device("cuda", 0)),
        cuda_tools.why_not_device(torch.device("cuda", 0), 80),
    ]
    extension.why_not.cache_clear()
    assert reasons == ["the kernels are for NVIDIA GPUs, and torch is built for AMD's (ROCm 6.4)"] * 4


@pytest.mark.parametrize("name", ["mps", "xpu:0", "meta"])
def test_other_accelerators_are_named(name: str) -> None:
    assert (triton_tools.why_not_device(torch.device(name)) or "").endswith(f"these tensors are on {name}")
    assert (cuda_tools.why_not_device(torch.device(name), 80) or "").endswith(f"got tensors on {name}")


@pytest.mark.parametrize(("value", "power"), [(1, 1), (2, 2), (3, 4), (16, 16), (17, 32), (512, 512)])
def test_next_power_of_2(value: int, power: int) -> None:
    assert triton_tools.next_power_of_2(value) == power


@pytest.mark.parametrize("current", [0, 1])
def test_launches_go_to_the_tensors_device(monkeypatch: pytest.MonkeyPatch, current: int) -> None:
    entered: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    monkeypatch.setattr(torch.cuda, "device", lambda device: entered.append(device) or nullcontext())
    run = triton_tools.on_device(lambda problem, *rest: rest)
    assert run(SimpleNamespace(device=torch.device("cuda", 1)), 2, 3) == (2, 3)
    assert entered == ([] if current == 1 else [torch.device("cuda", 1)])
    run(SimpleNamespace(device=torch.device("cpu")))
    assert len(entered) == 1 - current


def test_every_operator_s_launches_do() -> None:
    for operator in OPERATORS.values():
        for each in operator.implementations:
            if each.name == "triton":
                assert each.forward.__wrapped__
                assert each.backward.__wrapped__ if operator.has_gradients else each.backward() == ()


_TF32 = """
import sys, torch
from peft_kernels._core.triton_tools import dot_precision
assert dot_precision(torch.float32) == "ieee"
exec(sys.argv[1])
assert dot_precision(torch.float32) == "tf32" and dot_precision(torch.bfloat16) == "ieee"
"""


@pytest.mark.thorough
@pytest.mark.parametrize(
    "setting",
    [
        "torch.backends.cuda.matmul.allow_tf32 = True",
        "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
    ],
)
def test_precision_is_what_either_setting_says(setting: str) -> None:
    """In a process of its own: torch refuses one setting for ever after the other was used."""
    subprocess.run([sys.executable, "-c", _TF32, setting], check=True)
