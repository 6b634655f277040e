"""The recipes of docs/how-to/run-on-a-cluster.md, as they stand there, on as many nodes as this machine is."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

Command = Callable[..., Any]

_PAGE = (Path(__file__).parents[2] / "docs" / "how-to" / "run-on-a-cluster.md").read_text(encoding="utf-8")
_STOPPING = """
import sys, time, torch
from pathlib import Path
from fabric_core import Fabric

folder = Path(sys.argv[1])
with Fabric(accelerator="cpu", strategy="ddp", devices=2) as fabric:
    fabric.launch()
    step = 0
    while not fabric.should_stop:
        step += 1
        (folder / f"begun-{fabric.global_rank}").touch()
        time.sleep(0.1)
    fabric.save(folder / "last.ckpt", {"step": step})
    (folder / f"step-{fabric.global_rank}").write_text(str(step))
"""


def _block(heading: str, language: str) -> str:
    """Give the first block of a language below a heading of the page."""
    found = re.search(rf"^## {re.escape(heading)}\n.*?^```{language}\n(.*?)^```", _PAGE, re.DOTALL | re.MULTILINE)
    assert found is not None, heading
    return found[1]


@pytest.mark.slow
@pytest.mark.sampled(0.25)
def test_slurm_batch_script(slurm: Command, train: str, ranks: Command, tmp_path: Path) -> None:
    """The batch script, on one node with two tasks and without GPUs, is one world."""
    text = (
        _block("SLURM", "text").replace("--nodes=2", "--nodes=1").replace("--ntasks-per-node=4", "--ntasks-per-node=2")
    )
    text = text.replace("#SBATCH --gpus-per-node=4\n", "").replace(
        "python train.py", f"{sys.executable} {train} 2 {tmp_path}/c"
    )
    (tmp_path / "job.sh").write_text(text)
    done = slurm("sbatch", "--wait", f"--output={tmp_path}/job.out", str(tmp_path / "job.sh"))
    output = (tmp_path / "job.out").read_text()
    assert done.code == 0, output
    assert [row["size"] for row in ranks(output)] == [2, 2]


@pytest.mark.slow
@pytest.mark.sampled(0.25)
def test_slurm_job_that_is_cancelled_saves_a_last_checkpoint(slurm: Command, tmp_path: Path) -> None:
    """``scancel`` sends SIGTERM to the tasks: both leave their loop after the same step, and save."""
    script = tmp_path / "job.py"
    script.write_text(_STOPPING)
    (tmp_path / "job.sh").write_text(f"#!/bin/bash\nsrun -n2 {sys.executable} {script} {tmp_path}\n")
    job = slurm("sbatch", "--parsable", "-n2", f"--output={tmp_path}/job.out", str(tmp_path / "job.sh")).out.strip()
    deadline = time.monotonic() + 90
    while not all((tmp_path / f"begun-{rank}").exists() for rank in range(2)) and time.monotonic() < deadline:
        time.sleep(0.1)
    slurm("scancel", "--signal=TERM", job)
    files = [tmp_path / f"step-{rank}" for rank in range(2)]
    while not all(file.exists() and file.read_text() for file in files) and time.monotonic() < deadline:
        time.sleep(0.1)
    output = (tmp_path / "job.out").read_text()
    assert all(file.exists() for file in files), output
    assert files[0].read_text() == files[1].read_text()
    assert (tmp_path / "last.ckpt").exists()


@pytest.mark.slow
@pytest.mark.sampled(0.25)
def test_mpi_host_file(command: Command, needing: Command, train: str, ranks: Command, tmp_path: Path) -> None:
    """The host file and the command, with this machine as the only host."""
    needing("mpirun")
    lines = _block("MPI", "text").splitlines()
    typed = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    hosts = [line for line in lines if line.startswith("node")]
    assert len(hosts) == 2
    assert typed[0] == "cat hosts"
    (tmp_path / "hosts").write_text(hosts[0].replace("node0", "localhost").replace("slots=4", "slots=2") + "\n")
    words = (
        typed[1]
        .replace("-np 8", "-np 2")
        .replace("python train.py", f"{sys.executable} {train} 2 {tmp_path}/c")
        .split()
    )
    open_mpi = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    done = command(*words, cwd=tmp_path, **open_mpi)
    assert done.code == 0, done.err
    assert [row["size"] for row in ranks(done.out)] == [2, 2]


@pytest.mark.slow
@pytest.mark.sampled(0.25)
def test_kubernetes_manifest(train: str, ranks: Command, tmp_path: Path) -> None:
    """The manifest is one, and its pods, with the variables that the operator sets, are one world of two nodes."""
    manifest = yaml.safe_load(_block("Kubernetes", "yaml"))
    pods = manifest["spec"]["pytorchReplicaSpecs"]
    assert pods.keys() == {"Master", "Worker"}
    text = Path(train).read_text().replace("devices=int(sys.argv[1])", "devices=1, num_nodes=2")
    Path(train).write_text(text)
    processes = []
    for rank, pod in enumerate(pods.values()):
        (container,) = pod["template"]["spec"]["containers"]
        assert container["command"] == ["python", "train.py"]
        variables = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29872"}
        # Pods have hosts of their own; two processes whose address is loopback are taken for those of one node.
        environment = {**os.environ, **variables, "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        command = [sys.executable, train, "1", f"{tmp_path}/c"]
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    try:
        output = "".join(process.communicate(timeout=100)[0] for process in processes)
    finally:
        for process in processes:
            process.send_signal(signal.SIGKILL)
            process.wait()
    assert [(row["size"], row["node"]) for row in ranks(output)] == [(2, 0), (2, 1)]


def test_run_command(command: Command, tmp_path: Path) -> None:
    """The command of the page says what it would start on each of the two nodes."""
    typed = _block("`fabric-core run`, or `torchrun`", "console").strip().removeprefix("$ ")
    words = typed.removeprefix("fabric-core run ").replace("train.py", f"{tmp_path}/train.py").split()
    (tmp_path / "train.py").touch()
    done = command(sys.executable, "-m", "fabric_core", "run", "--dry-run", "--accelerator", "cpu", *words)
    assert done.code == 0, done.err
    assert "torchrun --nnodes 2 --nproc-per-node 4" in done.out
    assert f"{tmp_path}/train.py --lr 0.1" in done.out
