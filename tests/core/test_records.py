"""A machine's record: whole or passed over, shared by processes, and never in the way."""

from __future__ import annotations

import errno
import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from peft_kernels._core import records
from peft_kernels._core.records import Signature

MACHINE = Signature("Toy GPU (TM) 40/80", 90, 132, "580.65", "2.13.0", "3.8.0", "0123456789abcdef")
RIGHT = {"a/triton/b": {"kind": "right"}}


@pytest.fixture(autouse=True)
def own_state(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A folder, and a memory, of the test's own."""
    monkeypatch.setenv(records.DIRECTORY_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(records, "_unsaved", {})
    monkeypatch.setattr(records, "_said", set())


def _path(tmp_path: Path) -> Path:
    return tmp_path / "cache" / MACHINE.file_name


def _forget_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "_unsaved", {})


def test_what_is_written_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = records.read(MACHINE)
    assert (empty.verdicts, empty.winners, empty.source, empty.reason) == ({}, {}, "none", None)
    records.update(MACHINE, "verdicts", RIGHT)
    records.update(MACHINE, "winners", {"m": "torch"})
    again = records.update(MACHINE, "verdicts", {"c": [1, None]})
    _forget_process(monkeypatch)
    record = records.read(MACHINE)
    assert record == again
    assert record.verdicts == {**RIGHT, "c": [1, None]}
    assert record.winners == {"m": "torch"}
    assert record.path == _path(tmp_path) and record.source == f"file {_path(tmp_path)}" and record.reason is None
    assert [path.suffix for path in sorted(_path(tmp_path).parent.iterdir())] == [".json", ".lock"]


def test_a_name_says_whose_it_is() -> None:
    assert MACHINE.file_name.startswith("toy-gpu-tm-40-80-sm90-")
    names = {MACHINE._replace(**{name: value}).file_name for name, value in (("driver", "1"), ("sources", "2"))}
    assert len(names | {MACHINE.file_name}) == 3


def test_replacing_a_section_leaves_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    records.update(MACHINE, "verdicts", RIGHT)
    records.update(MACHINE, "winners", {"m": "torch"})
    records.update(MACHINE, "verdicts", {}, replace=True)
    _forget_process(monkeypatch)
    assert (records.read(MACHINE).verdicts, records.read(MACHINE).winners) == ({}, {"m": "torch"})


def test_updates_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft_kernels._core import dispatch

    before = dispatch.generation
    records.update(MACHINE, "winners", {"m": "torch"})
    assert dispatch.generation == before + 1


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "no JSON"),
        (b'{"schema": 1, "verdicts": {"a": ', "no JSON"),
        (b"\xff\xfe\x00nonsense", "no JSON"),
        (b"[" * 100_000, "no JSON"),
        (b"[1, 2]", "must be an object, got list"),
        (json.dumps({"schema": 2}).encode(), "its schema must be 1, got 2"),
        (json.dumps({"schema": 1, "signature": {}}).encode(), "another machine's"),
        (json.dumps({"schema": 1, "signature": MACHINE._replace(driver="1")._asdict()}).encode(), "another machine's"),
        (json.dumps({"schema": 1, "signature": MACHINE._asdict(), "verdicts": []}).encode(), "verdicts must be an obj"),
        (json.dumps({"schema": 1, "signature": MACHINE._asdict(), "winners": 3}).encode(), "winners must be an object"),
    ],
    ids=["empty", "truncated", "binary", "deep", "list", "schema", "unsigned", "foreign", "verdicts", "winners"],
)
def test_what_is_no_record_is_passed_over(
    content: bytes, why: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _path(tmp_path).parent.mkdir()
    _path(tmp_path).write_bytes(content)
    for _ in range(2):
        record = records.read(MACHINE)
        assert record.verdicts == {} and record.source == "none"
        assert record.reason is not None and why in record.reason
    assert len(caplog.messages) == 1 and str(_path(tmp_path)) in caplog.text
    # The next update begins it anew.
    assert records.update(MACHINE, "verdicts", RIGHT).verdicts == RIGHT
    assert json.loads(_path(tmp_path).read_text())["verdicts"] == RIGHT


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    import pickle

    _path(tmp_path).parent.mkdir()
    _path(tmp_path).write_bytes(pickle.dumps({"schema": 1}))
    assert "no JSON" in str(records.read(MACHINE).reason)
    assert "pickle" not in Path(records.__file__).read_text()


def test_shipped_records_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "SHIPPED", tmp_path / "shipped")
    (tmp_path / "shipped").mkdir()
    content = {"schema": 1, "signature": MACHINE._asdict(), "verdicts": {"a": 1, "b": 1}, "winners": {}}
    (tmp_path / "shipped" / MACHINE.file_name).write_text(json.dumps(content))
    record = records.read(MACHINE)
    assert record.verdicts == {"a": 1, "b": 1} and record.source.startswith("shipped ")
    own = records.update(MACHINE, "verdicts", {"b": 2})
    assert own.verdicts == {"a": 1, "b": 2} and ", file " in own.source
    assert json.loads((tmp_path / "shipped" / MACHINE.file_name).read_text()) == content


