"""How a process group ends.

[Note: the end of a process group] Two faults of PyTorch's backends are avoided here, and nowhere else.

- A thread of gloo lets go of an operation's tensors only after the operation has returned, and needs the interpreter
  for it. A process that ends just then is aborted (https://github.com/pytorch/pytorch/issues/190489). So a group is
  ended only once its threads are at rest, which the system tells.
- Whoever drops the last reference to a backend waits for what is under way in it. A rank that failed must not: it would
  wait for ranks that wait for it. Nor must the interpreter's end, where a model may hold the last reference.
"""

import atexit
import ctypes
import sys
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch.distributed as dist

from fabric_core._torch import backends_of, process_groups

__all__ = ["end", "end_all_at_exit"]


def end(box: list[Any], *, failed: bool) -> None:
    """End a process group; ending the default one ends all ([Note: the end of a process group]).

    Args:
        box: Holds the group, and nothing once it is ended: no caller may be the last to drop it.
        failed: This rank failed while others may wait for it in a collective.
    """
    _wait_for_rest()
    if not dist.is_initialized() or box[0] not in process_groups():
        return
    groups = WeakSet(process_groups() if box[0] is dist.group.WORLD else box)
    backends = [backend for one in groups for backend in backends_of(one)]
    if failed:
        atexit.register(_keep, groups)
    dist.destroy_process_group(box.pop())
    # Dropping a group holds the interpreter's lock, which its backends' threads may wait for; a backend doesn't.
    ending = threading.Thread(target=backends.clear, daemon=True)
    ending.start()
    ending.join(1 if failed else None)


def end_all_at_exit() -> None:
    """End every process group as the interpreter ends, waiting for nobody."""
    _wait_for_rest()
    if dist.is_initialized():
        _keep([backend for group in process_groups() for backend in backends_of(group)])
        dist.destroy_process_group()


def _keep(owners: Iterable[Any]) -> None:
    """Never drop the last reference to these, not at the interpreter's end either."""
    for owner in owners:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(owner))


def _wait_for_rest() -> None:
    """Wait until the threads of the backends are at rest, a second at most.

    While this thread sleeps they can have the interpreter; where the system doesn't say which of them still run, it
    sleeps longer.
    """
    tasks, own = Path("/proc/self/task"), str(threading.get_native_id())
    if sys.platform != "linux" or not tasks.exists():
        time.sleep(0.1)
        return
    for _ in range(1000):
        time.sleep(0.001)
        with suppress(OSError):  # a thread ended as it was looked at
            stats = [(task / "stat").read_text() for task in tasks.iterdir() if task.name != own]
            if all(stat.rpartition(")")[2].split()[0] not in {"R", "D"} for stat in stats):
                return
