"""The CUDA extension: built where there is a compiler, importable without a driver, honest about what it lacks."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import pytest
import torch

from peft_kernels._core import extension


@pytest.fixture
def built() -> ModuleType:
    reason = extension.why_not_importable()
    if reason is not None:
        home = os.environ.get("CUDA_HOME")
        compiler = shutil.which("nvcc", path=os.path.join(home, "bin") if home else None)
        if compiler is None or os.environ.get("PEFT_KERNELS_NO_CUDA") == "1":
            pytest.skip(reason)
        pytest.fail(f"{compiler} is here, but {reason}; `make build` shows why")
    return extension.load()


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A package folder without an extension: the path for its build record, and empty caches on both sides."""
    record = tmp_path / "_build_info.json"
    monkeypatch.setattr(extension, "_MODULE", "peft_kernels._absent")
    monkeypatch.setattr(extension, "_RECORD", record)
    extension._imported.cache_clear()
    extension.why_not.cache_clear()
    yield record
    extension._imported.cache_clear()
    extension.why_not.cache_clear()


def test_binary_and_record_agree(built: ModuleType) -> None:
    record = extension.build_record()
    assert record["built"] and record["reason"] is None
    assert built.build_info()["archs"] == record["archs"]
    assert built.build_info()["nvcc"] == record["nvcc"]
    assert record["python_abi"] == sysconfig.get_config_var("EXT_SUFFIX")


def test_device_count_never_raises(built: ModuleType) -> None:
    count, reason = built.device_count(), built.why_no_device()
    assert (count == 0) == isinstance(reason, str)
    assert count > 0 or built.driver_version() == 0 or reason


def test_import_needs_no_torch_and_no_driver(built: ModuleType) -> None:
    """Loaded by its path alone: torch's libraries, which bring a CUDA runtime of their own, are not there to help."""
    code = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('_C', {built.__file__!r})\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "assert 'torch' not in sys.modules\n"
        "print(module.device_count() >= 0)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (0, "True\n", "")


def test_runtime_stays_inside(built: ModuleType) -> None:
    """A visible CUDA symbol could be bound to torch's runtime, which may be another version."""
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("there is no nm on PATH")
    symbols = subprocess.run([nm, "-D", str(built.__file__)], capture_output=True, text=True, check=True).stdout
    assert "PyInit__C" in symbols
    assert not [line for line in symbols.splitlines() if " cuda" in line or "__cuda" in line]


def test_launch_without_a_device_says_so(built: ModuleType) -> None:
    reason = built.why_no_device()
    if reason is None:
        pytest.skip("there is a CUDA device")
    with pytest.raises(RuntimeError, match="launch of lora_linear's dropout_mask failed: cudaError") as error:
        built.lora_linear.dropout_mask(mask=8, seed=8, rows=1, cols=1, threshold=0, stream=0)
    assert reason in str(error.value)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rows": -1}, r"rows and cols must not be negative, got \(-1, 8\)"),
        ({"cols": -8}, r"rows and cols must not be negative, got \(4, -8\)"),
        ({"cols": 2**35 + 8}, "cols must be at most 2\\^35"),
        ({"threshold": 65536}, "threshold must be below 65536, got 65536"),
    ],
)
def test_bad_arguments(built: ModuleType, wrong: dict[str, int], message: str) -> None:
    arguments = {"mask": 8, "seed": 8, "rows": 4, "cols": 8, "threshold": 0, "stream": 0, **wrong}
    with pytest.raises(ValueError, match=message):
        built.lora_linear.dropout_mask(**arguments)


@pytest.mark.parametrize(("rows", "cols"), [(0, 8), (4, 0)])
def test_empty_launches_nothing(built: ModuleType, rows: int, cols: int) -> None:
    built.lora_linear.dropout_mask(mask=0, seed=0, rows=rows, cols=cols, threshold=0, stream=0)


def test_why_not_names_the_last_obstacle(built: ModuleType) -> None:
    extension.why_not.cache_clear()
    if torch.version.cuda is None:
        assert "torch is built without CUDA" in (extension.why_not() or "")
    else:
        assert extension.why_not() == built.why_no_device()


def test_load_gives_the_recorded_reason(fresh: Path) -> None:
    fresh.write_text(json.dumps({"built": False, "reason": "there is no nvcc on PATH"}))
    with pytest.raises(ImportError, match=r"was not built: there is no nvcc on PATH; .*build_ext --inplace"):
        extension.load()
    assert "there is no nvcc on PATH" in (extension.why_not() or "")


def test_other_python(fresh: Path) -> None:
    fresh.write_text(json.dumps({"built": True, "reason": None, "python_abi": ".cpython-30.so"}))
    assert "built for .cpython-30.so, this Python loads" in (extension.why_not() or "")


def test_file_is_gone(fresh: Path) -> None:
    fresh.write_text(json.dumps({"built": True, "python_abi": sysconfig.get_config_var("EXT_SUFFIX")}))
    assert "its file is gone" in (extension.why_not() or "")


@pytest.mark.parametrize("text", [None, "not json"])
def test_no_usable_record(fresh: Path, text: str | None) -> None:
    if text is not None:
        fresh.write_text(text)
    assert "never built here, or its build record is unreadable" in (extension.why_not() or "")


def test_broken_binary(fresh: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / f"_broken{sysconfig.get_config_var('EXT_SUFFIX')}").write_text("no shared library")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(extension, "_MODULE", "_broken")
    assert "its import fails" in (extension.why_not() or "")
