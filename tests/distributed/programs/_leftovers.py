"""What a run may leave behind: processes, pieces of shared memory, files."""

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

SECONDS: Final = 10.0
"""How long after a failure everything has ended, and nothing is left."""
_SHARED: Final = Path("/dev/shm")  # noqa: S108 - it is looked at


def until_none(left: Callable[[], set[str]], failed: float) -> None:
    """Wait until nothing is left, as long as there is time."""
    while (remaining := left()) and time.time() - failed < SECONDS:
        time.sleep(0.1)
    assert remaining == set()


def shared_memory(but: str = "\0") -> set[str]:
    """Name the pieces of shared memory, but for those that begin with something."""
    return {one.name for one in _SHARED.iterdir() if not one.name.startswith(but)} if _SHARED.exists() else set()


def processes(mark: str) -> set[str]:
    """Name the processes that were started with ``CELL=mark`` in their environment (Linux tells)."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"CELL={mark}".encode() in (folder / "environ").read_bytes():
                found.add(f"{folder.name} {(folder / 'cmdline').read_text()}")
    return found
