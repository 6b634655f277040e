"""Which checkpoints of a run are kept, and which is the latest."""

import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from fabric_core.contracts import ABOUT, Checkpoint
from fabric_core.errors import CheckpointError, NoCheckpointError

__all__ = ["LATEST", "check_keep", "latest", "prune"]

LATEST: Final = "latest"
"""The last part of a path that stands for the newest checkpoint in the folder, where nothing has that very name."""

_DIGITS: Final = re.compile(r"\d+")


def check_keep(keep: Any, score: Any, path: Any) -> None:
    """Refuse what can't be kept.

    Raises:
        CheckpointError: ``keep`` is no positive number, ``score`` none at all, or the name has no number to tell
            checkpoints apart by.
    """
    if keep is None:
        return
    if not isinstance(keep, int) or isinstance(keep, bool) or keep < 1:
        raise CheckpointError("keep is a number of checkpoints, 1 at least", where="fabric.save(keep=)", got=repr(keep))
    if score is not None and not isinstance(score, int | float):
        raise CheckpointError(
            "score is a number, of which lower is better", where="fabric.save(score=)", got=repr(score)
        )
    if "://" in str(path):
        raise CheckpointError("keep works in local folders alone", where="fabric.save(keep=)", got=str(path))
    if not _DIGITS.search(Path(path).name):
        raise CheckpointError(
            "without a number in its name, a checkpoint has no others beside it",
            where="fabric.save(keep=)",
            got=str(path),
            instead='a name with the step, such as "checkpoints/step-000100"',
        )


def prune(path: Path, keep: int, score: float | None, formats: Iterable[Checkpoint]) -> None:
    """Delete checkpoints beside one whose names differ in numbers alone, but for some of them and this one.

    Args:
        path: The checkpoint that was just saved.
        keep: How many stay: the newest, or with a score the best, that is the lowest.
        score: This one's score.
        formats: The formats that may recognise one.
    """
    family = _DIGITS.sub("#", path.name)
    others = [one for one in path.parent.iterdir() if _DIGITS.sub("#", one.name) == family and one.name != path.name]
    known = [(one, found) for one in others if (found := _format_of(one, formats)) is not None]
    if score is None:
        ranked = sorted(known, key=lambda one: _saved_at(*one), reverse=True)
    else:
        scores = {one: _score(one, found) for one, found in known}
        # What has no score was not saved to be one of the best, and stays.
        known = [(one, found) for one, found in known if scores[one] is not None]
        ranked = sorted(known, key=lambda one: (scores[one[0]], -_saved_at(*one)))
    for one, found in ranked[keep - 1 :]:
        found.remove(one)


def latest(path: Any, formats: Iterable[Checkpoint]) -> Any:
    """Give the newest checkpoint of a folder for ``folder/latest``, and any other path as it is.

    Raises:
        NoCheckpointError: There is none in the folder.
    """
    if isinstance(path, str) or path.name != LATEST or path.exists() or path.is_symlink():
        return path
    folder = path.parent
    known = []
    if folder.is_dir():
        for one in folder.iterdir():
            found = None if one.name.startswith(".") else _format_of(one, formats)
            if found is not None:
                known.append((one, found))
    if not known:
        raise NoCheckpointError("there is no checkpoint in the folder", where=str(folder))
    return max(known, key=lambda one: _saved_at(*one))[0]


def _format_of(path: Path, formats: Iterable[Checkpoint]) -> Checkpoint | None:
    return next((one for one in formats if one.recognises(path)), None)


def _about(path: Path, found: Checkpoint) -> Mapping[str, Any]:
    with suppress(CheckpointError):
        about = found.describe(path).get(ABOUT, {})
        return about if isinstance(about, Mapping) else {}
    return {}


def _saved_at(path: Path, found: Checkpoint) -> int:
    """Give when it was saved, in nanoseconds; by the file system's clock where it doesn't say."""
    when = _about(path, found).get("saved_at_ns")
    if isinstance(when, int):
        return when
    with suppress(OSError):
        return path.stat().st_mtime_ns
    return 0


def _score(path: Path, found: Checkpoint) -> float | None:
    score = _about(path, found).get("score")
    return score if isinstance(score, int | float) else None
