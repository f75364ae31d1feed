"""What a machine found out about the kernels, kept in a file: one for each signature of a machine, JSON alone.

A record is a convenience. One that is damaged, foreign, unreadable or unwritable is passed over with its reason, which
is said once, and what was found out then holds for the process.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import logging
import os
import re
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch

from peft_kernels._core.device import hardware

DIRECTORY_VARIABLE = "PEFT_KERNELS_CACHE_DIR"
SCHEMA = 1
SECTIONS = ("verdicts", "winners")
INTERPRETER = "interpreter"

_PACKAGE = Path(__file__).resolve().parent.parent
SHIPPED = _PACKAGE / "records"
# How long an update waits for another one. Writing takes milliseconds; beyond this its file system is in trouble.
_UPDATE_WAIT_S = 10.0

Entries = Mapping[str, Any]
on_update: list[Callable[[], None]] = []
"""Called after every update: what was chosen by a record may be chosen differently now."""

_log = logging.getLogger("peft_kernels")
_said: set[str] = set()
_unsaved: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
_lock = threading.RLock()


class Signature(NamedTuple):
    """What a verdict or a time depends on, beside the problem; two machines with one signature share a record.

    Attributes:
        gpu: its name; "interpreter" for Triton's interpreter on CPU tensors.
        arch: compute capability as one number.
        multiprocessors: how many it has.
        driver: version of the GPU's driver.
        torch, triton: versions of the libraries.
        sources: hash of the kernels, of what launches and checks them, and of the built extension.
    """

    gpu: str
    arch: int
    multiprocessors: int
    driver: str
    torch: str
    triton: str
    sources: str

    @property
    def file_name(self) -> str:
        digest = hashlib.sha256(json.dumps(self).encode()).hexdigest()[:16]
        return f"{re.sub(r'[^a-z0-9]+', '-', self.gpu.lower()).strip('-')[:40]}-sm{self.arch}-{digest}.json"


@dataclass(frozen=True)
class Record:
    """What is on record for a signature.

    Attributes:
        verdicts: by a kernel's key, as verdicts.py writes them.
        winners: by shape class, the candidate that was fastest.
        path: the file that is read and written; None where there can be none.
        source: where what is in it comes from, in words.
        reason: why the file is not read or not written, or what is odd about where it is; or None.
    """

    verdicts: Entries
    winners: Entries
    path: Path | None
    source: str
    reason: str | None


def signature(device: torch.device) -> Signature:
    """The signature of a device; that of any CPU is the interpreter's."""
    if device.type != "cuda":
        return Signature(INTERPRETER, 0, 0, "none", str(torch.__version__), _triton_version(), source_hash())
    return _cuda_signature(torch.cuda.current_device() if device.index is None else device.index)


