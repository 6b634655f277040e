"""What rules for launchers share: starting ranks as a script does, and what is left of it."""

import ctypes
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch

from fabric_core.conformance import snapshot
from fabric_core.conformance.bench import Bench, Place, folder_of_its_own
from fabric_core.conformance.pool import VARIABLES
from fabric_core.conformance.rule import Broken
from fabric_core.contracts import Launcher, LaunchOrder, ProcessInfo
from fabric_core.errors import LaunchError, RankFailedError

__all__ = [
    "FRESH",
    "SOON",
    "alone",
    "end_with_parent",
    "in_new_interpreter",
    "left_behind",
    "refuses",
    "run",
    "set_up_and_undo",
    "start",
    "start_ranks",
    "two_ranks",
]

SOON: Final = 12.0
"""How many seconds something has to come, or to end."""
FRESH: Final[Mapping[signal.Signals, Any]] = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
"""The handlers of a fresh process."""


def alone() -> None:
    """Be a process that nothing launched."""
    for name in VARIABLES:
        os.environ.pop(name, None)


def start(plugin: Launcher, function: Callable[..., Any] | None, *args: Any, **order: Any) -> tuple[str, Any]:
    """Start ranks; say what came of it: ``ran``, ``refused``, or ``raised``."""
    try:
        return "ran", plugin.start(LaunchOrder(function=function, args=args, **{"processes": 2, **order}))
    except BaseException as error:  # noqa: BLE001 - what it raises is what is asked
        return "refused" if refuses(error) else "raised", f"{type(error).__name__}: {error}"[:300]


def refuses(error: BaseException) -> bool:
    """Say whether a launcher refuses by an error, and ran nothing."""
    return isinstance(error, LaunchError) and not isinstance(error, RankFailedError)


def _as_rank(place: Place, fails: int | None) -> Any:
    info = place.plugin().detect(dict(os.environ))
    rank = -1 if info is None else info.global_rank
    if rank == fails:
        raise ZeroDivisionError("the kit's own")
    return rank, None if info is None else info.world_size, b"x" * 3_000_000


def start_ranks(place: Place, fails: int | None, **order: Any) -> tuple[str, Any, list[str]]:
    """Start ranks, two by default, of which one may fail; say what came of it, and what is left.

    Rank 0 gives its rank, the number of ranks, and 3 MB.
    """
    alone()
    before = snapshot.take()
    outcome, result = start(place.plugin(), _as_rank, place, fails, **order)
    return outcome, result, left_behind(before)


def _start_two(place: Place) -> tuple[str, Any, list[str]]:
    seen = start_ranks(place, None)
    return seen if seen[0] != "refused" or seen[2] else start_ranks(place, None, start_method="fork")


def two_ranks(bench: Bench) -> tuple[str, Any, list[str]]:
    """Give what ``start_ranks`` gives, by whichever method the launcher doesn't refuse.

    Where both are ``refused`` it starts no ranks, and has nothing to end.
    """
    seen: tuple[str, Any, list[str]] = bench.once(_start_two)
    return seen


def left_behind(before: snapshot.Snapshot) -> list[str]:
    """Name what is no longer as it was."""
    # PyTorch's own engine draws a port from Python's generator; the process that starts others trains nothing itself.
    return [name for name in snapshot.differences(before) if not name.startswith("the random state")]


def in_new_interpreter(place: Place, function: Callable[..., Any], *args: Any) -> tuple[Any, str]:
    """Run ``function(place, *args)`` in a new interpreter; give what it returned, and what was said on standard error.

    Raises:
        Broken: It did not come back.
    """
    with folder_of_its_own() as folder:
        (folder / "order").write_bytes(pickle.dumps((function, place, args)))
        done = run([sys.executable, "-c", f"from {__name__} import obey; obey({str(folder)!r})"], folder)
        if not (folder / "answer").exists():
            raise Broken(f"the process that started ranks ended with {done.returncode}: {done.stderr[-500:]}")
        return pickle.loads((folder / "answer").read_bytes()), done.stderr  # noqa: S301 - our own


def obey(folder: str) -> None:
    """Do what ``in_new_interpreter`` asks, in a process that hears its signals, also where its parent ignores them."""
    end_with_parent()
    for one, handler in FRESH.items():
        signal.signal(one, handler)
    function, place, args = pickle.loads(Path(folder, "order").read_bytes())  # noqa: S301 - our own
    answer = function(place, *args)
    Path(folder, "answer").write_bytes(pickle.dumps(answer))


def end_with_parent() -> None:
    """Let Linux kill this process when the one that started it is gone, which a wrong launcher may have made hang."""
    if sys.platform == "linux":
        parent_death_signal = 1
        ctypes.CDLL(None).prctl(parent_death_signal, signal.SIGKILL)


def run(command: list[str], folder: Path) -> "subprocess.CompletedProcess[str]":
    """Run a command in a folder, as from a shell of its own, where this interpreter's modules are found."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(
        command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )


def set_up_and_undo(plugin: Launcher, info: ProcessInfo) -> list[str]:
    """Set a rank up and undo it, under circumstances that matter; say what is wrong."""
    found = []
    many = 4 * (os.cpu_count() or 1)
    crowded = replace(info, world_size=many * info.world_size, local_world_size=many * info.local_world_size)
    for one, threads in ((info, None), (crowded, None), (info, "3")):
        with snapshot.restored():
            if threads is None:
                os.environ.pop("OMP_NUM_THREADS", None)
            else:
                os.environ["OMP_NUM_THREADS"] = threads
                torch.set_num_threads(int(threads))
            before = snapshot.take()
            plugin.setup_process(one)
            if threads is not None and torch.get_num_threads() != int(threads):
                found.append(f"with OMP_NUM_THREADS={threads} a rank has {torch.get_num_threads()} threads")
            plugin.teardown()
            # A thread that looks on may stay; so may what only starting it imported.
            left = [name for name in snapshot.differences(before) if name != "threads"]
            if left:
                found.append(f"torn down, a rank has other {', '.join(left)} than before")
    return found