def _holds_for_this_process(why: str, caplog: pytest.LogCaptureFixture) -> None:
    for value in (1, 2):
        record = records.update(MACHINE, "verdicts", {"a": value})
        assert record.verdicts == {"a": value}
        assert record.reason is not None and why in record.reason
    assert records.read(MACHINE).verdicts == {"a": 2}
    assert "this process" in records.read(MACHINE).source
    assert sum(why in message for message in caplog.messages) == 1


def test_cache_directory_that_is_a_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "cache").write_text("")
    assert "cannot be read: NotADirectoryError" in str(records.read(MACHINE).reason)
    _holds_for_this_process("cannot be written: ", caplog)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES], ids=["full", "read-only", "denied"])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_disk_that_takes_nothing(
    number: int, call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    records.update(MACHINE, "winners", {"kept": 1})

    def refuse(*arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, call, refuse)
    for value in (1, 2):
        record = records.update(MACHINE, "verdicts", {"a": value})
        assert record.verdicts == {"a": value} and record.winners == {"kept": 1}
        assert f"cannot be written: {type(OSError(number, '')).__name__}" in str(record.reason)
    assert sum("cannot be written" in message for message in caplog.messages) == 1
    monkeypatch.undo()
    # Nothing half is left, and what was there is.
    assert not list(tmp_path.rglob("*.tmp"))
    assert json.loads(_path(tmp_path).read_text())["winners"] == {"kept": 1}


def test_what_could_not_be_written_is_written_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache").write_text("")
    records.update(MACHINE, "verdicts", {"a": 1})
    (tmp_path / "cache").unlink()
    records.update(MACHINE, "winners", {"m": "torch"})
    _forget_process(monkeypatch)
    assert (records.read(MACHINE).verdicts, records.read(MACHINE).winners) == ({"a": 1}, {"m": "torch"})


def test_unreadable_record(tmp_path: Path) -> None:
    _path(tmp_path).mkdir(parents=True)  # a folder where the file should be
    assert "cannot be read: IsADirectoryError" in str(records.read(MACHINE).reason)
    assert records.update(MACHINE, "verdicts", RIGHT).verdicts == RIGHT


def test_no_home(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.delenv(records.DIRECTORY_VARIABLE)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("Could not determine home")))
    folder, reason = records.directory()
    assert folder is None and "PEFT_KERNELS_CACHE_DIR names one" in str(reason)
    _holds_for_this_process("there is no cache directory: Could not determine home", caplog)
    assert records.read(MACHINE).path is None


