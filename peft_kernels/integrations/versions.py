"""The releases of other libraries that these integrations know, said where one is older or too new.

`make test-oldest` runs tests with exactly these of PEFT and transformers.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# peft: variants of LoRA's layers. transformers: prefixes and prompts alone, which need its mask functions as they are
# called since then. adapters: the release that was tried.
OLDEST = {"peft": "0.18", "transformers": "5.4", "adapters": "1.3"}
# The next major release, of which nothing is known.
TOO_NEW = {"transformers": "6.0"}


def require(library: str) -> None:
    """Refuse a release of an imported library in which the same names take other arguments.

    Raises:
        ImportError: it is older than what is known, or too new.
    """
    installed = _numbers(sys.modules[library].__version__)
    if installed < _numbers(OLDEST[library]) or (library in TOO_NEW and installed >= _numbers(TOO_NEW[library])):
        raise ImportError("the same functions take other arguments there", name=library)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)[:2]))


def why_other_release(error: ImportError) -> str | None:
    """A sentence with the releases that will do, where an import failed for one of the libraries; else None."""
    library = (error.name or "").partition(".")[0]
    module = sys.modules.get(library)
    if library not in OLDEST or module is None:
        return None
    installed = getattr(module, "__version__", "another")
    newest = f" and older than {TOO_NEW[library]}" if library in TOO_NEW else ""
    return f"{library} {OLDEST[library]} or newer{newest} is needed, {installed} is installed ({error})"


@contextmanager
def needs(caller: str) -> Iterator[None]:
    """Say in one sentence which release is needed, where a library is older.

    Raises:
        ImportError: as it was, or with that sentence.
    """
    try:
        yield
    except ImportError as error:
        reason = why_other_release(error)
        if reason is None:
            raise
        raise ImportError(f"{caller}: {reason}", name=error.name, path=error.path) from error
