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
    assert set(report["operators"]) == {"bottleneck_adapter", "lora_linear", "prefix_attention", "prompt_tuning"}
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


def test_old_torch_is_named(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("__version__ = '2.5.1+cpu'")
    result = _run(SOURCE, "--json", PYTHONPATH=str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["peft_kernels"] == {
        "error": "ImportError: peft_kernels needs torch 2.6 or newer, 2.5.1+cpu is installed"
    }


def test_broken_torch_leaves_a_report(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise OSError('libtorch.so: no such file')")
    result = _run(SOURCE, "--json", PYTHONPATH=str(tmp_path))
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["torch"] == {"error": "OSError: libtorch.so: no such file"}
    assert report["python"]["version"]


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
