"""Whether the ranks see the same files."""

import tempfile
import time
from pathlib import Path
from typing import Any

from fabric_core.contracts import Strategy

__all__ = ["is_shared_filesystem"]


def is_shared_filesystem(strategy: Strategy, path: str | Path | None = None, timeout: int = 3) -> bool:
    """Find out whether every rank sees what rank 0 writes into a folder; every rank must call it.

    Args:
        strategy: The strategy, after ``launch``.
        path: The folder; by default the current one. A URL is shared.
        timeout: How many seconds a rank waits for the file to show.

    Raises:
        FileNotFoundError: There is no such folder on any of the ranks.
    """
    if path is not None and "://" in str(path):
        return True
    folder = Path.cwd() if path is None else Path(path)
    collectives: Any = strategy.collectives
    if collectives.world_size == 1:
        _check(folder.exists(), folder)
        return True
    _check(_all(collectives, folder.exists()), folder)
    if not _all(collectives, collectives.broadcast(folder.resolve(), 0) == folder.resolve()):
        return False
    with tempfile.TemporaryDirectory() if collectives.rank else tempfile.TemporaryDirectory(dir=folder) as mine:
        name = collectives.broadcast(Path(mine).name, 0)
        end = time.monotonic() + timeout
        while not (seen := (folder / name).exists()) and time.monotonic() < end:
            time.sleep(0.05)
        return _all(collectives, seen)


def _all(collectives: Any, yes: bool) -> bool:
    return all(collectives.broadcast(yes, rank) for rank in range(collectives.world_size))


def _check(exists: bool, folder: Path) -> None:
    if not exists:
        raise FileNotFoundError(f"to find out whether it is shared, {folder} must exist on every rank")
