"""A rank that ends with its agent, even where the agent was killed and could end nothing."""

import contextlib
import ctypes
import os
import select
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Final

__all__ = ["end_with"]

_PARENT_DEATH_SIGNAL: Final = 1
_THREAD: Final = "fabric-agent"
_LAST: Final = 10.0
"""How many seconds a script that takes SIGTERM itself has for a last checkpoint."""
_GRACE: Final = 1.0
"""How many seconds what a rank started has for its own end."""


def end_with(agent: int, folder: Path | None) -> None:
    """Let this process, and what it started, end with its agent; once in a process.

    It is a thread that looks on, and not the system that sends the rank a signal: that would end neither what a fork
    server started, nor what the rank's own fork server keeps (a loader's workers, say).

    Args:
        agent: The agent's process.
        folder: The folder of the launch, which the agent would have removed; ``None`` where it has none.
    """
    if not sys.platform.startswith("linux") or any(one.name == _THREAD for one in threading.enumerate()):
        return
    try:
        descriptor = os.pidfd_open(agent)
    except ProcessLookupError:
        raise SystemExit(128 + signal.SIGTERM) from None
    threading.Thread(target=_watch, args=(descriptor, folder), daemon=True, name=_THREAD).start()
    # PyTorch lets the system send SIGINT to what it started: a rank that it ends so leaves what it started itself.
    ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, 0)


def _watch(agent: int, folder: Path | None) -> None:
    ended = select.poll()
    ended.register(agent, select.POLLIN)
    ended.poll()
    if signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(_LAST)
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)
    for sign in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):  # it leads no group: a script may change that
            os.killpg(os.getpid(), sign)
        os.kill(os.getpid(), sign)
        time.sleep(_GRACE)
