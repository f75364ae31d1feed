"""What a worker of the session has made, the others find."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path


def made_once(name: str, make: Callable[[Path], None]) -> Path:
    """The folder of this name, which the first worker to ask fills by ``make``; others wait for it.

    Where ``make`` raises, nothing is kept.
    """
    folder = Path(os.environ["PEFT_KERNELS_TESTS_BUILD"], name)
    partial = folder.with_suffix(".partial")
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            make(partial)
            partial.rename(folder)
    return folder
