"""A process may launch and tear down as often as it likes: nothing grows."""

import ast
import gc
import multiprocessing
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
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


def _launch() -> None:
    fabric = Fabric(accelerator="cpu", strategy="ddp:start_method=fork", devices=2)
    assert fabric.launch(_work) == 2


def _work(fabric: Fabric) -> float:
    model = fabric.setup(nn.Linear(2, 1))
    fabric.backward(model(torch.ones(1, 2)).sum())
    return float(fabric.all_reduce(torch.ones(1), reduce_op="sum"))


def _rounds(
    act: Callable[[], None], first: int, then: int
) -> tuple[tuple[int, int, int, int, bool], tuple[int, int, int, int, bool]]:
    for _ in range(first):
        act()
    before = _held()
    for _ in range(then):
        act()
    return before, _held()


def _check(before: tuple[int, int, int, int, bool], after: tuple[int, int, int, int, bool]) -> None:
    assert all(now <= once for now, once in zip(after[:3], before[:3], strict=True)), (before, after)
    assert after[3] - before[3] <= 16, (before, after)
    assert after[4] == before[4]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what a process holds in this way")
@pytest.mark.parametrize(
    ("first", "then"),
    [(5, 25), pytest.param(50, 450, marks=[pytest.mark.faults, pytest.mark.slow, pytest.mark.timeout(600)])],
)
def test_launches_and_teardowns_hold_nothing(first: int, then: int) -> None:
    """After as many rounds: the same file descriptors, threads and processes, and no more memory than noise."""
    with RankPool(2, timeout=500) as ranks:
        for before, after in ranks.run(_rounds, _round, first, then):
            _check(before, after)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what a process holds in this way")
@pytest.mark.parametrize(
    ("first", "then"),
    [
        pytest.param(2, 8, marks=[pytest.mark.sampled(0.3), pytest.mark.timeout(300)]),
        pytest.param(50, 450, marks=[pytest.mark.faults, pytest.mark.slow, pytest.mark.timeout(1800)]),
    ],
)
def test_launches_of_a_function_hold_nothing(first: int, then: int) -> None:
    """The process that starts the ranks holds as much after them; nothing of theirs lies in its temporary folder."""
    code = f"import test_many_launches as it; print(it._rounds(it._launch, {first}, {then}))"
    with tempfile.TemporaryDirectory() as temporary:
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=Path(__file__).parent,
            env={**os.environ, "TMPDIR": temporary, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        _check(*ast.literal_eval(done.stdout.splitlines()[-1]))
        assert not [one for one in Path(temporary).iterdir() if not one.name.startswith("torchinductor")]
