"""The oldest releases of other libraries that these integrations know, said where one is older."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

# peft: variants of LoRA's layers. transformers: prefixes alone, which need its mask functions.
# adapters: the release that was tried.
_OLDEST = {"peft": "0.18", "transformers": "5.0", "adapters": "1.3"}


def why_too_old(error: ImportError) -> str | None:
    """A sentence with the oldest release that will do, where a name is missing in one of the libraries; else None."""
    library = (error.name or "").partition(".")[0]
    module = sys.modules.get(library)
    if library not in _OLDEST or module is None:
        return None
    installed = getattr(module, "__version__", "another")
    return f"{library} {_OLDEST[library]} or newer is needed, {installed} is installed ({error})"


@contextmanager
def needs(caller: str) -> Iterator[None]:
    """Say in one sentence which release is needed, where a name is missing in a library.

    Raises:
        ImportError: as it was, or with that sentence.
    """
    try:
        yield
    except ImportError as error:
        reason = why_too_old(error)
        if reason is None:
            raise
        raise ImportError(f"{caller}: {reason}", name=error.name, path=error.path) from error
