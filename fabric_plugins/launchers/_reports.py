"""What the agent of the elastic launcher learns of a rank's failure, and what ranks learn of each other's end."""

import contextlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from fabric_core.contracts import ProcessInfo
from fabric_core.errors import RankFailedError

__all__ = [
    "REPORT",
    "failed",
    "has_returned",
    "missing_ranks",
    "note_end",
    "note_return",
    "read_report",
    "report_agent",
    "report_folder",
    "was_ended",
    "write_report",
]

REPORT: Final = "TORCHELASTIC_FABRIC_REPORT"
"""The variable that tells a rank how it was started, by which process, and where to report: ``function:PID:PATH``."""
_ENDED: Final = (-signal.SIGTERM, -signal.SIGINT)
"""How the ranks end that the agent ends, which it notices after those that it ends them for."""


class RankTraceback(Exception):  # noqa: N818 - it is the traceback of one
    """The traceback of a rank, shown as the cause of the error that names the rank."""


def write_report(error: BaseException, rank: int) -> bool:
    """Leave a report of the first failure, unless there is one.

    Returns:
        Whether the agent will show the error.
    """
    how, _, path = _told()
    if not path:
        return False
    kind = type(error)
    report = {
        "rank": rank,
        "type": kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}",
        "message": str(error),
        "trace": "".join(traceback.format_exception(error)),
    }
    with contextlib.suppress(OSError), Path(path).open("x", encoding="utf-8", errors="replace") as file:
        json.dump(report, file)
    return how == "function"


def report_folder() -> Path:
    """Give, in a rank, the folder of its report, which the agent removes."""
    return Path(_told()[2]).parent


def report_agent() -> int:
    """Give, in a rank, the process that started it."""
    return int(_told()[1])


def _told() -> tuple[str, str, str]:
    """Give the parts of the variable, in a rank; three empty ones elsewhere."""
    how, _, rest = os.environ.get(REPORT, "").partition(":")
    agent, _, path = rest.partition(":")
    return how, agent, path


def read_report(path: Path) -> Mapping[str, Any] | None:
    """Give the report of the first failure, if a rank left one."""
    try:
        report: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return report


def note_end() -> None:
    """Note, in the agent, that it ends the ranks now."""
    with contextlib.suppress(OSError):
        _end_note().touch()


def was_ended() -> bool:
    """Say, in a rank of a function, whether the agent has begun to end the ranks."""
    return _end_note().exists()


def note_return(rank: int) -> None:
    """Note, in a rank, that it has come to the end of its function."""
    _return_note(rank).touch()


def has_returned(rank: int) -> bool:
    """Say, in the agent, whether a rank has come to the end of its function."""
    return _return_note(rank).exists()


def _end_note() -> Path:
    return Path(_told()[2]).with_suffix(".end")


def _return_note(rank: int) -> Path:
    return Path(_told()[2]).with_suffix(f".{rank}")


def failed(failures: Mapping[int, Any], report: Mapping[str, Any] | None, gone: Sequence[int] = ()) -> RankFailedError:
    """Make the error of ranks that failed; the first is the one that reported, or that nobody ended."""
    first = min(failures, key=lambda rank: failures[rank].exitcode in _ENDED)  # of several, the one noticed first
    if report is not None:
        first = report["rank"]
    code = failures[first].exitcode if first in failures else 1
    how = f"by signal {_signal_name(-code)}" if code < 0 else f"with exit code {code}"
    where = f"rank {first}" + (f", process {failures[first].pid}" if first in failures else "")
    if code == 0:
        how = "by ending before its function had returned"
    cause = "" if report is None else f": {report['type']}: {report['message']}"
    before = [str(rank) for rank in gone if rank != first]
    others = f"rank {', '.join(before)} had ended before, without a failure" if before else "the other ranks were ended"
    error = RankFailedError(
        f"rank {first} failed first, {how}{cause}; {others}",
        where=where,
        rank=first,
        exit_code=128 - code if code < 0 else code or 1,
        exception_type=None if report is None else report["type"],
        exception_message=None if report is None else report["message"],
        trace=None if report is None else report["trace"],
    )
    if report is not None:
        error.__cause__ = RankTraceback(f"on rank {first}\n\n{report['trace']}")
    return error


def missing_ranks(info: ProcessInfo) -> list[int]:
    """Give the ranks of this node whose processes are gone, as far as the system tells (Linux does).

    A rank's process is found by its variables, so that one that was wrapped in another command is found too. Runs may
    have one id, as ``torchrun`` gives them by default, but they meet at different ports.
    """
    if not sys.platform.startswith("linux") or os.environ.get(REPORT, "").startswith("function:"):
        return []
    found = {folder.name: _rank_of(folder) for folder in Path("/proc").iterdir() if folder.name.isdecimal()}
    own = found.get(str(os.getpid()))
    if own is None or own[1] != info.global_rank:
        return []  # its variables were set after it was started, as the others' may have been
    there = {one[1] for one in found.values() if one is not None and one[0] == own[0]}
    first = info.global_rank - info.local_rank
    return [rank for rank in range(first, first + info.local_world_size) if rank not in there]


def _rank_of(folder: Path) -> tuple[tuple[bytes | None, ...], int] | None:
    """Give the run and the rank that a process was started with, if it was."""
    with contextlib.suppress(OSError, ValueError):
        lines = (folder / "environ").read_bytes().split(b"\0")
        variables = dict(line.partition(b"=")[::2] for line in lines)
        if variables.get(b"TORCHELASTIC_RUN_ID"):
            run = tuple(variables.get(name) for name in (b"TORCHELASTIC_RUN_ID", b"MASTER_ADDR", b"MASTER_PORT"))
            return run, int(variables.get(b"RANK", -1))
    return None


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return str(number)
