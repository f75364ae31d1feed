"""Build of the extension `peft_kernels._C`, and a wheel's tag; everything else is declared in pyproject.toml.

It has two parts: what a CPU runs, which any C++17 compiler builds, and the CUDA kernels, which take an nvcc. Each is
optional. What cannot be built is left out, the reason is printed and recorded in the package's `_build_info.json`, and
the package installs without it; `pip install --verbose .` shows what is printed. A wheel without the extension runs
everywhere, and its tag says so: py3-none-any. Environment variables of the build:

    PEFT_KERNELS_NO_CUDA=1         leave the CUDA kernels out
    PEFT_KERNELS_NO_EXTENSION=1    build no extension at all
    PEFT_KERNELS_REQUIRE_CUDA=1    fail where the CUDA kernels cannot be built
    PEFT_KERNELS_CUDA_ARCHS        architectures, such as "80;90a"; else all of ARCHS that the nvcc knows
    CUDA_HOME                      whose bin/nvcc to take; else the first nvcc on PATH
    CXX                            the C++ compiler where there is no nvcc; else the first of CXX_NAMES on PATH
    MAX_JOBS                       compilers to run at a time; else as many as there are cores
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # a build by pip does not look here

from setup_ninja import (  # noqa: E402
    CannotBuild,
    host_ninja_text,
    is_plain,
    ninja_text,
    plain,
    run_ninja,
    write_if_changed,
)

CSRC = ROOT / "csrc"
ARCHS = ("80", "86", "89", "90a", "100")
OLDEST_NVCC = (12, 0)  # the first with sm_90a
CXX_NAMES = ("c++", "g++", "clang++")


@dataclass(frozen=True)
class BuildRecord:
    """What `_build_info.json` holds.

    Attributes:
        built: whether the extension is there.
        cuda: whether it has the CUDA kernels.
        reason: why not the one or the other.
        archs: architectures with machine code.
        ptx: architecture whose PTX is embedded for GPUs that came later, or None.
        nvcc: its version, where it built the extension.
        python_abi: file name suffix of the extension, which says what Python loads it.
    """

    built: bool
    cuda: bool = False
    reason: str | None = None
    archs: tuple[str, ...] = ()
    ptx: str | None = None
    nvcc: str | None = None
    python_abi: str | None = None


@dataclass(frozen=True)
class Nvcc:
    path: str
    version: str
    known_archs: frozenset[str]


class BuildExtension(build_ext):
    """build_ext through ninja and nvcc or the C++ compiler, which records what it did beside the extension."""

    def run(self) -> None:
        extension = Path(self.get_ext_fullpath(self.extensions[0].name)).resolve()
        record_file = extension.parent / "_build_info.json"
        # Neither an extension nor a record of an earlier build may pass for this one's.
        extension.unlink(missing_ok=True)
        record_file.unlink(missing_ok=True)
        extension.parent.mkdir(parents=True, exist_ok=True)
        record = build(extension, Path(self.build_temp).resolve())
        print(f"peft_kernels: {summary(record)}", file=sys.stdout if record.cuda else sys.stderr)
        record_file.write_text(json.dumps(asdict(record), indent=2) + "\n")

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if os.path.exists(path)]

    def get_output_mapping(self) -> dict[str, str]:
        return {new: old for new, old in super().get_output_mapping().items() if os.path.exists(old)}


def summary(record: BuildRecord) -> str:
    """What was built, or why not, in one line."""
    if record.cuda:
        return f"built the CUDA extension for {', '.join(record.archs)} with nvcc {record.nvcc}"
    if record.built:
        return f"built what a CPU runs; installs without the CUDA kernels: {record.reason}"
    return f"installs without the extension: {record.reason}"


class Wheel(bdist_wheel):
    """bdist_wheel, which knows only after the build whether there is a binary in it."""

    def get_tag(self) -> tuple[str, str, str]:
        # An editable wheel is named before anything is built.
        if self.distribution.have_run.get("build_ext") and not self.get_finalized_command("build_ext").get_outputs():
            self.root_is_pure = True
        return super().get_tag()


def build(extension: Path, build_dir: Path) -> BuildRecord:
    """Compile and link what of the extension can be built here; fail where CUDA is required and cannot be."""
    try:
        return build_cuda(extension, build_dir)
    except CannotBuild as error:
        if os.environ.get("PEFT_KERNELS_REQUIRE_CUDA") == "1":
            raise SystemExit(f"peft_kernels: cannot build the CUDA extension: {error}") from None
        reason = str(error)
    try:
        return build_host(extension, build_dir / "host", reason)
    except CannotBuild as error:
        # What forbids the one often forbids the other.
        both = reason if str(error) == reason else f"{reason}; for a CPU alone, {error}"
        return BuildRecord(built=False, reason=both)


def build_cuda(extension: Path, build_dir: Path) -> BuildRecord:
    """Build both parts by nvcc.

    Raises:
        CannotBuild: with the reason.
    """
    refuse_if_set("PEFT_KERNELS_NO_EXTENSION")
    refuse_if_set("PEFT_KERNELS_NO_CUDA")
    nvcc = find_nvcc()
    archs = choose_archs(nvcc)
    ptx = ptx_arch(archs)

    def text(csrc: Path, includes: list[str], library: Path, links: Path) -> str:
        compiler = os.path.join(plain(Path(nvcc.path).parent, links), "nvcc")
        return ninja_text(compiler, archs, ptx, csrc, includes, library)

    compile_by_ninja(extension, build_dir, text)
    return BuildRecord(built=True, cuda=True, archs=archs, ptx=ptx, nvcc=nvcc.version, python_abi=python_abi())


def build_host(extension: Path, build_dir: Path, why_no_cuda: str) -> BuildRecord:
    """Build what a CPU runs by the C++ compiler alone.

    Raises:
        CannotBuild: with the reason.
    """
    refuse_if_set("PEFT_KERNELS_NO_EXTENSION")
    compiler = find_cxx()

    def text(csrc: Path, includes: list[str], library: Path, links: Path) -> str:
        return host_ninja_text(compiler, csrc, includes, library)

    compile_by_ninja(extension, build_dir, text)
    return BuildRecord(built=True, reason=why_no_cuda, python_abi=python_abi())


def refuse_if_set(variable: str) -> None:
    if os.environ.get(variable) == "1":
        raise CannotBuild(f"{variable}=1 was set at build time")


def python_abi() -> str:
    return sysconfig.get_config_var("EXT_SUFFIX")


def compile_by_ninja(extension: Path, build_dir: Path, text: Callable[[Path, list[str], Path, Path], str]) -> None:
    """Run ninja on ``text(csrc, includes, library, folder for links)``, where no path holds what a shell would read."""
    includes = [str(CSRC), pybind11_include(), sysconfig.get_path("include")]
    missing = [path for path in includes if not Path(path).is_dir()]
    if missing:
        raise CannotBuild(f"the include folder {missing[0]} does not exist")
    with tempfile.TemporaryDirectory() as folder:
        links = Path(folder)
        # nvcc asks for its working folder, so that a link to it would not do.
        ninja_file = (build_dir if is_plain(build_dir) else links / "build") / "build.ninja"
        ninja_file.parent.mkdir(parents=True, exist_ok=True)
        sources, *others = (plain(path, links) for path in includes)
        library = Path(plain(extension.parent, links)) / extension.name
        write_if_changed(ninja_file, text(Path(sources), others, library, links))
        run_ninja(ninja_file)


def find_cxx() -> tuple[str, ...]:
    """The C++ compiler's command: CXX, which may hold flags or a launcher such as ccache, or one on PATH."""
    given = os.environ.get("CXX", "").strip()
    if given:
        try:
            words = shlex.split(given)
        except ValueError as error:
            raise CannotBuild(f"CXX={given!r} is no command: {error}") from error
        if shutil.which(words[0]) is None:
            raise CannotBuild(f"CXX names {words[0]!r}, which is not there")
        return tuple(words)
    for name in CXX_NAMES:
        path = shutil.which(name)
        if path is not None:
            return (path,)
    raise CannotBuild(f"there is no C++ compiler on PATH ({', '.join(CXX_NAMES)}), and CXX is not set")


