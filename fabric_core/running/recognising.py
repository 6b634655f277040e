"""Which format a checkpoint is of; nothing there, and nothing to be seen, are two errors."""

import os
from collections.abc import Iterable
from typing import Any

from fabric_core.choosing.offers import causes
from fabric_core.contracts import Checkpoint
from fabric_core.errors import CheckpointError, FabricError, NoCheckpointError
from fabric_core.running.paths import is_url, name_of

__all__ = ["is_of", "reaches", "recognise"]


def reaches(one: Checkpoint, path: Any) -> bool:
    """Say whether a format can read and write at a path: behind a URL not every one can."""
    return one.capabilities.remote or not is_url(path)


def is_of(one: Checkpoint, path: Any) -> bool:
    """Say whether a checkpoint is of a format.

    Raises:
        CheckpointError: The format can't tell.
    """
    try:
        return bool(one.recognises(path))
    except (FabricError, OSError, KeyboardInterrupt):
        raise
    except BaseException as error:  # a stranger's code may raise anything
        kind = type(one)
        raise CheckpointError(
            f"the checkpoint format {kind.__name__} can't be used: recognises failed: {causes(error)}",
            where=str(path),
            instead=f"fix it ({kind.__module__}), or FABRIC_DISABLE_PLUGINS with its name where it isn't needed",
        ) from error


def recognise(path: Any, formats: Iterable[tuple[str, Checkpoint]]) -> tuple[str, Checkpoint]:
    """Give the first format that recognises a checkpoint, with its name.

    Raises:
        NoCheckpointError: Nothing lies there.
        CheckpointError: Something does that no format recognises, or it can't be seen whether something does,
            or a format can't tell.
    """
    usable = [(name, one) for name, one in formats if reaches(one, path)]
    for name, one in usable:
        if is_of(one, path):
            return name, one
    if not _lies_there(path, usable):
        raise NoCheckpointError("there is no checkpoint", where=str(path))
    raise CheckpointError(
        "no installed format recognises the checkpoint",
        where=str(path),
        got=f"formats: {', '.join(name for name, _ in usable)}",
    )


def _lies_there(path: Any, formats: list[tuple[str, Checkpoint]]) -> bool:
    # A script that takes "none" for an answer starts anew, and saves over what it could not see.
    if is_url(path):
        return any(name_of(path) in one.names_beside(path) for _, one in formats[:1])
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return False
    except OSError as error:
        raise CheckpointError(f"the checkpoint can't be read: {error.strerror}", where=str(path)) from error
    if not os.access(path, os.R_OK):
        raise CheckpointError("the checkpoint can't be read: Permission denied", where=str(path))
    return True
