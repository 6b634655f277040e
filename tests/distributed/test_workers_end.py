"""The workers of a rank's loader end with it, however they, the ranks and the end came about; nothing is left."""

import itertools
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from _leftovers import processes, shared_memory, until_none

_SCRIPT: Final = """
import multiprocessing, os, signal, sys, time, torch
from pathlib import Path
from torch.utils.data import DataLoader
from fabric_core import Fabric
from fabric_core.errors import RankFailedError

folder, start, workers, fault = Path(sys.argv[1]), *sys.argv[2:]


def work(fabric):
    # They stay, and wait for more to do.
    loader = DataLoader(
        torch.ones(8, 1), num_workers=1, multiprocessing_context=workers, persistent_workers=True, timeout=60
    )
    next(iter(loader))
    fabric.barrier()
    (folder / "name").write_text(multiprocessing.current_process()._config["semprefix"])
    fabric.barrier()
    (folder / f"began-{fabric.global_rank}").touch()
    if fault == "exception" and fabric.global_rank == 1:
        raise ValueError("the first cause")
    if fault == "kill" and fabric.global_rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    fabric.all_reduce(torch.ones(1))
    time.sleep(600)


def stop(fabric):
    fabric.should_stop
    loader = DataLoader(torch.ones(10_000, 1), num_workers=1, multiprocessing_context=workers)
    for step, _ in enumerate(loader):
        (folder / f"began-{fabric.global_rank}").touch()
        time.sleep(0.05)
        if fabric.should_stop:
            time.sleep(0.5)
            (folder / f"stopped-{fabric.global_rank}").write_text(str(step))
            return


if __name__ == "__main__":
    function = stop if fault == "stop" else work
    strategy = "ddp" if start == "script" else f"ddp:start_method={start}"
    fabric = Fabric(accelerator="cpu", strategy=strategy, devices=2, plugins="launcher=elastic:shutdown_timeout=60")
    if start == "script":
        fabric.launch()
        with fabric:
            function(fabric)
    else:
        try:
            fabric.launch(function)
        except RankFailedError:
            # The caller lives on, and the semaphores of what was killed don't.
            left = list(Path("/dev/shm").glob(f"sem{(folder / 'name').read_text().replace('/', '.')}-*"))
            assert not left, left
            raise
"""
_STARTS: Final = ("script", "spawn", "forkserver", "fork")
_CELLS: Final = list(itertools.product(_STARTS, ("fork", "spawn", "forkserver"), ("exception", "kill", "agent")))


@pytest.fixture
def folder() -> Iterator[Path]:
    """Give a folder with a short path: the sockets of fork servers lie below it."""
    with tempfile.TemporaryDirectory(prefix="e-") as name:
        yield Path(name)


def _run(folder: Path, mark: str, *words: str) -> "subprocess.Popen[str]":
    (folder / "job.py").write_text(_SCRIPT)
    (folder / "tmp").mkdir()
    return subprocess.Popen(
        [sys.executable, str(folder / "job.py"), str(folder), *words],
        env={**os.environ, "TMPDIR": str(folder / "tmp"), "OMP_NUM_THREADS": "1", "CELL": mark},
        stderr=subprocess.PIPE,
        text=True,
    )


def _until_began(folder: Path, process: "subprocess.Popen[str]") -> float:
    """Wait until both ranks are at work; gives when the last one was."""
    files = [folder / f"began-{rank}" for rank in range(2)]
    deadline = time.monotonic() + 90
    while not all(file.exists() for file in files):
        assert time.monotonic() < deadline
        assert process.poll() is None or all(file.exists() for file in files), process.communicate()[1]
        time.sleep(0.05)
    return time.time()


@pytest.mark.sampled(0.03)
@pytest.mark.slow
@pytest.mark.parametrize(("start", "workers", "fault"), _CELLS)
def test_workers_end_with_their_rank(folder: Path, start: str, workers: str, fault: str) -> None:
    """A rank fails or is killed, or the agent of all is: within ten seconds no process, semaphore or file is left."""
    mark = uuid.uuid4().hex
    before = shared_memory()
    with _run(folder, mark, start, workers, fault) as process:
        try:
            failed = _until_began(folder, process)
            if fault == "agent":
                process.kill()
            until_none(lambda: processes(mark), failed)
            errors = process.communicate(timeout=10)[1]
        finally:
            process.kill()
    code = 137 if (start, fault) == ("script", "kill") else 1
    assert process.returncode == (-signal.SIGKILL if fault == "agent" else code), errors
    assert "AssertionError" not in errors, errors
    # The socket of a fork server that was killed with its caller is the caller's.
    own = ("torchinductor", "pymp-") if (start, fault) == ("forkserver", "agent") else ("torchinductor",)
    until_none(lambda: {one.name for one in (folder / "tmp").iterdir() if not one.name.startswith(own)}, failed)
    until_none(lambda: {name for name in shared_memory() - before if "fabric-" in name}, failed)


@pytest.mark.sampled(0.08)
@pytest.mark.slow
@pytest.mark.parametrize("workers", ["fork", "spawn", "forkserver"])
@pytest.mark.parametrize("start", _STARTS)
def test_ranks_that_stop_keep_their_workers_until_then(folder: Path, start: str, workers: str) -> None:
    """SIGTERM to the agent reaches the ranks alone: both come to the end of the same step, which needs batches."""
    mark = uuid.uuid4().hex
    with _run(folder, mark, start, workers, "stop") as process:
        try:
            _until_began(folder, process)
            process.terminate()
            errors = process.communicate(timeout=60)[1]
        finally:
            process.kill()
    steps = [(folder / f"stopped-{rank}") for rank in range(2)]
    assert all(step.exists() for step in steps), errors
    assert steps[0].read_text() == steps[1].read_text()
    until_none(lambda: processes(mark), time.time())
    assert not list((folder / "tmp").glob("fabric-*"))
