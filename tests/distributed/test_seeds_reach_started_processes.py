"""What was seeded before ``launch(function)`` is seeded in the processes that it starts."""

import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

_SCRIPT = """
import random, sys
import numpy as np
import torch
from fabric_core import Fabric, seed_everything

def draw(fabric):
    mine = [random.random(), float(np.random.rand()), float(torch.rand(()))]
    if sys.argv[1] == "seeded":
        assert fabric.broadcast(mine, 1) == mine
    return mine

if __name__ == "__main__":
    if sys.argv[1] == "seeded":
        seed_everything(7)
        torch.rand(3)
    fabric = Fabric(accelerator="cpu", strategy="ddp_spawn", devices=2)
    print(fabric.launch(draw))
"""


def test_a_seed_reaches_every_started_process(tmp_path: Path) -> None:
    """On every rank the numbers are those that follow the seed."""
    script = tmp_path / "script.py"
    script.write_text(_SCRIPT)
    command = [sys.executable, str(script), "seeded"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stderr
    random.seed(7)
    np.random.seed(7)  # noqa: NPY002 - what the script draws from
    torch.manual_seed(7)
    assert done.stdout.strip() == str([random.random(), float(np.random.rand()), float(torch.rand(()))])  # noqa: NPY002, S311
