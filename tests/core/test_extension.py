"""The extension: built where there is a compiler, importable without a driver, honest about what it lacks."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from peft_kernels._core import extension
from tests.compiled import built_extension


@pytest.fixture
def built() -> ModuleType:
    return built_extension()


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
    assert record["built"] and record["cuda"] and built.HAS_CUDA and record["reason"] is None
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
        built.lora.dropout_mask(mask=8, seed=8, first_row=0, rows=1, cols=1, threshold=0, lane=0, stream=0)
    assert reason in str(error.value)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rows": -1}, r"first_row, rows and cols must not be negative, got \(0, -1, 8\)"),
        ({"cols": -8}, r"first_row, rows and cols must not be negative, got \(0, 4, -8\)"),
        ({"first_row": -1}, r"first_row, rows and cols must not be negative, got \(-1, 4, 8\)"),
        ({"cols": 2**35 + 8}, "cols must be at most 2\\^35"),
        ({"threshold": 65536}, "threshold must be below 65536, got 65536"),
    ],
)
def test_bad_arguments(built: ModuleType, wrong: dict[str, int], message: str) -> None:
    arguments = {"mask": 8, "seed": 8, "first_row": 0, "rows": 4, "cols": 8, "threshold": 0}
    arguments |= {"lane": 0, "stream": 0, **wrong}
    with pytest.raises(ValueError, match=message):
        built.lora.dropout_mask(**arguments)


@pytest.mark.parametrize(("rows", "cols"), [(0, 8), (4, 0)])
def test_empty_launches_nothing(built: ModuleType, rows: int, cols: int) -> None:
    built.lora.dropout_mask(mask=0, seed=0, first_row=0, rows=rows, cols=cols, threshold=0, lane=0, stream=0)


DECODE = {
    **dict.fromkeys(("x", "weight", "lora_a"), (64, 64)),
    **dict.fromkeys(("y", "s", "workspace"), 64),
    "lora_b": (64, 8, 1),
    "bias": (64, 1),
    "scale": (64, 1.0),
    "m": 4,
    "n": 32,
    "k": 64,
    "r": 8,
    "splits": 1,
    "down_splits": 1,
    "grid": 1,
    "stream": 0,
    "nonce": 1,
    "dtype": "bfloat16",
    "adapter_dtype": "bfloat16",
}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"z": 1}, "decode_forward: there is no argument z"),
        ({"m": 4.0}, "decode_forward: m must be an integer of 32 bits, got 4.0"),
        ({"m": 2**31}, "decode_forward: m must be an integer of 32 bits, got 2147483648"),
        ({"nonce": -1}, "decode_forward: nonce must be an unsigned integer, got -1"),
        ({"y": "64"}, "decode_forward: y must be an address or None, got '64'"),
        ({"x": 64}, "decode_forward: x must be a tuple of 2 or None, got 64"),
        ({"lora_b": (64, 8)}, r"decode_forward: lora_b must be a tuple of 3 or None, got \(64, 8\)"),
        ({"scale": (0, None)}, "decode_forward: scale must be a number, got None"),
        ({"dtype": 0}, "decode_forward: dtype must be a name, got 0"),
        ({"stream": 0.0}, "decode_forward: stream must be an address or None, got 0.0"),
    ],
    ids=str,
)
def test_arguments_of_wrong_names_and_types(built: ModuleType, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        built.lora.decode_forward(**DECODE | wrong)


@pytest.mark.parametrize("name", DECODE)
def test_no_argument_may_be_missing(built: ModuleType, name: str) -> None:
    given = {key: value for key, value in DECODE.items() if key != name}
    with pytest.raises(TypeError, match=f"decode_forward: the argument {name} is missing"):
        built.lora.decode_forward(**given)


def test_decode_without_a_device_says_so(built: ModuleType) -> None:
    reason = built.why_no_device()
    if reason is None:
        pytest.skip("there is a CUDA device")
    single = {"m": 1, "r": 1, "x": (64, 1), "lora_a": (64, 3)}  # of one row the stride is nobody's
    half = {"dtype": "float16", "adapter_dtype": "float16"}
    for change in ({}, {"adapter_dtype": "float32"}, half, half | {"adapter_dtype": "float32"}, single):
        with pytest.raises(RuntimeError, match="launch of lora_linear's decode_forward failed: cudaError") as error:
            built.lora.decode_forward(**DECODE | change)
        assert reason in str(error.value)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"m": 17}, "decode takes at most 16 tokens, got 17"),
        ({"m": 0}, "decode's m must be positive, got 0"),
        ({"n": 0}, "decode's n must be positive"),
        ({"k": -8}, "decode's k must be positive"),
        ({"r": 0}, "decode's r must be positive"),
        ({"splits": 0}, "decode's splits must be positive"),
        ({"down_splits": 0}, "decode's down_splits must be positive"),
        ({"grid": 0}, "decode's grid must be positive"),
        ({"n": 2**30 + 1}, r"n, k and r must be at most 2\^30"),
        ({"k": 60}, "k must be a multiple of 8, got 60"),
        ({"x": (66, 64)}, "rows of x do not start at multiples of 16 bytes"),
        ({"weight": (64, 68)}, "rows of weight do not start at multiples of 16 bytes"),
        ({"lora_a": (64, 66), "adapter_dtype": "float32"}, "rows of lora_a do not start at multiples of 16 bytes"),
        ({"dtype": "float32"}, "decode takes bfloat16 or float16 with adapters of that dtype or float32"),
        ({"adapter_dtype": "float16"}, "decode takes bfloat16 or float16 with adapters of that dtype or float32"),
        ({"dtype": "int8"}, "dtype must be one of bfloat16, float16, float32, got int8"),
    ],
)
def test_bad_arguments_of_decode(built: ModuleType, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        built.lora.decode_forward(**DECODE | wrong)


FOUR_BIT = {
    **{name: value for name, value in DECODE.items() if name != "weight"},
    **dict.fromkeys(("codes", "scales", "code", "second"), 64),
    "offset": (0, 0.5),
    "values": (0.5,) * 16,
    "block_shift": 6,
    "second_shift": 8,
}


@pytest.mark.parametrize("name", FOUR_BIT)
def test_no_argument_of_decode_of_four_bits_may_be_missing(built: ModuleType, name: str) -> None:
    given = {key: value for key, value in FOUR_BIT.items() if key != name}
    with pytest.raises(TypeError, match=f"decode_four_bit: the argument {name} is missing"):
        built.lora.decode_four_bit(**given)


def test_decode_of_four_bits_without_a_device_says_so(built: ModuleType) -> None:
    reason = built.why_no_device()
    if reason is None:
        pytest.skip("there is a CUDA device")
    for change in ({}, {"adapter_dtype": "float32"}, {"code": None}):
        with pytest.raises(RuntimeError, match="launch of lora_four_bit's decode_four_bit failed: cudaError") as error:
            built.lora.decode_four_bit(**FOUR_BIT | change)
        assert reason in str(error.value)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"m": 17}, "lora_four_bit: decode takes at most 16 tokens, got 17"),
        ({"dtype": "float32"}, "decode takes bfloat16 or float16 with adapters of that dtype or float32"),
        ({"block_shift": 5}, "decode takes blocks of 64 to"),
        ({"second_shift": -1}, "decode takes blocks of 64 to"),
        ({"block_shift": 7}, "k must be a multiple of the block, 128, got 64"),
        ({"n": 2**30, "k": 128}, r"n times k must be at most 2\^36"),
        ({"codes": 72}, "rows of codes do not start at multiples of 16 bytes"),
    ],
)
def test_bad_arguments_of_decode_of_four_bits(built: ModuleType, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        built.lora.decode_four_bit(**FOUR_BIT | wrong)


DECODE_ROWS = {
    **{name: value for name, value in DECODE.items() if name != "scale"},
    "scales": (64, 1),
    "s": (64, 24),
    "slot": (64, 1),
    "order": (64, 1),
    "table": (64, 3),
    "slots": 3,
    "a_rows": 24,
}


@pytest.mark.parametrize("name", DECODE_ROWS)
def test_no_argument_of_decode_by_rows_may_be_missing(built: ModuleType, name: str) -> None:
    given = {key: value for key, value in DECODE_ROWS.items() if key != name}
    with pytest.raises(TypeError, match=f"decode_rows: the argument {name} is missing"):
        built.lora.decode_rows(**given)


def test_decode_by_rows_without_a_device_says_so(built: ModuleType) -> None:
    reason = built.why_no_device()
    if reason is None:
        pytest.skip("there is a CUDA device")
    with pytest.raises(RuntimeError, match="launch of lora_rows's decode_rows failed: cudaError") as error:
        built.lora.decode_rows(**DECODE_ROWS)
    assert reason in str(error.value)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"m": 17}, "lora_rows: decode takes at most 16 tokens, got 17"),
        ({"r": 0}, "lora_rows: decode's r must be positive, got 0"),
        ({"slots": 0}, "lora_rows: decode's slots must be positive, got 0"),
        ({"weight": (64, 68)}, "lora_rows: decode reads 16 bytes at a time, rows of weight"),
        # What is chosen may be one row, and not the first.
        ({"r": 1, "lora_a": (64, 66)}, "lora_rows: decode reads 16 bytes at a time, rows of lora_a"),
        ({"dtype": "float32"}, "lora_rows: decode takes bfloat16 or float16 with adapters of that dtype or float32"),
    ],
)
def test_bad_arguments_of_decode_by_rows(built: ModuleType, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        built.lora.decode_rows(**DECODE_ROWS | wrong)


def test_workspace_of_decode(built: ModuleType) -> None:
    """3 tiles of W in 4 splits, 2 of A in 5: 22 units, of which 17 leave partial sums of 64 floats a token."""
    shape = {"m": 7, "n": 129, "k": 4096, "r": 65, "splits": 4, "down_splits": 5}
    assert built.lora.decode_workspace(**shape) == (22, 22 * 8 + 17 * 7 * 64 * 4)


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


def test_host_code_has_reasons_of_its_own(fresh: Path) -> None:
    fresh.write_text(json.dumps({"built": False, "reason": "there is no nvcc on PATH; there is no C++ compiler"}))
    with pytest.raises(ImportError, match=r"host code .* was not built: .* with a C\+\+ compiler on PATH builds"):
        extension.load_host()
    assert "there is no C++ compiler" in (extension.why_no_host() or "")


@pytest.fixture
def host_only(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An extension without CUDA kernels, and the path for its record."""
    module = ModuleType("peft_kernels._host_only")
    module.HAS_CUDA, module.HOST_INTERFACE = False, extension._HOST_INTERFACE
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(extension, "_MODULE", module.__name__)
    return fresh


