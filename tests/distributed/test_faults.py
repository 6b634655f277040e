"""A rank fails: everything ends soon, the first cause is named, shown once, and nothing is left behind."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

_SCRIPT = """
import ctypes, os, signal, sys, time, torch
from torch import nn
from fabric_core import Fabric

start, kind, place, strategy = sys.argv[1:]


def fail():
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

    at("start")
    model = fabric.setup(nn.Linear(4, 4))
    loss = model(torch.ones(2, 4)).sum()
    at("forward")
    fabric.backward(loss)
    at("backward")
    fabric.barrier()
    fabric.all_reduce(torch.ones(1))
    time.sleep(600)


if __name__ == "__main__":
    fabric = Fabric(accelerator="cpu", strategy=strategy, devices=2)
    if start == "function":
        fabric.launch(work)
    else:
        fabric.launch()
        with fabric:
            work(fabric)
"""
_CODES = {"exception": 1, "exit": 7, "_exit": 9, "kill": 137, "abort": 134}
_HOW = {
    "exception": "with exit code 1", "exit": "with exit code 7", "_exit": "with exit code 9",
    "kill": "by signal SIGKILL", "abort": "by signal SIGABRT",
}  # fmt: skip


@pytest.mark.faults
@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("place", ["start", "forward", "backward"])
@pytest.mark.parametrize("kind", list(_CODES))
@pytest.mark.parametrize("start", ["script", "function", "torchrun"])
def test_first_cause_is_named_and_all_ends(tmp_path: Path, start: str, kind: str, place: str, strategy: str) -> None:
    """Rank 1 fails, rank 0 waits for it: the summary names rank 1, one traceback at most, no file is left."""
    script, temporary = tmp_path / "job.py", tmp_path / "tmp"
    script.write_text(_SCRIPT)
    temporary.mkdir()
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2") if start == "torchrun" else ()
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, *torchrun, str(script), start, kind, place, strategy],
        env={**os.environ, "TMPDIR": str(temporary), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert time.monotonic() - began < 80
    assert done.stderr.count("ValueError: the first cause") >= (kind == "exception")
    assert "[rank 0] failed" not in done.stderr
    if start == "torchrun":
        root = done.stderr.partition("Root Cause")[2]
        assert "rank      : 1 " in root, done.stderr
        assert done.stderr.count("    fail()") == (kind == "exception")
    else:
        assert f"rank 1 failed first, {_HOW[kind]}" in done.stderr, done.stderr
        assert done.returncode == (_CODES[kind] if start == "script" else 1)
        assert done.stderr.count("    fail()") == (kind == "exception")
        assert [file.name for file in temporary.iterdir() if not file.name.startswith("torchinductor")] == []