@cache
def source_hash() -> str:
    """Hash of all whose change may make a right kernel wrong, or a check of it another one."""
    digest = hashlib.sha256()
    names = ("triton_tools.py", "triton_math.py", "tma.py", "cuda_tools.py", "judge.py", "testing.py")
    for path in sorted(_PACKAGE.rglob("*.py")):
        inside = path.relative_to(_PACKAGE)
        if "kernels" in inside.parts[:-1] or path.stem.endswith(("_impl", "qualification")) or path.name in names:
            digest.update(inside.as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    for path in (*sorted(_PACKAGE.glob("_C.*")), _PACKAGE / "_build_info.json"):
        with contextlib.suppress(FileNotFoundError):
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def directory() -> tuple[Path | None, str | None]:
    """The folder of the records, and what a user should know of it; or None and why there is none."""
    given = os.environ.get(DIRECTORY_VARIABLE)
    try:
        if not given:
            return _users_cache() / "peft_kernels", None
        path = Path(given).expanduser()
    except (RuntimeError, KeyError, OSError) as error:
        return None, f"there is no cache directory: {error}; {DIRECTORY_VARIABLE} names one"
    if path.is_absolute():
        return path, None
    return path.absolute(), f"{DIRECTORY_VARIABLE} is a relative path, taken from the working directory: {path}"


def read(machine: Signature) -> Record:
    """What is on record: shipped with the package, in the file, and found out by this process, later over earlier."""
    folder, reason = directory()
    path = None if folder is None else folder / machine.file_name
    merged: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    sources = []
    for file, what in ((SHIPPED / machine.file_name, "shipped"), (path, "file")):
        found, wrong = (None, None) if file is None else _load(file, machine)
        reason = wrong or reason
        if found is not None:
            sources.append(f"{what} {file}")
            _merge(merged, found)
    with _lock:
        if machine in _unsaved:
            sources.append("this process, which could not write it")
            _merge(merged, _unsaved[machine])
    _say(reason)
    return Record(**merged, path=path, source=", ".join(sources) or "none", reason=reason)


def update(machine: Signature, section: str, entries: Entries, replace: bool = False, keep: bool = False) -> Record:
    """Add entries to a section of the record, beside what other processes wrote there.

    Args:
        machine: whose record.
        section: a name of ``SECTIONS``.
        entries: JSON values by key; a key that is there gets the new value.
        replace: whether what is there in the section goes.
        keep: whether a key that is there keeps its value, as where several processes found out the same.

    Returns:
        The record as it is now; its ``reason`` says why it holds for this process alone, if it does.

    Raises:
        ValueError: the section is unknown, or an entry is no JSON.
    """
    if section not in SECTIONS:
        raise ValueError(f"section must be one of {', '.join(SECTIONS)}, got {section!r}")
    try:
        added = json.loads(json.dumps(dict(entries), allow_nan=False))
    except TypeError as error:
        raise ValueError(f"entries must be JSON: {error}") from error
    with _lock:
        waiting = _unsaved.setdefault(machine, {name: {} for name in SECTIONS})
        if keep:
            waiting[section] = {**added, **waiting[section]}
        else:
            waiting[section] = added if replace else {**waiting[section], **added}
        wrong = _save(machine, waiting, replaced=section if replace else None, kept=section if keep else None)
        if wrong is None:
            del _unsaved[machine]
    _say(wrong)
    for call in on_update:
        call()
    record = read(machine)
    return record if wrong is None else Record(**{**vars(record), "reason": wrong})


class Refusal(NamedTuple):
    """Why a lock is not held: another process held it for as long as was waited (busy), or there can be none."""

    reason: str
    is_busy: bool


@contextlib.contextmanager
def locked(path: Path, timeout_s: float) -> Iterator[Refusal | None]:
    """Hold a file's lock; the operating system frees it when its holder ends, however that ends.

    Yields:
        None, or why the lock is not held.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+b")
    except OSError as error:
        yield Refusal(f"no lock: {_text(error)}", is_busy=False)
        return
    with file:
        yield _acquire(file, timeout_s)


def _acquire(file: IO[bytes], timeout_s: float) -> Refusal | None:
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            _try_lock(file)
            return None
        except (BlockingIOError, PermissionError):
            if time.monotonic() >= deadline:
                return Refusal(f"another process has held {file.name} for {timeout_s:.0f} s", is_busy=True)
            time.sleep(0.05)
        except OSError as error:
            # Some network file systems have no locks.
            return Refusal(f"no lock: {_text(error)}", is_busy=False)


def _try_lock(file: IO[bytes]) -> None:
    if sys.platform == "win32":
        import msvcrt

        file.seek(0)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)


def _save(machine: Signature, added: dict[str, dict[str, Any]], replaced: str | None, kept: str | None) -> str | None:
    """Write the file, merged with what is there; or say why not. A reader sees the old file or the new one, whole."""
    folder, reason = directory()
    if folder is None:
        return reason
    path = folder / machine.file_name
    with locked(path.with_suffix(".lock"), _UPDATE_WAIT_S):
        # Without the lock two writers may lose one's entries, which are found out again; the file stays whole.
        merged: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
        found, _ = _load(path, machine)
        if found is not None:
            _merge(merged, {name: entries for name, entries in found.items() if name != replaced})
        there = dict(merged[kept]) if kept is not None else {}
        _merge(merged, added)
        if kept is not None:
            merged[kept].update(there)
        text = json.dumps({"schema": SCHEMA, "signature": machine._asdict(), **merged}, indent=1, sort_keys=True)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _replace(path, text.encode())
        except OSError as error:
            return f"the record of this machine cannot be written: {_text(error)}"
    return None


def _replace(path: Path, data: bytes) -> None:
    handle, name = tempfile.mkstemp(prefix=path.stem, suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def _load(path: Path, machine: Signature) -> tuple[dict[str, dict[str, Any]] | None, str | None]:
    """The sections of a file and None, None and why it is passed over, or neither where there is no file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None, None
    except OSError as error:
        return None, f"the record of this machine cannot be read: {_text(error)}"
    except (ValueError, RecursionError) as error:
        return None, f"the record {path} is passed over, it is no JSON ({_text(error)})"
    wrong = _why_not_record(content, machine)
    if wrong is not None:
        return None, f"the record {path} is passed over, {wrong}"
    return {section: content.get(section, {}) for section in SECTIONS}, None


def _why_not_record(content: Any, machine: Signature) -> str | None:
    if not isinstance(content, dict):
        return f"it must be an object, got {type(content).__name__}"
    if content.get("schema") != SCHEMA:
        return f"its schema must be {SCHEMA}, got {content.get('schema')!r}"
    if content.get("signature") != machine._asdict():
        return "it is another machine's"
    for section in SECTIONS:
        if not isinstance(content.get(section, {}), dict):
            return f"its {section} must be an object, got {type(content[section]).__name__}"
    return None


def _merge(into: dict[str, dict[str, Any]], added: Mapping[str, Entries]) -> None:
    for section, entries in added.items():
        into[section].update(entries)


def _users_cache() -> Path:
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA")
        return Path(local) if local else Path.home() / "AppData" / "Local"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    given = os.environ.get("XDG_CACHE_HOME", "")
    # The base directory specification: a relative path is to be ignored.
    return Path(given) if os.path.isabs(given) else Path.home() / ".cache"


@cache
def _cuda_signature(index: int) -> Signature:
    chip = hardware(torch.device("cuda", index))
    name = torch.cuda.get_device_properties(index).name
    return Signature(
        name, chip.arch, chip.sm_count, _driver(), str(torch.__version__), _triton_version(), source_hash()
    )


def _driver() -> str:
    """The driver's own version where Linux shows it, else that of the CUDA interface that it has."""
    with contextlib.suppress(OSError):
        found = re.search(r"\s(\d+\.\d+(\.\d+)?)\s", Path("/proc/driver/nvidia/version").read_text())
        if found is not None:
            return found[1]
    interface = getattr(torch._C, "_cuda_getDriverVersion", None)  # builds for CUDA have it
    return "unknown" if interface is None else f"CUDA {interface()}"


def _triton_version() -> str:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _say(reason: str | None) -> None:
    """A log line and not a warning, which a program may have turned into an error."""
    if reason is not None and reason not in _said:
        _said.add(reason)
        _log.warning("%s", reason)
