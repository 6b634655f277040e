"""A rank fails: everything ends soon, the first cause is named, shown once, and nothing is left behind."""

import itertools
import os
import random
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Final

import pytest
from _leftovers import SECONDS, processes, shared_memory, until_none

_SCRIPT = """
import multiprocessing.util, os, signal, sys, threading, time, torch
from pathlib import Path
from torch import nn
from fabric_core import Fabric
from fabric_core.errors import RankFailedError

start, kind, place, strategy = sys.argv[1:]


def fail():
    Path(os.environ["FAILED_AT"]).write_text(str(time.time()))
    if kind == "exception":
        raise ValueError("the first cause")
    if kind == "exit":
        sys.exit(7)
    if kind == "_exit":
        os._exit(9)
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    os.abort()


def work(fabric):
    def at(here):
        if place == here and fabric.global_rank == 1:
            fail()

    multiprocessing.util.get_temp_dir()  # as the workers of a loader do
    at("start")
    model = fabric.setup(nn.Linear(4, 4))
    loss = model(torch.ones(2, 4)).sum()
    at("forward")
    fabric.backward(loss)
    at("backward")
    fabric.barrier()
    fabric.all_reduce(torch.ones(1))
    time.sleep(600)


def surroundings():
    handlers = [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)]
    return dict(os.environ), handlers, sys.excepthook, threading.active_count()


if __name__ == "__main__":
    fabric = Fabric(accelerator="cpu", strategy=strategy, devices=2)
    if start == "function":
        before = surroundings()
        try:
            fabric.launch(work)
        except RankFailedError:
            assert surroundings() == before, "the caller's surroundings changed"
            raise
    else:
        fabric.launch()
        with fabric:
            work(fabric)
"""
_CODES: Final = {"exception": 1, "exit": 7, "_exit": 9, "kill": 137, "abort": 134}
_HOW: Final = {
    "exception": "with exit code 1: ValueError: the first cause", "exit": "with exit code 7",
    "_exit": "with exit code 9", "kill": "by signal SIGKILL", "abort": "by signal SIGABRT",
}  # fmt: skip
_CELLS: Final = list(
    itertools.product(["script", "function", "torchrun"], _CODES, ["start", "forward", "backward"], ["ddp", "fsdp"])
)


@pytest.mark.faults
@pytest.mark.slow
@pytest.mark.parametrize(("start", "kind", "place", "strategy"), _CELLS)
def test_first_cause_is_named_and_all_ends(tmp_path: Path, start: str, kind: str, place: str, strategy: str) -> None:
    """Rank 1 fails, rank 0 waits for it: the summary names rank 1, its traceback is shown once, nothing is left."""
    _check(tmp_path, start, kind, place, strategy)


@pytest.mark.slow
def test_first_cause_is_named_and_all_ends_in_a_cell_drawn_at_random(tmp_path: Path, draw: random.Random) -> None:
    """One cell of the matrix, another each time; a failure names it."""
    cell = draw.choice(_CELLS)
    try:
        _check(tmp_path, *cell)
    except AssertionError as error:
        error.add_note(f"the cell is {cell}: make faults runs all")
        raise


def _check(folder: Path, start: str, kind: str, place: str, strategy: str) -> None:
    script, temporary, failed_at, mark = folder / "job.py", folder / "tmp", folder / "failed-at", uuid.uuid4().hex
    script.write_text(_SCRIPT)
    temporary.mkdir()
    shared = shared_memory()
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2") if start == "torchrun" else ()
    done = subprocess.run(
        [sys.executable, *torchrun, str(script), start, kind, place, strategy],
        env={
            **os.environ, "TMPDIR": str(temporary), "OMP_NUM_THREADS": "1", "FAILED_AT": str(failed_at), "CELL": mark,
        },
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )  # fmt: skip
    failed = float(failed_at.read_text())
    assert time.time() - failed < SECONDS, done.stderr
    _check_told(done, start, kind)
    # torchrun keeps its own folder; and of ours nothing outlives a rank there that could remove what it had no time to.
    kept = ("torchelastic_*", "pymp-*") if torchrun else ()
    own = {"torchinductor_root"} | {one.name for pattern in kept for one in temporary.glob(pattern)}
    until_none(lambda: {one.name for one in temporary.iterdir()} - own, failed)
    until_none(lambda: processes(mark), failed)
    until_none(lambda: shared_memory() - shared, failed)


def _check_told(done: "subprocess.CompletedProcess[str]", start: str, kind: str) -> None:
    """Check what was said, and the exit code."""
    raised = kind == "exception"
    assert "[rank 0] failed" not in done.stderr, done.stderr
    assert done.stderr.count("    fail()") == raised, done.stderr
    assert "the caller's surroundings changed" not in done.stderr, done.stderr
    if start == "torchrun":
        summary = done.stderr.partition("Root Cause")[2]
        assert "rank      : 1 " in summary, done.stderr
        assert done.returncode != 0
    else:
        summary = f"rank 1 failed first, {_HOW[kind]}"
        assert done.stderr.count(summary) == 1, done.stderr
        assert done.returncode == (_CODES[kind] if start == "script" else 1)
    if raised:
        first = "ended after rank 1" if start == "torchrun" else summary
        shown = done.stderr.index("ValueError: the first cause")
        assert first not in done.stderr or shown <= done.stderr.index(first) + len(first), done.stderr
