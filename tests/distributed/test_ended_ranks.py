"""A rank comes to its end while another still waits for it: that ends soon, and the error begins with it."""

import itertools
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.sampled(0.4)

_SCRIPT = """
import sys, time, torch
from pathlib import Path
from torch import nn
from fabric_core import Fabric
from fabric_core.errors import LaunchError

start, act, strategy, folder = sys.argv[1:]


def work(fabric):
    model = fabric.setup(nn.Linear(4, 4))
    for step in range(4):
        loss = None if (step, act, fabric.global_rank) == (1, "forward", 1) else model(torch.ones(2, 4)).sum()
        if step == 1 and fabric.global_rank == 1:
            Path(folder, "ended-at").write_text(str(time.time()))
            return model
        try:
            if step == 1 and act not in ("backward", "forward"):
                getattr(fabric, act)(*[torch.ones(1)] * (act != "barrier"))
            fabric.backward(loss)
        except LaunchError as error:
            Path(folder, "cause").write_text(str(error.__cause__))
            raise


if __name__ == "__main__":
    fabric = Fabric(accelerator="cpu", strategy=strategy, devices=2)
    if start == "function":
        fabric.launch(work)
    else:
        fabric.launch()
        kept = work(fabric)
"""


def _left_alone(tmp_path: Path, start: str, act: str, strategy: str) -> tuple[Path, str]:
    """Let rank 1 end while rank 0 waits for it, and see that both end soon; give the script, and what was said."""
    script = tmp_path / "job.py"
    script.write_text(_SCRIPT)
    done = subprocess.run(
        [sys.executable, str(script), start, act, strategy, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert time.time() - float((tmp_path / "ended-at").read_text()) < 30, done.stderr
    assert done.returncode == 1, done.stderr
    assert "rank 0 failed first, with exit code 1" in done.stderr
    return script, done.stderr


_CELLS = list(itertools.product(["function", "script"], ["all_reduce", "barrier", "backward"], ["ddp", "fsdp"]))


@pytest.mark.parametrize(("start", "act", "strategy"), _CELLS)
def test_the_error_begins_with_the_rank_that_ended(tmp_path: Path, start: str, act: str, strategy: str) -> None:
    """It names that rank, the call and the user's line; what the backend said is its cause."""
    script, said = _left_alone(tmp_path, start, act, strategy)
    assert "LaunchError: rank 1 has ended, and this rank still waits for it" in said
    line = 1 + _SCRIPT.splitlines().index(
        "            fabric.backward(loss)"
        if act == "backward"
        else '                getattr(fabric, act)(*[torch.ones(1)] * (act != "barrier"))'
    )
    call = {"backward": "fabric.backward", "barrier": "barrier()"}.get(act, act)
    assert f"where:   {call} at {script}:{line}" in said
    assert "gloo" in (tmp_path / "cause").read_text()


@pytest.mark.parametrize("start", ["function", "script"])
def test_a_forward_pass_that_waits_for_it_says_so(tmp_path: Path, start: str) -> None:
    """The error is the backend's, and has a note."""
    _, said = _left_alone(tmp_path, start, "forward", "fsdp")
    assert said.count("\nrank 1 has ended, and this rank still waits for it: its ") == 1, said
