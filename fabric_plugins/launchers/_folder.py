"""The folder of a launch, which is removed with what its ranks left, even where a launch was killed."""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Final

__all__ = ["launch_folder", "remove_semaphores"]

_PREFIX: Final = "fabric-"
"""Short, as is what follows: sockets lie in the folder, whose paths have at most 107 characters."""
_KERNEL: Final = Path("/proc/sys/kernel/random/boot_id")
"""Locks tell whether a launch still runs among the processes of one kernel; a temporary folder may have others."""
_SEMAPHORES: Final = Path("/dev/shm")  # noqa: S108 - it is where Linux has them


@contextlib.contextmanager
def launch_folder() -> Iterator[Path]:
    """Make a folder, after removing those of launches that were killed.

    Who holds the lock of a folder uses it: the process that made it, and those that it forked.
    """
    kernel = _KERNEL.read_text(encoding="ascii")[:4] if _KERNEL.exists() else None
    if kernel is not None:
        _remove_abandoned(f"{_PREFIX}{kernel}-")
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{kernel or 0}-"))
        with contextlib.ExitStack() as stack:
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            with contextlib.suppress(
                OSError
            ):  # a file system without locks, whose folders nobody can take for abandoned
                lock = os.open(folder, os.O_RDONLY)
                stack.callback(os.close, lock)
                fcntl.flock(lock, fcntl.LOCK_EX)
            if folder.exists():  # another launch may have come between
                yield folder
                return


def _remove_abandoned(prefix: str) -> None:
    for folder in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:  # another user's, or in use
            lock = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, lock)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
            remove_semaphores(folder)


def remove_semaphores(folder: Path, *, tracked: bool = False) -> None:
    """Remove the semaphores of a launch, which ranks that were killed left.

    Args:
        folder: The launch's, after which they are named.
        tracked: Whether this process's tracker knows them, and would warn of them at its end.
    """
    for file in _SEMAPHORES.glob(f"sem.{folder.name}-*"):
        file.unlink(missing_ok=True)
        if tracked:
            resource_tracker.unregister(file.name.replace("sem.", "/", 1), "semaphore")
