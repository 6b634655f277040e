"""What was seeded before ``launch(function)`` is seeded in the processes that it starts."""

import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fabric_core import seed_everything
from fabric_core.errors import RequestError

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


def test_the_seeds_within_bounds_are_taken(caplog: pytest.LogCaptureFixture) -> None:
    """The first and the last too, with the rank that is added; what was seeded is given back, and said once."""
    with torch.random.fork_rng(), caplog.at_level("INFO", "fabric_core"):
        assert [seed_everything(2**32 - 1), torch.initial_seed()] == [2**32 - 1] * 2
        assert [seed_everything(2**32 - 4, rank=3), torch.initial_seed()] == [2**32 - 1] * 2
        assert [seed_everything(verbose=False), torch.initial_seed()] == [0, 0]
        for seed, rank in ((2**32, 0), (2**32 - 3, 3), (-1, 0)):
            with pytest.raises(RequestError, match=r"got: *-?\d+\s+instead: 0 to 4294967295"):
                seed_everything(seed, rank=rank)
    assert caplog.messages == ["Seed set to 4294967295"]
