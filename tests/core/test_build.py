"""setup.py: what it does where it cannot build all of the extension, and that the record says so."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import stat
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent

pytestmark = pytest.mark.cpu_only


@pytest.fixture(autouse=True)
def _needs_setuptools() -> None:
    pytest.importorskip("setuptools")
    pytest.importorskip("pybind11")
    if not (ROOT / "setup.py").exists():
        pytest.skip("these tests run in a source tree")


def build(tmp_path: Path, **environment: str) -> tuple[subprocess.CompletedProcess[str], dict[str, Any] | None]:
    """Run build_ext into tmp_path; returns the process and the record that it left, if any.

    The C++ compiler is one that leaves empty files, where the environment names no other.
    """
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PEFT_KERNELS_", "CUDA_HOME"))}
    clean["CXX"] = fake_cxx(tmp_path)
    result = subprocess.run(
        [sys.executable, "setup.py", "build_ext", f"--build-lib={tmp_path}/lib", f"--build-temp={tmp_path}/temp"],
        cwd=ROOT,
        env={**clean, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    record = tmp_path / "lib" / "peft_kernels" / "_build_info.json"
    return result, json.loads(record.read_text()) if record.exists() else None


def fake_nvcc(
    tmp_path: Path, version: str, archs: tuple[str, ...] = ("90",), compiles: bool = False, home: str = "home"
) -> str:
    """A CUDA_HOME whose nvcc answers questions and fails to compile, or leaves an empty file for a result."""
    script = tmp_path / home / "bin" / "nvcc"
    script.parent.mkdir(parents=True)
    known = "\n".join(f"echo compute_{arch}" for arch in archs)
    compiling = 'for last; do :; done; : > "$last"' if compiles else "echo no such instruction; exit 1"
    script.write_text(
        f'#!/bin/sh\ncase "$1" in\n--version) echo release, V{version} ;;\n--list-gpu-arch)\n{known} ;;\n'
        f"*) {compiling} ;;\nesac\n"
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return str(script.parent.parent)


def fake_cxx(tmp_path: Path, compiles: bool = True) -> str:
    """A CXX, with a flag, that leaves an empty file for a result, or fails."""
    script = tmp_path / f"cxx-{compiles}"
    if not script.exists():
        script.parent.mkdir(parents=True, exist_ok=True)
        script.write_text(
            '#!/bin/sh\nfor last; do :; done; : > "$last"\n' if compiles else "#!/bin/sh\necho bad flag; exit 1\n"
        )
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return shlex.join([str(script), "-a flag"])


Outcome = tuple[subprocess.CompletedProcess[str], dict[str, Any] | None]


def assert_no_cuda(outcome: Outcome, reason: str, built: bool = True) -> None:
    result, record = outcome
    assert result.returncode == 0, result.stderr
    assert record is not None
    assert record["built"] is built and record["cuda"] is False
    assert reason in record["reason"]
    assert reason in result.stderr
    assert ("without the CUDA kernels" if built else "without the extension") in result.stderr


def assert_not_built(outcome: Outcome, reason: str) -> None:
    assert_no_cuda(outcome, reason, built=False)


def extension_in(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "lib" / "peft_kernels").glob("_C*"))


def test_switched_off(tmp_path: Path) -> None:
    assert_no_cuda(build(tmp_path, PEFT_KERNELS_NO_CUDA="1"), "PEFT_KERNELS_NO_CUDA=1 was set")
    assert extension_in(tmp_path)


@pytest.mark.parametrize("also", [{}, {"PEFT_KERNELS_NO_CUDA": "1"}], ids=str)
def test_no_extension_at_all(tmp_path: Path, also: dict[str, str]) -> None:
    home = fake_nvcc(tmp_path, "13.0.88", compiles=True)
    outcome = build(tmp_path, CUDA_HOME=home, PEFT_KERNELS_NO_EXTENSION="1", **also)
    assert_not_built(outcome, "PEFT_KERNELS_NO_EXTENSION=1 was set")
    assert outcome[1]["reason"].count("was set") == 1
    assert not extension_in(tmp_path)


@pytest.mark.parametrize("without", ["PEFT_KERNELS_NO_EXTENSION", "PEFT_KERNELS_NO_CUDA"])
def test_a_wheel_s_tag_says_whether_it_has_a_binary(tmp_path: Path, without: str) -> None:
    commands = [
        *("egg_info", f"--egg-base={tmp_path}"),
        *("build", f"--build-base={tmp_path}/build"),
        *("bdist_wheel", f"--dist-dir={tmp_path}/dist", f"--bdist-dir={tmp_path}/bdist"),
    ]
    environment = {**os.environ, "CXX": fake_cxx(tmp_path), without: "1"}
    environment.pop("PEFT_KERNELS_REQUIRE_CUDA", None)
    command = [sys.executable, "setup.py", *commands]
    subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as contents:
        (about,) = [contents.read(name).decode() for name in contents.namelist() if name.endswith(".dist-info/WHEEL")]
        binaries = [name for name in contents.namelist() if name.endswith(".so")]
    pure = without == "PEFT_KERNELS_NO_EXTENSION"
    assert bool(binaries) is not pure
    assert wheel.name.endswith("-py3-none-any.whl") is pure
    assert (f"Root-Is-Purelib: {str(pure).lower()}" in about) and (("Tag: py3-none-any" in about) is pure)


def test_no_nvcc(tmp_path: Path) -> None:
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    reason = "there is no nvcc on PATH, and CUDA_HOME is not set"
    path = os.pathsep.join([str(nothing), *_without_nvcc()])
    assert_no_cuda(build(tmp_path, PATH=path), reason)


def _without_nvcc() -> list[str]:
    """Folders of PATH that have no nvcc: what the shell and ninja are in."""
    folders = os.environ["PATH"].split(os.pathsep)
    return [folder for folder in folders if not (Path(folder) / "nvcc").exists()]


def test_no_compiler(tmp_path: Path) -> None:
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    outcome = build(tmp_path, PATH=str(nothing), CXX="")
    assert_not_built(outcome, "there is no nvcc on PATH, and CUDA_HOME is not set")
    assert_not_built(outcome, "; for a CPU alone, there is no C++ compiler on PATH (c++, g++, clang++)")


@pytest.mark.parametrize(
    ("given", "reason"),
    [("no-such-compiler -O3", "CXX names 'no-such-compiler', which is not there"), ("g++ 'a", "is no command")],
)
def test_wrong_cxx(tmp_path: Path, given: str, reason: str) -> None:
    assert_not_built(build(tmp_path, CXX=given, PEFT_KERNELS_NO_CUDA="1"), reason)


def test_cxx_that_fails(tmp_path: Path) -> None:
    outcome = build(tmp_path, CXX=fake_cxx(tmp_path, compiles=False), PEFT_KERNELS_NO_CUDA="1")
    assert_not_built(outcome, "bad flag")
    assert_not_built(outcome, "PEFT_KERNELS_NO_CUDA=1 was set")


def test_host_part_is_what_needs_no_cuda(tmp_path: Path) -> None:
    """All of it, and nothing that includes CUDA's headers; CXX keeps its flags."""
    result, _ = build(tmp_path, PEFT_KERNELS_NO_CUDA="1")
    assert result.returncode == 0, result.stderr
    lines = (tmp_path / "temp" / "host" / "build.ninja").read_text().splitlines()
    sources = {line.split()[-1] for line in lines if ": host " in line}
    csrc = ROOT / "csrc"
    assert sources == {str(path) for path in csrc.rglob("*.cpp") if path.stem.endswith("_host")} | {
        str(csrc / "module.cpp")
    }
    assert len(sources) > 2
    (cxx,) = [line for line in lines if line.startswith("cxx = ")]
    assert shlex.split(cxx.removeprefix("cxx = "))[1:] == ["-a flag"]
    (flags,) = [line for line in lines if line.startswith("flags = ")]
    assert not [flag for flag in shlex.split(flags) if flag.startswith(("-m", "-DPEFT_KERNELS_CUDA"))]


