"""Which checkpoints of a run are kept, and which is the latest."""

import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any, Final

from fabric_core.contracts import ABOUT, Checkpoint
from fabric_core.errors import CheckpointError, NoCheckpointError
from fabric_core.running.paths import is_url, name_of, named_beside
from fabric_core.running.recognising import is_of, reaches

__all__ = ["LATEST", "check_keep", "latest", "prune"]

LATEST: Final = "latest"
"""The last part of a path that stands for the newest checkpoint in the folder, where nothing has that very name."""

_DIGITS: Final = re.compile(r"\d+")


def check_keep(keep: Any, score: Any, path: Any) -> None:
    """Refuse what can't be kept.

    Raises:
        CheckpointError: ``keep`` is no positive number, ``score`` none that can be compared, or the name has no number
            to tell checkpoints apart by.
    """
    if score is not None and (not isinstance(score, int | float) or isinstance(score, bool) or math.isnan(score)):
        raise CheckpointError(
            "score is a number, of which lower is better",
            where="fabric.save(score=)",
            got=f"{score!r:.80}",
            instead="a float, such as loss.item(); none at all where it is not a number",
        )
    if keep is None:
        return
    if not isinstance(keep, int) or isinstance(keep, bool) or keep < 1:
        raise CheckpointError("keep is a number of checkpoints, 1 at least", where="fabric.save(keep=)", got=repr(keep))
    if not _DIGITS.search(name_of(path)):
        raise CheckpointError(
            "without a number in its name, a checkpoint has no others beside it",
            where="fabric.save(keep=)",
            got=str(path),
            instead='a name with the step, such as "checkpoints/step-000100"',
        )


def prune(path: Any, keep: int, score: float | None, formats: Iterable[Checkpoint]) -> None:
    """Delete checkpoints beside one whose names differ in numbers alone, but for some of them and this one.

    Args:
        path: The checkpoint that was just saved.
        keep: How many stay: the newest, or with a score the best, that is the lowest.
        score: This one's score.
        formats: The formats that may recognise one.
    """
    own = name_of(path)
    family = _DIGITS.sub("#", own)
    known = [
        (one, found)
        for name, one, found in _checkpoints_beside(path, formats, lambda name: _DIGITS.sub("#", name) == family)
        if name != own
    ]
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
    if name_of(path) != LATEST or (not is_url(path) and os.path.lexists(path)) or _format_of(path, formats):
        return path
    known = [
        (one, found)
        for _, one, found in _checkpoints_beside(
            path, formats, lambda name: not name.startswith(".") and name != LATEST
        )
    ]
    if not known:
        where = named_beside(path, "") if is_url(path) else path.parent
        raise NoCheckpointError("there is no checkpoint in the folder", where=str(where))
    return max(known, key=lambda one: _saved_at(*one))[0]


def _checkpoints_beside(
    path: Any, formats: Iterable[Checkpoint], wanted: Callable[[str], bool]
) -> Iterator[tuple[str, Any, Checkpoint]]:
    """Give name, path and format of the checkpoints in a path's folder."""
    lister = next((one for one in formats if reaches(one, path)), None)
    for name in [] if lister is None else lister.names_beside(path):
        one = named_beside(path, name)
        found = _format_of(one, formats) if wanted(name) else None
        if found is not None:
            yield name, one, found


def _format_of(path: Any, formats: Iterable[Checkpoint]) -> Checkpoint | None:
    return next((one for one in formats if reaches(one, path) and is_of(one, path)), None)


def _about(path: Any, found: Checkpoint) -> Mapping[str, Any]:
    with suppress(CheckpointError):
        about = found.describe(path).get(ABOUT, {})
        return about if isinstance(about, Mapping) else {}
    return {}


def _saved_at(path: Any, found: Checkpoint) -> int:
    """Give when it was saved, in nanoseconds; by the file system's clock where it doesn't say."""
    when = _about(path, found).get("saved_at_ns")
    if isinstance(when, int):
        return when
    with suppress(OSError):
        return 0 if is_url(path) else int(path.stat().st_mtime_ns)
    return 0


def _score(path: Any, found: Checkpoint) -> float | None:
    score = _about(path, found).get("score")
    return score if isinstance(score, int | float) and not math.isnan(score) else None