def test_extension_without_cuda(host_only: Path) -> None:
    """Its host code is had; who asks for kernels hears why there are none, as where there is no extension."""
    host_only.write_text(json.dumps({"built": True, "cuda": False, "reason": "there is no nvcc on PATH"}))
    assert extension.why_no_host() is None
    assert extension.load_host() is sys.modules["peft_kernels._host_only"]
    expected = r"it was not built: there is no nvcc on PATH; .* with nvcc on PATH builds it"
    for reason in (extension.why_not(), extension.why_not_importable()):
        assert re.fullmatch(expected, reason or "")
    with pytest.raises(ImportError, match=expected):
        extension.load()


def test_extension_without_cuda_and_without_a_record(host_only: Path) -> None:
    assert "it has no CUDA kernels, and its build record is unreadable" in (extension.why_not() or "")
    assert extension.why_no_host() is None


def test_extension_of_other_sources(host_only: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A binary that an earlier build left behind takes other arguments, or has no host code at all."""
    module = sys.modules["peft_kernels._host_only"]
    for change in (lambda: setattr(module, "HOST_INTERFACE", -1), lambda: delattr(module, "HOST_INTERFACE")):
        change()
        assert "built from other sources than these" in (extension.why_no_host() or "")
    del module.HAS_CUDA
    assert extension.load() is module


def test_interface_is_the_sources(built: ModuleType) -> None:
    assert built.HOST_INTERFACE == extension._HOST_INTERFACE


def test_other_python(fresh: Path) -> None:
    fresh.write_text(json.dumps({"built": True, "reason": None, "python_abi": ".cpython-30.so"}))
    assert "built for .cpython-30.so, this Python loads" in (extension.why_not() or "")


def test_file_is_gone(fresh: Path) -> None:
    fresh.write_text(json.dumps({"built": True, "python_abi": sysconfig.get_config_var("EXT_SUFFIX")}))
    assert "its file is gone" in (extension.why_not() or "")


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        "{",
        "{}",
        "[]",
        "null",
        "true",
        '"built"',
        '[{"built": true}]',
        '{"built": null}',
        '{"built": "yes"}',
        '{"built": true, "cuda": null}',
        '{"built": true, "cuda": "no"}',
        '{"built": true, "archs": null}',
        '{"built": true, "archs": "90"}',
        '{"built": true, "archs": [90]}',
        '{"built": true, "archs": ["sm_90"]}',
        '{"built": true, "archs": [], "ptx": 90}',
        '{"built": true, "archs": [], "ptx": "90a"}',
    ],
)
def test_no_usable_record(fresh: Path, text: str | None) -> None:
    if text is not None:
        fresh.write_text(text)
    assert "never built here, or its build record is unreadable" in (extension.why_not() or "")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"built": true}', "it was built for an unknown Python, this Python loads"),
        ('{"built": false}', "it was not built: no reason was written down;"),
        ('{"built": false, "reason": null}', "it was not built: no reason was written down;"),
    ],
)
def test_record_without_some_keys(fresh: Path, text: str, reason: str) -> None:
    fresh.write_text(text)
    assert reason in (extension.why_not() or "")


def test_broken_binary(fresh: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / f"_broken{sysconfig.get_config_var('EXT_SUFFIX')}").write_text("no shared library")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(extension, "_MODULE", "_broken")
    assert "its import fails" in (extension.why_not() or "")