def find_nvcc() -> Nvcc:
    home = os.environ.get("CUDA_HOME")
    path = shutil.which(os.path.join(home, "bin", "nvcc")) if home else shutil.which("nvcc")
    if path is None:
        where = "in CUDA_HOME's bin" if home else "on PATH, and CUDA_HOME is not set"
        raise CannotBuild(f"there is no nvcc {where}")
    match = re.search(r"\bV(\d+)\.(\d+)\.(\d+)", output_of([path, "--version"]))
    if match is None:
        raise CannotBuild(f"{path} --version names no version")
    version = tuple(int(number) for number in match.groups())
    if version[:2] < OLDEST_NVCC:
        oldest = ".".join(map(str, OLDEST_NVCC))
        raise CannotBuild(f"{path} is version {match[0].strip('V')}, older than {oldest}")
    known = re.findall(r"compute_(\w+)", output_of([path, "--list-gpu-arch"]))
    return Nvcc(path, match[0].strip("V"), frozenset(known))


def output_of(command: list[str]) -> str:
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        details = getattr(error, "stderr", None) or ""
        raise CannotBuild(f"{' '.join(command)} failed: {error} {details}".strip()) from error
    return result.stdout


def choose_archs(nvcc: Nvcc) -> tuple[str, ...]:
    """The architectures to build for, oldest first."""

    def is_known(arch: str) -> bool:
        # The list leaves out the architecture-specific names, which exist for 90 and everything after it.
        number = arch.rstrip("af")
        return number in nvcc.known_archs and (number == arch or int(number) >= 90)

    requested = re.split(r"[;,\s]+", os.environ.get("PEFT_KERNELS_CUDA_ARCHS", "").strip("; ,"))
    if requested == [""]:
        chosen = [arch for arch in ARCHS if is_known(arch)]
        if not chosen:
            raise CannotBuild(f"nvcc {nvcc.version} knows none of the architectures {', '.join(ARCHS)}")
    else:
        chosen = list(dict.fromkeys(requested))
        for arch in chosen:
            if not re.fullmatch(r"\d{2,3}[af]?", arch) or not is_known(arch):
                raise CannotBuild(f"PEFT_KERNELS_CUDA_ARCHS names {arch!r}, which nvcc {nvcc.version} does not know")
    return tuple(sorted(chosen, key=arch_number))


def arch_number(arch: str) -> int:
    return int(arch.rstrip("af"))


def ptx_arch(archs: tuple[str, ...]) -> str | None:
    """The newest architecture whose PTX later GPUs can run, which that of "90a" and the like is not."""
    return max((arch for arch in archs if arch.isdigit()), key=arch_number, default=None)


def pybind11_include() -> str:
    try:
        import pybind11
    except ImportError as error:
        raise CannotBuild(f"pybind11 cannot be imported: {error}") from error
    return pybind11.get_include()


def package_version() -> str:
    text = (ROOT / "peft_kernels" / "__init__.py").read_text()
    match = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    if match is None:
        raise SystemExit('peft_kernels/__init__.py has no line __version__ = "..."')
    return match[1]


setup(
    version=package_version(),
    # setuptools only needs the name: the compilers take the sources from csrc.
    ext_modules=[Extension("peft_kernels._C", sources=[])],
    cmdclass={"build_ext": BuildExtension, "bdist_wheel": Wheel},
)
