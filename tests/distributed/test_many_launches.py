"""A process may launch and tear down as often as it likes: nothing grows."""

import gc
import multiprocessing
import os
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

from fabric_core import Fabric
from fabric_core.conformance.pool import RankPool


def _round() -> None:
    with Fabric(accelerator="cpu", strategy="ddp", devices=2) as fabric:
        fabric.launch()
        model = fabric.setup(nn.Linear(2, 1))
        fabric.backward(model(torch.ones(1, 2)).sum())
        fabric.all_reduce(torch.ones(1))


def _held() -> tuple[int, int, int, int, bool]:
    """Count file descriptors, threads, child processes and MiB of memory; and see whether the hook is the first one."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return (
        len(list(Path("/proc/self/fd").iterdir())),
        len(list(Path("/proc/self/task").iterdir())) + threading.active_count(),
        len(multiprocessing.active_children()),
        pages * os.sysconf("SC_PAGE_SIZE") >> 20,
        sys.excepthook is sys.__excepthook__,
    )


def _rounds(first: int, then: int) -> tuple[tuple[int, int, int, int, bool], tuple[int, int, int, int, bool]]:
    for _ in range(first):
        _round()
    before = _held()
    for _ in range(then):
        _round()
    return before, _held()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what a process holds in this way")
@pytest.mark.parametrize(
    ("first", "then"),
    [(5, 25), pytest.param(50, 450, marks=[pytest.mark.faults, pytest.mark.slow, pytest.mark.timeout(600)])],
)
def test_launches_and_teardowns_hold_nothing(two_ranks: RankPool, first: int, then: int) -> None:
    """After as many rounds: the same file descriptors, threads and processes, and no more memory than noise."""
    for before, after in two_ranks.run(_rounds, first, then):
        assert all(now <= once for now, once in zip(after[:3], before[:3], strict=True)), (before, after)
        assert after[3] - before[3] <= 16, (before, after)
        assert after[4] == before[4]