@pytest.mark.thorough
def test_host_part_by_the_real_compiler(tmp_path: Path) -> None:
    """It imports with neither torch nor CUDA, and drops."""
    if shutil.which("c++") is None:
        pytest.skip("there is no C++ compiler on PATH")
    result, record = build(tmp_path, CXX="", PEFT_KERNELS_NO_CUDA="1")
    assert result.returncode == 0, result.stderr
    assert record is not None and record["built"] and not record["cuda"]
    (extension,) = extension_in(tmp_path)
    code = (
        "import ctypes, importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('_C', {str(extension)!r})\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "assert 'torch' not in sys.modules and not module.HAS_CUDA\n"
        "seed, mask = ctypes.c_int64(0), (ctypes.c_uint8 * 8)()\n"
        "for level in module.lora.host_levels():\n"
        "    module.lora.host_keep(seed=ctypes.addressof(seed), first_row=0, rows=1, cols=8, threshold=0x5F6F,\n"
        "                          lane=0, threads=1, level=level, out=ctypes.addressof(mask))\n"
        "    print(*mask)\n"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (printed.returncode, printed.stderr) == (0, "")
    # The halves of the published words 5F6FB709 0D893F64 4F121F81 4F730A48, low half first, from 5F6F on.
    assert set(printed.stdout.splitlines()) == {"1 1 0 0 0 0 0 0"}


def test_cuda_home_without_compiler(tmp_path: Path) -> None:
    assert_no_cuda(build(tmp_path, CUDA_HOME=str(tmp_path)), "there is no nvcc in CUDA_HOME's bin")


def test_old_compiler(tmp_path: Path) -> None:
    assert_no_cuda(build(tmp_path, CUDA_HOME=fake_nvcc(tmp_path, "11.8.89")), "version 11.8.89, older than 12.0")


def test_compiler_without_our_architectures(tmp_path: Path) -> None:
    home = fake_nvcc(tmp_path, "12.0.1", archs=("50",))
    assert_no_cuda(build(tmp_path, CUDA_HOME=home), "knows none of the architectures")


@pytest.mark.parametrize("archs", ["75", "80;90b", "80a", "sm_90"])
def test_unknown_architecture(tmp_path: Path, archs: str) -> None:
    home = fake_nvcc(tmp_path, "12.0.1", archs=("80", "90"))
    outcome = build(tmp_path, CUDA_HOME=home, PEFT_KERNELS_CUDA_ARCHS=archs)
    assert_no_cuda(outcome, f"names '{archs.split(';')[-1]}', which nvcc 12.0.1 does not know")


def test_failed_compilation(tmp_path: Path) -> None:
    assert_no_cuda(build(tmp_path, CUDA_HOME=fake_nvcc(tmp_path, "12.0.1")), "no such instruction")


def test_required_build_fails(tmp_path: Path) -> None:
    result, record = build(tmp_path, CUDA_HOME=fake_nvcc(tmp_path, "12.0.1"), PEFT_KERNELS_REQUIRE_CUDA="1")
    assert result.returncode != 0
    assert record is None
    assert "cannot build the CUDA extension: compilation failed" in result.stderr


def test_earlier_extension_is_removed(tmp_path: Path) -> None:
    """A wheel must not hold an extension that its record denies."""
    import sysconfig

    stale = tmp_path / "lib" / "peft_kernels" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    stale.parent.mkdir(parents=True)
    stale.write_text("")
    assert_not_built(build(tmp_path, PEFT_KERNELS_NO_EXTENSION="1"), "PEFT_KERNELS_NO_EXTENSION=1 was set")
    assert not stale.exists()


def test_one_architecture(tmp_path: Path) -> None:
    """PTX of an architecture-specific target runs nowhere else, so none is embedded for 90a alone."""
    home = fake_nvcc(tmp_path, "13.0.88", compiles=True)
    result, record = build(tmp_path, CUDA_HOME=home, PEFT_KERNELS_CUDA_ARCHS="90a", PEFT_KERNELS_REQUIRE_CUDA="1")
    assert result.returncode == 0, result.stderr
    assert record is not None
    assert (record["archs"], record["ptx"]) == (["90a"], None)
    ninja = (tmp_path / "temp" / "build.ninja").read_text()
    assert "-gencode=arch=compute_90a,code=sm_90a" in ninja
    assert "code=compute_" not in ninja
    (flags,) = [line for line in ninja.splitlines() if line.startswith("flags = ")]
    assert '-DPEFT_KERNELS_ARCHS="90a"' in shlex.split(flags.replace("$$", "$"))


@pytest.mark.parametrize("archs", ["80;90a", "80"])
def test_hopper_kernels_are_built_for_hopper(tmp_path: Path, archs: str) -> None:
    """Where Hopper is left out, their launchers, which refuse, still have to link."""
    home = fake_nvcc(tmp_path, "13.0.88", archs=("80", "90"), compiles=True)
    result, _ = build(tmp_path, CUDA_HOME=home, PEFT_KERNELS_CUDA_ARCHS=archs, PEFT_KERNELS_REQUIRE_CUDA="1")
    assert result.returncode == 0, result.stderr
    lines = (tmp_path / "temp" / "build.ninja").read_text().splitlines()
    hopper = "  targets = -gencode=arch=compute_90a,code=sm_90a"
    (every,) = [line for line in lines if line.startswith("targets = ")]
    assert "arch=compute_80,code=sm_80" in every
    followers = {line: lines[i + 1] for i, line in enumerate(lines) if ": device " in line}
    assert any("_sm90.cu.o" in line for line in followers) and any("_sm90" not in line for line in followers)
    for line, follower in followers.items():
        assert (follower == hopper) == ("_sm90.cu.o" in line and "90a" in archs)


HOSTILE = ["a b", "$(touch PWNED)", "`touch PWNED`", 'a"b', "a'b", "a$b", "a;touch PWNED;", "a&b", "a:b", "\udcff"]


@pytest.mark.parametrize("name", HOSTILE)
def test_nothing_in_a_path_is_executed(tmp_path: Path, name: str) -> None:
    """In that of the compiler, of an include folder, of what is built and of where."""
    work = tmp_path / name
    (work / "pybind11").mkdir(parents=True)
    (work / "pybind11" / "__init__.py").write_text("def get_include():\n    return __path__[0]\n")
    home = fake_nvcc(work, "13.0.88", compiles=True, home=name)
    result, record = build(work, CUDA_HOME=home, PYTHONPATH=str(work), PEFT_KERNELS_REQUIRE_CUDA="1")
    assert result.returncode == 0, result.stderr
    assert record is not None and record["built"]
    assert not list(tmp_path.rglob("PWNED")) and not (ROOT / "PWNED").exists()


@pytest.mark.parametrize("name", HOSTILE)
def test_nothing_in_the_path_of_cxx_is_executed(tmp_path: Path, name: str) -> None:
    """Nor in that of an include folder, of what is built and of where, without an nvcc."""
    work = tmp_path / name
    (work / "pybind11").mkdir(parents=True)
    (work / "pybind11" / "__init__.py").write_text("def get_include():\n    return __path__[0]\n")
    result, record = build(work, PYTHONPATH=str(work), PEFT_KERNELS_NO_CUDA="1")
    assert result.returncode == 0, result.stderr
    assert record is not None and record["built"], record
    assert not list(tmp_path.rglob("PWNED")) and not (ROOT / "PWNED").exists()


@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [
        ("PEFT_KERNELS_CUDA_ARCHS", "90a;$(touch PWNED)", "PEFT_KERNELS_CUDA_ARCHS names '$(touch'"),
        ("MAX_JOBS", "1 -t clean", "MAX_JOBS must be a number, got '1 -t clean'"),
        ("MAX_JOBS", "$(touch PWNED)", "MAX_JOBS must be a number"),
    ],
)
def test_nothing_in_a_variable_is_executed(tmp_path: Path, variable: str, value: str, reason: str) -> None:
    home = fake_nvcc(tmp_path, "13.0.88", compiles=True)
    # What is wrong with MAX_JOBS is so for both parts.
    assert_no_cuda(build(tmp_path, **{"CUDA_HOME": home, variable: value}), reason, built=variable != "MAX_JOBS")
    assert not list(tmp_path.rglob("PWNED")) and not (ROOT / "PWNED").exists()


def test_a_line_break_in_a_path_ends_no_statement(tmp_path: Path) -> None:
    home = fake_nvcc(tmp_path, "13.0.88", compiles=True, home="a\nrule b\n  command = touch PWNED\nbuild c: b\n")
    assert_no_cuda(build(tmp_path, CUDA_HOME=home), "ninja has no way to write the control characters of")
    assert not list(tmp_path.rglob("PWNED"))


@pytest.mark.parametrize("variable", ["CUDA_HOME", "PEFT_KERNELS_CUDA_ARCHS", "PEFT_KERNELS_NO_CUDA"])
@pytest.mark.parametrize("value", ["$(shell touch {0})", "'; touch {0}; '", "`touch {0}`", "$(touch {0})"])
def test_make_executes_nothing_in_a_variable(tmp_path: Path, variable: str, value: str) -> None:
    if shutil.which("make") is None or not (ROOT / "Makefile").exists():
        pytest.skip("there is no make on PATH, or no Makefile")
    pwned = tmp_path / "PWNED"
    environment = {**os.environ, variable: value.format(pwned)}
    subprocess.run(["make", "-n", "help"], cwd=ROOT, env=environment, capture_output=True, check=True)
    assert not pwned.exists()
