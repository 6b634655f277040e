"""The profiler names each behaviour in a trace of each rank, and in a table."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from fabric_core import Fabric
from fabric_core.conformance.pool import RankPool
from fabric_core.errors import RequestError
from fabric_plugins.extensions import Profiler

BEHAVIOURS = {
    "fabric.setup", "fabric.backward", "fabric.step", "strategy.setup_module", "strategy.backward",
    "strategy.optimizer_step", "precision.convert_module", "precision.scale_loss", "precision.optimizer_step",
    "collectives.all_reduce",
}  # fmt: skip


def train(folder: str, devices: int, steps: int) -> None:
    """Take three steps."""
    profiler = Profiler(folder, steps=steps)
    with Fabric(accelerator="cpu", devices=devices, strategy="ddp", plugins=[profiler]) as fabric:
        fabric.launch()
        bare = nn.Linear(4, 2)
        model, optimizer = fabric.setup(bare, torch.optim.SGD(bare.parameters(), lr=0.1))
        for _ in range(3):
            fabric.backward(model(torch.ones(1, 4)).sum())
            fabric.all_reduce(torch.ones(1))
            optimizer.step()


def ranges(folder: Path, rank: int) -> list[str]:
    """List the names in a rank's trace, in no order."""
    events = json.loads((folder / f"rank-{rank}.json").read_text(encoding="utf-8"))["traceEvents"]
    return [event["name"] for event in events if event.get("ph") == "X"]


def test_each_rank_has_a_trace_with_the_behaviours(two_ranks: RankPool, tmp_path: Path) -> None:
    """Every behaviour that ran is a range, as often as it ran, beside the operators; the table has them too."""
    two_ranks.run(train, str(tmp_path), 2, 20)
    for rank in (0, 1):
        names = ranges(tmp_path, rank)
        assert set(names) >= BEHAVIOURS | {"aten::addmm"}
        assert names.count("strategy.backward") == names.count("fabric.step") == 3
        table = (tmp_path / f"rank-{rank}.txt").read_text(encoding="utf-8")
        assert "strategy.backward" in table


def test_it_ends_after_as_many_steps_as_were_asked_for(tmp_path: Path) -> None:
    """What comes later is not in the trace."""
    train(str(tmp_path), 1, 2)
    assert ranges(tmp_path, 0).count("strategy.backward") == 2


_SCRIPT = """
import torch
from fabric_core import Fabric
fabric = Fabric(accelerator="cpu", devices=1, plugins="extension=profiler")
fabric.launch()
fabric.setup(torch.nn.Linear(2, 2))(torch.ones(1, 2))
"""


def test_it_is_found_by_its_name_and_ends_with_the_script(tmp_path: Path) -> None:
    """A script that doesn't tear down has its trace."""
    script = tmp_path / "script.py"
    script.write_text(_SCRIPT, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=100
    )
    assert done.returncode == 0, done.stderr
    assert "strategy.setup_module" in ranges(tmp_path / "profile", 0)


def test_what_makes_no_sense_is_refused() -> None:
    """None of the numbers may be zero."""
    with pytest.raises(RequestError, match="at least 1"):
        Profiler(steps=0)
