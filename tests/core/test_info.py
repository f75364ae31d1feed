"""The environment report: complete, JSON, and alive where imports are broken."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from peft_kernels import info
from peft_kernels._core import records, verdicts
from peft_kernels._core.triton_tools import why_not_environment

SOURCE = Path(info.__file__)


def _run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        check=False,
        cwd=SOURCE.parents[1],
        env={**os.environ, **environment},
    )


def test_json_names_every_family_and_backend() -> None:
    result = _run("-m", "peft_kernels.info", "--json")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    names = {
        "adapter_rows",
        "bottleneck_adapter",
        "four_bit_dequantize",
        "lora_four_bit",
        "lora_gain",
        "lora_gain_alone",
        "lora_gain_four_bit",
        "lora_group",
        "lora_linear",
        "lora_rows",
        "lora_update",
        "lora_update_rows",
        "prefix_attention",
        "prompt_tuning",
    }
    assert set(report["operators"]) == names
    for backends in report["operators"].values():
        assert backends["torch"] == info.AVAILABLE
        assert all(isinstance(answer, str) and answer for answer in backends.values())
    assert report["operators"]["bottleneck_adapter"]["cuda"].endswith("; what it has no kernels for is done by torch")


def test_verdicts_and_where_they_come_from(tmp_path: Path) -> None:
    if reason := why_not_environment():
        pytest.skip(reason)
    name, gpu = "prompt_tuning/triton/float32", os.environ.get("TRITON_INTERPRET") != "1"
    machine = records.signature(torch.device("cuda" if gpu else "cpu"))
    given = {"PEFT_KERNELS_CACHE_DIR": str(tmp_path), "PEFT_KERNELS_QUALIFY": "never"}

    def checks() -> dict[str, Any]:
        result = _run("-m", "peft_kernels.info", "--json", **given)
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout)["checks"]

    empty = checks()
    assert empty["policy"] == "PEFT_KERNELS_QUALIFY=never"
    assert empty["machines"][0]["machine"] == machine.gpu and empty["machines"][0]["verdicts"] is None
    assert empty["machines"][0]["from"] == "none"
    path = tmp_path / machine.file_name
    verdict = verdicts.as_entry(verdicts.Verdict("hung", 1, 0.5, 300.0, "n1 b9", "not ready after 300 s"))
    content = {"schema": 1, "signature": machine._asdict(), "verdicts": {name: verdict}, "winners": {}}
    path.write_text(json.dumps(content))
    found = checks()["machines"][0]
    assert found["verdicts"] == {name: "hung: n1 b9: not ready after 300 s"}
    assert found["from"] == f"file {path}" and found["record"] == str(path) and found["remark"] is None
    path.write_text("{")
    assert "is passed over" in checks()["machines"][0]["remark"]


def test_text_shows_reasons() -> None:
    result = _run("-m", "peft_kernels.info", TRITON_INTERPRET="0", CUDA_VISIBLE_DEVICES="")
    assert result.returncode == 0, result.stderr
    assert "torch sees no CUDA device" in result.stdout or "not installed" in result.stdout


_TOO_OLD = "peft_kernels needs torch 2.6 or newer, 2.5.1+cpu is installed"


@pytest.mark.parametrize("start", [("-m", "peft_kernels.info"), ("-mpeft_kernels.info",), (SOURCE,)], ids=str)
@pytest.mark.parametrize(
    ("torch_module", "error", "because"),
    [
        (
            "raise OSError('libcudart.so.13: cannot open shared object file\\nlonger')",
            "OSError: libcudart.so.13: cannot open shared object file\nlonger",
            "torch cannot be imported (OSError: libcudart.so.13: cannot open shared object file)",
        ),
        (
            "raise ImportError('undefined symbol: ncclCommRegister')",
            "ImportError: undefined symbol: ncclCommRegister",
            "torch cannot be imported (ImportError: undefined symbol: ncclCommRegister)",
        ),
        (
            "__version__ = '2.5.1+cpu'",
            f"ImportError: {_TOO_OLD}",
            f"the package cannot be imported (ImportError: {_TOO_OLD})",
        ),
        (None, "ModuleNotFoundError: No module named 'torch'", "torch is not installed"),
    ],
)
def test_says_what_is_broken(
    torch_module: str | None, error: str, because: str, start: tuple[str, ...], tmp_path: Path
) -> None:
    """By each of the ways in which it can be started, whatever torch's import raises."""
    if torch_module is not None:
        (tmp_path / "torch.py").write_text(torch_module)
    # -S leaves out all that is installed.
    result = _run("-S", *start, "--json", PYTHONPATH=str(tmp_path))
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert next(iter(report)) == "summary"
    assert report["summary"] == f"On this machine nothing of peft_kernels runs, because {because}."
    assert report["peft_kernels"] == {"error": error}
    assert report["python"]["version"] and report["cuda_driver"]


@pytest.mark.parametrize(
    "command", [("-c", "import peft_kernels"), ("-m", "peft_kernels.qualify", "peft_kernels.info")]
)
def test_nothing_else_survives_a_broken_torch(command: tuple[str, ...]) -> None:
    result = _run("-S", *command)
    assert result.returncode == 1 and result.stderr.endswith("No module named 'torch'\n")


def test_text_begins_with_the_sentence() -> None:
    result = _run("-m", "peft_kernels.info", CUDA_VISIBLE_DEVICES="", PEFT_KERNELS_BACKEND="torch")
    assert result.returncode == 0, result.stderr
    first, blank, rest = result.stdout.split("\n", 2)
    assert first == "On this machine LoRA runs on the torch backend, because PEFT_KERNELS_BACKEND=torch forces it."
    assert not blank and rest.startswith("python\n") and "summary" not in rest


