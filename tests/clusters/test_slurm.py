"""Under a real SLURM, ``srun``'s tasks are one world."""

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fabric_core import Fabric

pytestmark = pytest.mark.sampled(0.4)

Command = Callable[..., Any]


@pytest.mark.slow
def test_tasks_of_srun_are_one_world_that_trains(slurm: Command, train: str, ranks: Command, tmp_path: Path) -> None:
    """``srun -n2`` trains once, on two ranks with the same weights, and writes one checkpoint that loads."""
    done = slurm("srun", "-n2", sys.executable, train, "2", str(tmp_path / "saved"))
    assert done.code == 0, done.err
    rows = ranks(done.out)
    assert [(row["rank"], row["local"], row["node"], row["size"], row["owner"]) for row in rows] == [
        (0, 0, 0, 2, "srun"),
        (1, 1, 0, 2, "srun"),
    ]
    assert rows[0]["weights"] == rows[1]["weights"]
    with Fabric(accelerator="cpu", devices=1) as fabric:
        model = fabric.setup(nn.Linear(4, 1))
        fabric.load(tmp_path / "saved", {"model": model})
        saved = model.weight.flatten().tolist()
    assert torch.allclose(torch.tensor(saved), torch.tensor(rows[0]["weights"]), atol=1e-4)


@pytest.mark.slow
def test_two_steps_at_once_are_two_worlds(slurm: Command, train: str, ranks: Command, tmp_path: Path) -> None:
    """Two steps of one job, at the same time on one node, don't meet each other."""
    script = tmp_path / "job.sh"
    step = f"srun --exact --mem=0 -n2 {sys.executable} {train} 2 {tmp_path}"
    script.write_text(f"#!/bin/bash\n{step}/a > {tmp_path}/a.out &\n{step}/b > {tmp_path}/b.out &\nwait\n")
    done = slurm("sbatch", "--wait", "-n4", f"--output={tmp_path}/job.out", str(script))
    assert done.code == 0, (tmp_path / "job.out").read_text()
    for name in ("a", "b"):
        assert [row["size"] for row in ranks((tmp_path / f"{name}.out").read_text())] == [2, 2]


@pytest.mark.slow
def test_batch_script_and_allocation_are_like_a_shell(
    slurm: Command, train: str, ranks: Command, tmp_path: Path
) -> None:
    """Where SLURM counts two tasks and nobody called ``srun``, the script starts its own ranks."""
    script = tmp_path / "job.sh"
    script.write_text(f"#!/bin/bash\n{sys.executable} {train} 2 {tmp_path}/saved\n")
    done = slurm("sbatch", "--wait", "-n2", f"--output={tmp_path}/job.out", str(script))
    out = (tmp_path / "job.out").read_text()
    assert done.code == 0, out
    assert [(row["size"], row["owner"]) for row in ranks(out)] == [(2, "elastic")] * 2
    done = slurm("salloc", "--quiet", "-n2", sys.executable, train, "2", str(tmp_path / "again"))
    assert [(row["size"], row["owner"]) for row in ranks(done.out)] == [(2, "elastic")] * 2, done.err


@pytest.mark.slow
@pytest.mark.parametrize("how", ["srun -n1 -c2", "salloc --quiet -n2", "salloc --quiet -n2 srun -n1", "sbatch"])
def test_torchrun_in_an_allocation_stays_torchrun_s(
    slurm: Command, train: str, ranks: Command, tmp_path: Path, how: str
) -> None:
    """Whether SLURM counts one task or two, what ``torchrun`` starts is ``torchrun``'s world."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", train, "2"]
    torchrun.append(str(tmp_path / "saved"))
    if how == "sbatch":
        script, output = tmp_path / "job.sh", tmp_path / "job.out"
        script.write_text(f"#!/bin/bash\n{shlex.join(torchrun)}\n")
        done = slurm("sbatch", "--wait", "-n2", f"--output={output}", str(script))
        out = output.read_text()
    else:
        done = slurm(*how.split(), *torchrun)
        out = done.out
    assert done.code == 0, (out, done.err)
    assert [(row["size"], row["owner"]) for row in ranks(out)] == [(2, "torchrun")] * 2, (out, done.err)


@pytest.mark.slow
def test_devices_and_tasks_that_differ_are_explained(slurm: Command, train: str, tmp_path: Path) -> None:
    """``devices=4`` with two tasks, and ``--ntasks`` beside ``--ntasks-per-node``, fail with what to write."""
    done = slurm("srun", "-n2", "--ntasks-per-node=4", sys.executable, train, "4", str(tmp_path / "saved"))
    assert done.code != 0
    assert "srun started 2 processes (2 on this node), and the plan has 4 (4 on each of 1 nodes)" in done.err
    assert "srun --nodes 1 --ntasks-per-node 4 python script.py, without --ntasks (2 here)" in done.err
    assert not (tmp_path / "saved").exists()
