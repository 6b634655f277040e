"""What launchers share that recognise processes which something else started."""

import os
from collections.abc import Callable
from typing import Any

import torch

from fabric_core.contracts import Launcher, PluginOptions, ProcessInfo

__all__ = ["JoinedLauncher"]


class JoinedLauncher(Launcher):
    """Shares the cores of a node among its processes."""

    def __init__(self, options: PluginOptions | None = None, /, **given: Any) -> None:
        super().__init__(options, **given)
        self._undo: list[Callable[[], None]] = []

    def setup_process(self, info: ProcessInfo) -> None:
        """Take this process's share of the cores, unless the user said how many, or the scheduler bound it to fewer."""
        if "OMP_NUM_THREADS" in os.environ:
            return
        threads = torch.get_num_threads()
        bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, min(bound, (os.cpu_count() or 1) // info.local_world_size)))
        self._undo.append(lambda: torch.set_num_threads(threads))

    def teardown(self) -> None:
        """Undo what ``setup_process`` did."""
        while self._undo:
            self._undo.pop()()