@pytest.mark.skipif(sys.platform != "linux", reason="the rules of one platform")
def test_directories_of_linux(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for given, cache, expected in (
        ("~/records", "", tmp_path / "records"),
        ("", str(tmp_path / "xdg"), tmp_path / "xdg" / "peft_kernels"),
        ("", "relative", tmp_path / ".cache" / "peft_kernels"),
        ("", "", tmp_path / ".cache" / "peft_kernels"),
    ):
        monkeypatch.setenv(records.DIRECTORY_VARIABLE, given)
        monkeypatch.setenv("XDG_CACHE_HOME", cache)
        assert records.directory() == (expected, None)
    monkeypatch.setenv(records.DIRECTORY_VARIABLE, "some/where")
    folder, remark = records.directory()
    assert folder == tmp_path / "some" / "where" and "is a relative path" in str(remark)
    assert records.update(MACHINE, "verdicts", RIGHT).verdicts == RIGHT
    assert (tmp_path / "some" / "where" / MACHINE.file_name).is_file()
    monkeypatch.setenv(records.DIRECTORY_VARIABLE, "~nobody-of-that-name/x")
    assert records.directory()[0] is None


def test_wrong_updates_are_errors() -> None:
    with pytest.raises(ValueError, match="section must be one of verdicts, winners, got 'verdict'"):
        records.update(MACHINE, "verdict", {})
    for entry in (float("nan"), torch.ones(1), {1, 2}):
        with pytest.raises(ValueError):
            records.update(MACHINE, "verdicts", {"a": entry})
    assert records.read(MACHINE).verdicts == {}


_WRITE = """
import sys
from peft_kernels._core import records
machine = records.Signature(*{machine!r})
for i in range(20):
    records.update(machine, "winners", {{f"{{sys.argv[1]}}-{{i}}": i}})
"""


def _start(program: str, *arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", program, *arguments])


@pytest.mark.thorough
def test_processes_lose_nothing_of_each_other(tmp_path: Path) -> None:
    writers = [_start(_WRITE.format(machine=tuple(MACHINE)), str(i)) for i in range(3)]
    assert [writer.wait(120) for writer in writers] == [0, 0, 0]
    assert len(records.read(MACHINE).winners) == 60


_HOLD = """
import sys, time
from pathlib import Path
from peft_kernels._core import records
with records.locked(Path(sys.argv[1]), 1.0) as refusal:
    print(refusal, flush=True)
    time.sleep(600)
"""


def test_a_lock_ends_with_its_holder(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    holder = subprocess.Popen([sys.executable, "-c", _HOLD, str(path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "None\n"
        start = time.monotonic()
        with records.locked(path, 0.3) as refusal:
            assert refusal is not None and refusal.is_busy and "another process has held" in refusal.reason
        assert 0.3 <= time.monotonic() - start < 10
    finally:
        holder.kill()
        holder.wait(30)
    with records.locked(path, 10.0) as refusal:
        assert refusal is None


def test_no_lock_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(file: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(records, "_try_lock", refuse)
    with records.locked(tmp_path / "lock", 60.0) as refusal:
        assert refusal is not None and not refusal.is_busy and "No locks available" in refusal.reason
    assert records.update(MACHINE, "verdicts", RIGHT).reason is None


def test_interpreter_is_a_machine() -> None:
    machine = records.signature(torch.device("cpu"))
    assert machine.gpu == records.INTERPRETER and machine.torch == torch.__version__
    assert machine.file_name.startswith("interpreter-")


def test_signature_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    properties: Any = SimpleNamespace(name="NVIDIA H200", major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    records._cuda_signature.cache_clear()
    from peft_kernels._core import device

    device._cuda_hardware.cache_clear()
    try:
        machine = records.signature(torch.device("cuda", 0))
    finally:
        records._cuda_signature.cache_clear()
        device._cuda_hardware.cache_clear()
    assert machine[:3] == ("NVIDIA H200", 90, 132) and machine.driver and len(machine.sources) == 16


def test_sources_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel's change, or that of the built extension, asks for a new record; that of a module does not."""
    monkeypatch.setattr(records, "_PACKAGE", tmp_path)
    (tmp_path / "lora" / "kernels").mkdir(parents=True)
    hashes = [records.source_hash.__wrapped__()]
    for name in ("lora/kernels/triton_fwd.py", "lora/triton_impl.py", "lora/qualification.py", "_C.so", "testing.py"):
        (tmp_path / name).write_text("1")
        hashes.append(records.source_hash.__wrapped__())
    assert len(set(hashes)) == len(hashes)
    (tmp_path / "lora" / "module.py").write_text("1")
    assert records.source_hash.__wrapped__() == hashes[-1]


def test_a_reason_is_no_warning(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    """A program may have turned warnings into errors."""
    (tmp_path / "cache").write_text("")
    logging.getLogger("peft_kernels").propagate = True
    records.update(MACHINE, "verdicts", RIGHT)
    assert not list(recwarn)
