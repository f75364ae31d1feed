"""What setup.py hands to ninja: the statements that compile and link the extension, and how ninja is run.

Paths and words may hold anything; nothing of them is run by a shell.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

NINJA_VERSION = "ninja_required_version = 1.5"
HOST_SOURCES = ("module.cpp", "*_host.cpp")  # all other sources include CUDA's headers
# The sources take a processor's instructions function by function, and ask it first; a flag would put them everywhere.
# Contraction would make bits depend on which of them ran. Where no operation traps, a loop that selects is vectorised.
HOST_FLAGS = ("-fPIC", "-fvisibility=hidden", "-pthread", "-ffp-contract=off", "-fno-trapping-math", "-Wall", "-Wextra")


class CannotBuild(Exception):
    """Reason why the extension, or its CUDA part, is not built."""


def ninja_text(
    nvcc: str, archs: tuple[str, ...], ptx: str | None, csrc: Path, includes: list[str], extension: Path
) -> str:
    machine_code = {arch: f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs}
    targets = list(machine_code.values())
    if ptx is not None:
        targets.append(f"-gencode=arch=compute_{ptx},code=compute_{ptx}")
    flags = [
        "-std=c++17",
        "-O3",
        "-lineinfo",
        *(f"-Xcompiler={flag}" for flag in HOST_FLAGS),
        "-DPEFT_KERNELS_CUDA",
        f'-DPEFT_KERNELS_ARCHS="{";".join(archs)}"',
        *(f"-I{path}" for path in (csrc, *includes)),
    ]
    # torch loads a CUDA runtime of its own, with its symbols visible to every library. Those of the static runtime must
    # stay inside the extension, or its calls would end in torch's, which may be another version.
    link_flags = ["-shared", "-cudart=static", "-Xlinker=--exclude-libs,ALL"]

    lines = [
        NINJA_VERSION,
        f"nvcc = {command(nvcc)}",
        f"flags = {command(*flags)}",
        f"targets = {command(*targets)}",
        *rule("device", "$nvcc $flags $targets"),
        *rule("host", "$nvcc $flags"),
        *link_rule("$nvcc", *link_flags),
    ]
    objects: list[str] = []
    for kind, pattern in (("device", "*.cu"), ("host", "*.cpp")):
        for source in sorted(csrc.rglob(pattern)):
            lines.append(compilation(kind, source, csrc, objects))
            # Kernels for Hopper alone, whose launchers refuse every other device: elsewhere they would be traps.
            if source.stem.endswith("_sm90") and "90a" in machine_code:
                lines.append(f"  targets = {command(machine_code['90a'])}")
    lines.append(f"build {escaped_path(str(extension))}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


def host_ninja_text(compiler: tuple[str, ...], csrc: Path, includes: list[str], extension: Path) -> str:
    flags = ["-std=c++17", "-O3", *HOST_FLAGS, *(f"-I{path}" for path in (csrc, *includes))]
    lines = [
        NINJA_VERSION,
        f"cxx = {command(*compiler)}",
        f"flags = {command(*flags)}",
        *rule("host", "$cxx $flags"),
        *link_rule("$cxx", "-shared", "-pthread"),
    ]
    objects: list[str] = []
    for source in sorted(path for pattern in HOST_SOURCES for path in csrc.rglob(pattern)):
        lines.append(compilation("host", source, csrc, objects))
    lines.append(f"build {escaped_path(str(extension))}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


def rule(kind: str, compiler: str) -> tuple[str, ...]:
    """How a source becomes an object, and which headers it was made of."""
    compiling = f"  command = {compiler} -MD -MF $out.d -c $in -o $out"
    return "", f"rule {kind}", compiling, f"  description = {kind} $in", "  depfile = $out.d", "  deps = gcc"


def link_rule(compiler: str, *flags: str) -> tuple[str, ...]:
    linking = f"  command = {compiler} {command(*flags)} $in -o $out"
    return "", "rule link", linking, "  description = link $out", ""


def compilation(kind: str, source: Path, csrc: Path, objects: list[str]) -> str:
    """The statement that makes a source's object, which joins the others."""
    objects.append(escaped_path(f"{source.relative_to(csrc).as_posix()}.o"))
    return f"build {objects[-1]}: {kind} {escaped_path(str(source))}"


def is_plain(path: str | Path) -> bool:
    """Whether a shell leaves a path as it is between double quotes, where nvcc puts it in commands of its own."""
    return re.search(r'[$`"\\]', str(path)) is None


def plain(path: str | Path, links: Path) -> str:
    """The path, or a plain link to it."""
    if is_plain(path):
        return str(path)
    link = links / str(len(list(links.iterdir())))
    link.symlink_to(path)
    return str(link)


def command(*words: str) -> str:
    """Words of a command as ninja hands them to sh, which runs nothing that stands in them."""
    return shlex.join(on_one_line(word) for word in words).replace("$", "$$")


def escaped_path(path: str) -> str:
    """A path among ninja's own, which it quotes for sh by itself."""
    return on_one_line(path).replace("$", "$$").replace(":", "$:").replace(" ", "$ ")


def on_one_line(text: str) -> str:
    if re.search(r"[\x00-\x1f\x7f]", text):
        raise CannotBuild(f"ninja has no way to write the control characters of {text!r}")
    return text


def write_if_changed(path: Path, text: str) -> None:
    content = os.fsencode(text)  # paths in it may be no UTF-8
    if not path.exists() or path.read_bytes() != content:
        path.write_bytes(content)


def run_ninja(ninja_file: Path) -> None:
    try:
        import ninja

        executable = os.path.join(ninja.BIN_DIR, "ninja")
    except ImportError:
        executable = shutil.which("ninja") or ""
    if not executable:
        raise CannotBuild("there is no ninja on PATH, and the package ninja is not installed")
    jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
    if not re.fullmatch(r"[0-9]+", jobs):
        raise CannotBuild(f"MAX_JOBS must be a number, got {jobs!r}")
    words = [executable, "-C", str(ninja_file.parent), "-j", jobs]
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        output = []
        for line in process.stdout or ():
            print(line, end="", flush=True)
            output.append(line)
    if process.returncode != 0:
        raise CannotBuild(f"compilation failed; the end of its output:\n{''.join(output)[-2000:]}")
