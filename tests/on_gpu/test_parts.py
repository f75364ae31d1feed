"""The tables: every part names programs and files that are there, and selects tests; and the program around them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import environment
from tests.on_gpu import __main__ as program
from tests.on_gpu import cache, parts
from tests.on_gpu.runner import MORE, Part

pytestmark = pytest.mark.cpu_only

OUT = Path("out")


def tables() -> list[Part]:
    found = [part for table in parts.TABLES.values() for part in table(OUT, "toy")]
    return list({part.name: part for part in found}.values())


@pytest.mark.parametrize("name", parts.TABLES)
def test_names_are_those_of_files(name: str) -> None:
    names = [part.name for part in parts.TABLES[name](OUT, "toy")]
    assert len(set(names)) == len(names)
    assert all(part == environment.slug(part) for part in names)


@pytest.mark.parametrize("part", tables(), ids=lambda part: part.name)
def test_commands_name_what_is_there(part: Part) -> None:
    paths = [word for word in part.command if word.startswith(("tests/", "benchmarks/"))]
    assert all((parts.ROOT / path).exists() for path in paths)
    if part.command[1:2] == ("-m",):
        module = part.command[2].replace(".", "/")
        here = [parts.ROOT / f"{module}.py", parts.ROOT / module / "__main__.py"]
        assert any(path.exists() for path in here)
    assert part.least_s <= part.timeout_s


def test_first_asks_for_what_is_cheap_and_decides_most_first() -> None:
    names = [part.name for part in parts.first(OUT, "toy")]
    kernels = [name for name in names if name.startswith("cuda-")]
    triton = [name for name in names if name.startswith("triton-")]
    assert names[:3] == ["machine", "build", "info"]
    assert kernels[0] == "cuda-decode"
    assert kernels[-2:] == ["cuda-gemm", "cuda-repeated"]
    after = names[3 + len(kernels) :]
    assert after == ["qualify", "sample", "memcheck", "racecheck", *triton, "tests"]
    assert triton == [f"triton-{family}" for family in ("prompt", "lora", "adapter", "prefix")]


def test_sanitizer_comes_last_where_time_is_no_matter() -> None:
    assert [part.name for part in parts.everything(OUT, "toy")][-2:] == ["memcheck", "racecheck"]


@pytest.mark.thorough
def test_each_family_s_cuda_kernels_are_asked_and_each_selection_finds_tests() -> None:
    found = {}
    for part in parts.first(OUT, "toy"):
        if part.name.startswith("cuda-"):
            selection = part.command[3 : part.command.index("-m", 3)]
            command = [sys.executable, "-m", "pytest", *selection, "--collect-only", "-q"]
            result = subprocess.run(command, cwd=parts.ROOT, capture_output=True, text=True, check=False)
            found[part.name] = {line for line in result.stdout.splitlines() if "::" in line}
    assert all(found.values())
    assert found["cuda-decode"] | found["cuda-gemm"] < found["cuda-repeated"]
    assert not found["cuda-decode"] & found["cuda-gemm"]
    assert len({path.parent.name for path in parts.ROOT.glob("tests/*/test_cuda_on_gpu.py")}) == len(found) - 2


def test_slug_is_the_benchmarks() -> None:
    for name in ("NVIDIA H100 80GB HBM3", "cpu", "AMD EPYC (TM) 9654"):
        assert parts.slug(name) == environment.slug(name)


def test_a_table_is_run_and_summed_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a cache that was brought, and verdicts on record beside the rest."""
    header = {"commit": None, "dirty": None, "sources": "0", "versions": {}, "device": "Toy GPU"}
    code = "import os; print(os.environ['TRITON_CACHE_DIR'], os.environ['PEFT_KERNELS_CACHE_DIR'])"
    table = [Part("told", (sys.executable, "-c", code), 60, 0.1), Part("later", ("true",), 900, 800)]
    monkeypatch.setattr(program, "asked", lambda: header)
    monkeypatch.setitem(parts.TABLES, "first", lambda out, device: table)
    for name in ("TRITON_CACHE_DIR", "PEFT_KERNELS_CACHE_DIR"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    brought = tmp_path / "cache"
    brought.mkdir()
    options = ["first", "--out", str(tmp_path), "--cache", str(brought), "--budget-s", "100"]
    assert program.main(options) == MORE
    folder = tmp_path / "toy-gpu" / "first"
    assert (folder / "told.log").read_text().split() == [str(brought), str(tmp_path / "toy-gpu" / "qualification")]
    rows = {row["part"]: row["status"] for row in json.loads((folder / "summary.json").read_text())["parts"]}
    assert rows == {"told": "ok", "later": "not begun"}
    assert "summary.md" in capsys.readouterr().out


def _kernel(folder: Path, key: str = "KEY") -> Path:
    """A kernel in a cache, as Triton leaves it, with what is not needed at a launch."""
    where = folder / key
    where.mkdir(parents=True)
    names = [f"k.{suffix}" for suffix in ("source", "ttir", "cubin", "json")]
    for name in names:
        (where / name).write_text(name)
    (where / "__grp__k.json").write_text(json.dumps({"child_paths": {name: str(where / name) for name in names}}))
    return where


def _children(folder: Path, key: str = "KEY") -> dict[str, str]:
    return json.loads((folder / key / "__grp__k.json").read_text())["child_paths"]


def test_a_cache_is_packed_and_ready_where_it_is_brought(tmp_path: Path) -> None:
    made, there = tmp_path / "made", tmp_path / "there" / "cache"
    _kernel(made)
    (made / cache.PROGRESS / "0").mkdir(parents=True)
    (made / cache.PROGRESS / "tests.jsonl").write_text("{}")
    there.parent.mkdir()
    cache.pack(made).rename(cache.packed(there))
    assert cache.bring(there)
    assert sorted(path.name for path in there.glob("*/*")) == ["__grp__k.json", "k.cubin", "k.json"]
    assert _children(there) == {name: str(there / "KEY" / name) for name in ("k.cubin", "k.json")}

    # A newer pack adds to it, what is added there stays, and another place is another set of paths.
    _kernel(made, "NEWER")
    cache.pack(made).rename(cache.packed(there))
    assert cache.bring(there)
    assert len(_children(there, "NEWER")) == 2
    _kernel(there, "NEW")
    moved = tmp_path / "moved"
    there.rename(moved)
    assert cache.bring(moved)
    for key in ("KEY", "NEW", "NEWER"):
        assert all(Path(path).is_relative_to(moved) and Path(path).exists() for path in _children(moved, key).values())


def test_without_a_cache_there_is_none(tmp_path: Path) -> None:
    assert not cache.bring(tmp_path / "nowhere")