_PYTORCH = "LoRA runs on the torch backend, which is PyTorch's own operators"
_GPU = {"gpus": [{"name": "H200", "kernels": info.AVAILABLE}]}
_RIGHT, _WRONG = "right on 3 problems", "was wrong: M = 3: dx"


def _checked(*verdicts: str, policy: str = "auto", operator: str = "lora_linear") -> dict[str, Any]:
    found = {f"{operator}/{backend}/part {number}": text for number, (backend, text) in enumerate(map(_pair, verdicts))}
    return {**_GPU, "checks": {"policy": f"PEFT_KERNELS_QUALIFY={policy}", "machines": [{"verdicts": found or None}]}}


def _pair(text: str) -> tuple[str, str]:
    backend, _, verdict = text.partition(" ")
    return backend, verdict


@pytest.mark.parametrize(
    ("found", "sentence"),
    [
        ({}, f"On this machine {_PYTORCH}, because torch 2.13 sees no GPU."),
        (
            {"torch": {"version": "2.13", "cuda": None, "hip": None}, "cuda_driver": {"cuda": "13.0"}},
            f"On this machine {_PYTORCH}, because an NVIDIA driver is here, but torch 2.13 is built without CUDA.",
        ),
        (
            {"gpus": {"error": "RuntimeError: driver\nlong"}},
            f"On this machine {_PYTORCH}, because torch cannot be asked for GPUs (RuntimeError: driver).",
        ),
        (
            {"gpus": [{"name": "T4", "kernels": "its kernels need sm_80 or newer"}]},
            f"On this machine (T4) {_PYTORCH}, because its kernels need sm_80 or newer.",
        ),
        (
            {**_GPU, "operators": {"lora_linear": {"cuda": "not built", "triton": "absent", "torch": info.AVAILABLE}}},
            f"On this machine (H200) {_PYTORCH}, because no kernel can run in here: cuda: not built; triton: absent.",
        ),
        (
            _checked(),
            f"On this machine (H200) {_PYTORCH}, because its kernels have not been checked on it yet: the first call "
            "that could take one checks them (python -m peft_kernels.qualify does so now).",
        ),
        (
            _checked("triton " + _RIGHT, policy="never", operator="prompt_tuning"),
            f"On this machine (H200) {_PYTORCH}, because its kernels have not been checked on it yet: "
            "PEFT_KERNELS_QUALIFY=never lets no call check them (python -m peft_kernels.qualify does).",
        ),
        (
            _checked("triton " + _WRONG, "cuda " + _WRONG),
            f"On this machine (H200) {_PYTORCH}, because its check found none of the kernels right ({_WRONG}).",
        ),
        (
            _checked("triton " + _RIGHT, "triton " + _WRONG, "cuda " + _WRONG),
            "On this machine (H200) LoRA runs on the triton kernels where they are fastest, because its check found "
            "1 of 3 parts of them right.",
        ),
        (
            {**_checked("triton " + _RIGHT, "cuda " + _RIGHT), "gpus": _GPU["gpus"] * 2},
            "On this machine (H200, the first of 2 GPUs) LoRA runs on the triton and cuda kernels where they are "
            "fastest, because its check found 2 of 2 parts of them right.",
        ),
        (
            {**_GPU, "checks": {"policy": "", "machines": [{"error": "OSError: disk"}]}},
            f"On this machine (H200) {_PYTORCH}, because what is on record of its kernels cannot be read "
            "(OSError: disk).",
        ),
        (
            {"forced_backend": "triton", "operators": {"lora_linear": {"triton": "no device"}}},
            "On this machine every call of LoRA raises UnsupportedError, because PEFT_KERNELS_BACKEND=triton is set, "
            "and no device.",
        ),
        (
            {"forced_backend": "cudnn"},
            "On this machine every call of LoRA raises ValueError, because PEFT_KERNELS_BACKEND=cudnn names no "
            "backend.",
        ),
        (
            {"operators": {"error": "AttributeError: x"}},
            "On this machine nothing of peft_kernels runs, because its operators cannot be asked (AttributeError: x).",
        ),
    ],
)
def test_sentence(found: dict[str, Any], sentence: str) -> None:
    available = dict.fromkeys(("cuda", "triton", "torch"), info.AVAILABLE)
    whole = {
        "peft_kernels": {"version": "0"},
        "torch": {"version": "2.13", "cuda": "13.0", "hip": None},
        "cuda_driver": {"cuda": None},
        "gpus": [],
        "operators": {"lora_linear": available},
        "forced_backend": "auto",
        "checks": {"policy": "PEFT_KERNELS_QUALIFY=auto", "machines": []},
    }
    assert info.summary(whole | found) == sentence


@pytest.mark.parametrize(
    ("value", "line"),
    [
        ({"error": "OSError: x"}, "key  failed: OSError: x"),
        ([], "key  none"),
        (None, "key  none"),
        ([1, 2], "key  1, 2"),
    ],
)
def test_layout(value: object, line: str) -> None:
    assert info.format_report({"key": value}) == line


def test_layout_of_nested_values() -> None:
    report = {"gpus": [{"name": "A"}, {"name": "B"}], "libraries": {"peft": "1", "triton": "2"}}
    assert info.format_report(report).splitlines() == [
        "gpus",
        "  0",
        "    name  A",
        "  1",
        "    name  B",
        "libraries",
        "  peft    1",
        "  triton  2",
    ]
