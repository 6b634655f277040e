"""``fabric-core run``: ``torchrun`` with the request in variables."""

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Command = Callable[..., Any]

_SCRIPT = """
import sys, torch
from fabric_core import Fabric

fabric = Fabric()
total = fabric.all_reduce(torch.ones(1), reduce_op="sum").item()
kind = type(fabric.strategy).__name__
print(f"{fabric.global_rank} of {fabric.world_size}: {total} {kind} {sys.argv[1:]}\\n", end="", flush=True)
fabric.teardown()
"""


@pytest.fixture
def script(tmp_path: Path) -> str:
    """Give a script that leaves everything at its default, and never launches."""
    path = tmp_path / "plain.py"
    path.write_text(_SCRIPT)
    return str(path)


@pytest.mark.slow
def test_request_reaches_the_script_which_has_ranks_at_once(command: Command, script: str) -> None:
    """Ranks and collectives work right after ``Fabric()``; the script's own arguments are untouched."""
    request = ("--accelerator", "cpu", "--devices", "2", "--strategy", "ddp")
    done = command(sys.executable, "-m", "fabric_core", "run", *request, script, "--devices", "9")
    assert done.code == 0, done.err
    expected = [f"{rank} of 2: 2.0 DDPStrategy ['--devices', '9']" for rank in range(2)]
    assert sorted(line for line in done.out.splitlines() if line) == expected


def test_dry_run_says_what_each_node_would_start(command: Command, script: str) -> None:
    """One line for each node, and nothing is started."""
    nodes = ("--nnodes", "2", "--rdzv-endpoint", "10.0.0.1:29500", "--accelerator", "cpu", "--devices", "2")
    done = command(sys.executable, "-m", "fabric_core", "run", "--dry-run", *nodes, script)
    assert done.out.splitlines() == [
        f"node {node}: FABRIC_ACCELERATOR=cpu FABRIC_DEVICES=2 FABRIC_NUM_NODES=2 torchrun --nnodes 2"
        f" --nproc-per-node 2 --max-restarts 0 --node-rank {node} --master-addr 10.0.0.1 --master-port 29500 {script}"
        for node in range(2)
    ], done.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--nnodes", "2"), "--rdzv-endpoint HOST:PORT"),
        (("--nnodes", "x"), "--nnodes is no number of nodes"),
        (("--nnodes", "2", "--num-nodes", "3"), "say different numbers"),
        (("--accelerator", "cpu", "--devices", "0"), "devices"),
    ],
)
def test_mistakes_are_messages(command: Command, script: str, arguments: tuple[str, ...], message: str) -> None:
    """What can't work is a message without a traceback."""
    done = command(sys.executable, "-m", "fabric_core", "run", *arguments, script)
    assert (done.code, "Traceback" in done.err) == (2, False)
    assert message in done.err


_FAILING = """
import os, sys
from fabric_core import Fabric

fabric = Fabric()
print(f"data {sys.argv[1]}", flush=True)
if os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0" and fabric.global_rank == 1:
    raise ValueError("the disk is full")
fabric.barrier()
fabric.teardown()
"""


@pytest.mark.slow
@pytest.mark.parametrize(("restarts", "code"), [("0", 1), ("1", 0)])
def test_a_failed_rank_is_named_and_started_again(command: Command, tmp_path: Path, restarts: str, code: int) -> None:
    """The summary names it; exit code 1 without a traceback of the command's own, and 0 where a restart helped."""
    script = tmp_path / "failing.py"
    script.write_text(_FAILING)
    request = ("--accelerator", "cpu", "--devices", "2", "--strategy", "ddp", "--max-restarts", restarts)
    done = command(sys.executable, "-m", "fabric_core", "run", *request, str(script), "--json")
    assert done.code == code, done.err
    assert done.out.split().count("data") == 2 * (2 - code)
    assert done.out.split().count("--json") == 2 * (2 - code)
    assert "ValueError: the disk is full" in done.err
    assert ("rank      : 1 (local_rank: 1)" in done.err) == bool(code)
    assert "fabric_core/cli" not in done.err


_LONG = """
import time
from fabric_core import Fabric

fabric = Fabric()
print("here", flush=True)
time.sleep(1000)
"""


@pytest.mark.slow
def test_a_signal_ends_the_command_and_its_ranks(tmp_path: Path) -> None:
    """The exit code says which."""
    script = tmp_path / "long.py"
    script.write_text(_LONG)
    words = ("--accelerator", "cpu", "--devices", "2", "--strategy", "ddp", str(script))
    with subprocess.Popen(
        [sys.executable, "-m", "fabric_core", "run", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as agent:
        assert agent.stdout is not None
        assert agent.stdout.readline() == "here\n"
        ranks = [int(one) for one in Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()]
        assert len(ranks) >= 2
        agent.send_signal(signal.SIGTERM)
        _, err = agent.communicate(timeout=100)
    assert agent.returncode == 128 + signal.SIGTERM, err
    assert "Traceback" not in err
    assert not [one for one in ranks if Path(f"/proc/{one}").exists()]
