"""Where a checkpoint lies: a local path, or the text of a URL."""

import os
from pathlib import Path
from typing import Any, Final

from fabric_core.errors import CheckpointError

__all__ = ["as_path", "is_url", "name_of", "named_beside"]

_LOCAL: Final = ("file://", "local://")
"""How URLs of local files begin: these are paths, so that what holds for paths holds for them."""


def as_path(path: str | os.PathLike[str]) -> Any:
    """Give a local path, or the text of a URL.

    Raises:
        CheckpointError: It is neither.
    """
    text = os.fspath(path) if isinstance(path, str | os.PathLike) else ""
    if not isinstance(text, str) or "\0" in text or not text.strip():
        raise CheckpointError("the path names no file or folder", where="path", got=repr(path))
    for start in _LOCAL:
        text = text.removeprefix(start)
    return text if is_url(text) else Path(text)


def is_url(path: Any) -> bool:
    """Say whether a path is the text of a URL."""
    return isinstance(path, str) and "://" in path


def name_of(path: Any) -> str:
    """Give the last part of a path or URL."""
    return path.rstrip("/").rpartition("/")[2] if isinstance(path, str) else path.name


def named_beside(path: Any, name: str) -> Any:
    """Give the path or URL of another name in the same folder."""
    return f"{path.rstrip('/').rpartition('/')[0]}/{name}" if isinstance(path, str) else path.with_name(name)
