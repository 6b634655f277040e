"""Ranks that are told to end save a last checkpoint where their loop asks ``fabric.should_stop``, under every start."""

import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fabric_core import Fabric

_SCRIPT = """
import os, sys, time, torch
from pathlib import Path
from torch import nn
from fabric_core import Fabric

folder, strategy, start = Path(sys.argv[1]), sys.argv[2], sys.argv[3]


def train(fabric):
    model, optimizer = fabric.setup(model := nn.Linear(2, 1), torch.optim.SGD(model.parameters(), lr=0.1))
    state = {"model": model, "optimizer": optimizer, "step": 0}
    while not fabric.should_stop:
        fabric.backward(model(torch.ones(1, 2)).sum())
        optimizer.step()
        optimizer.zero_grad()
        state["step"] += 1
        path = folder / f"pid-{fabric.global_rank}"
        path.with_suffix(".part").write_text(str(os.getpid()))
        path.with_suffix(".part").rename(path)
        time.sleep(0.05)
    fabric.save(folder / "last.ckpt", state)
    (folder / f"steps-{fabric.global_rank}").write_text(str(state["step"]))


if __name__ == "__main__":
    # Time enough to save on a busy machine.
    fabric = Fabric(accelerator="cpu", strategy=strategy, devices=2, plugins="launcher=elastic:shutdown_timeout=60")
    if start == "function":
        fabric.launch(train)
    else:
        fabric.launch()
        with fabric:
            train(fabric)
"""
_TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
_STARTS = {
    "script": (),
    "function": (),
    "torchrun": _TORCHRUN,
    "run": ("-m", "fabric_core", "run", "--devices", "2", "--accelerator", "cpu"),
}
_CELLS = list(itertools.product(_STARTS, ("ddp", "fsdp"), ("agent", "rank"), (signal.SIGTERM, signal.SIGINT)))


@pytest.mark.sampled(0.03)
@pytest.mark.slow
@pytest.mark.parametrize(("start", "strategy", "target", "how"), _CELLS)
def test_a_signal_makes_all_ranks_save_and_end(
    tmp_path: Path, start: str, strategy: str, target: str, how: signal.Signals
) -> None:
    """A signal to what was started, or to one rank alone: all stop after the same step, with one whole checkpoint."""
    script, temporary = tmp_path / "job.py", tmp_path / "tmp"
    script.write_text(_SCRIPT)
    temporary.mkdir()
    files = [tmp_path / f"pid-{rank}" for rank in range(2)]
    with subprocess.Popen(
        [sys.executable, *_STARTS[start], str(script), str(tmp_path), strategy, start],
        env={**os.environ, "TMPDIR": str(temporary), "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background job ignores SIGINT, and so would all that it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # noqa: PLW1509 - one thread here
    ) as process:
        try:
            deadline = time.monotonic() + 90
            while not all(file.exists() for file in files) and time.monotonic() < deadline and process.poll() is None:
                time.sleep(0.05)
            os.kill(process.pid if target == "agent" else int(files[1].read_text()), how)
            _, errors = process.communicate(timeout=50)
        finally:
            process.kill()
    steps = [int((tmp_path / f"steps-{rank}").read_text()) for rank in range(2)]
    assert steps[0] == steps[1] > 0, errors
    with Fabric(accelerator="cpu", devices=1) as fabric:
        assert fabric.load(tmp_path / "last.ckpt")["step"] == steps[0]
    if target == "rank":  # whoever started the ranks was told nothing, and saw them end well
        assert process.returncode == 0, errors
    elif start in {"script", "function"}:
        by_python = start == "function" and how == signal.SIGINT
        assert process.returncode in {128 + how, -how if by_python else 128 + how}, errors
    else:
        assert process.returncode != 0
    # torchrun leaves its folder of logs after every run.
    left = [file.name for file in temporary.iterdir() if not file.name.startswith(("torchinductor", "torchelastic_"))]
    assert left == []
    for file in files:
        assert not Path("/proc", file.read_text()).exists()
