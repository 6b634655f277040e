"""Two hosts, each a network namespace of this machine: a world of four, cut off and killed."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Command = Callable[..., Any]

_JOB = """
import sys, time, torch
from fabric_core import Fabric

fabric = Fabric(accelerator="cpu", strategy="ddp:timeout=PT6S", devices=2, num_nodes=2)
total = fabric.all_reduce(torch.ones(1), reduce_op="sum").item()
print(f"{fabric.global_rank} of {fabric.world_size} on node {fabric.node_rank}: {total}\\n", end="", flush=True)
if len(sys.argv) > 1:
    while True:
        fabric.all_reduce(torch.ones(1))
        time.sleep(0.05)
fabric.teardown()
"""


_RESUMED = """
import os, sys, time, torch
from pathlib import Path
from torch import nn
from fabric_core import Fabric

folder, steps = Path(sys.argv[1]), int(sys.argv[2])
fabric = Fabric(accelerator="cpu", strategy="ddp:timeout=PT6S", devices=2, num_nodes=2)
fabric.launch()
fabric.seed_everything(7)
model, optimizer = fabric.setup(net := nn.Linear(4, 1), torch.optim.Adam(net.parameters(), lr=0.1))
state = {"model": model, "optimizer": optimizer, "step": 0}
if (folder / "last.ckpt").exists():
    fabric.load(folder / "last.ckpt", state)
print(f"begins at {state['step']}\\n", end="", flush=True)
while state["step"] < steps:
    batch = torch.arange(8.0).view(2, 4) * (state["step"] % 5 + 1) * (fabric.global_rank + 1)
    fabric.backward(model(batch).square().mean())
    optimizer.step()
    optimizer.zero_grad()
    state["step"] += 1
    fabric.save(folder / "last.ckpt", state)
    if fabric.is_global_zero:
        (folder / "step").write_text(str(state["step"]))
    time.sleep(0.02)
weights = [round(one, 6) for one in net.weight.flatten().tolist()]
print(f"rank {fabric.global_rank} has {weights}\\n", end="", flush=True)
fabric.teardown()
"""


@pytest.mark.slow
def test_two_hosts_are_one_world_of_four(
    hosts: tuple[str, str], agent: Command, ended: Command, tmp_path: Path
) -> None:
    """One agent on each host: four ranks, numbered by node, which reduce over all."""
    script = tmp_path / "job.py"
    script.write_text(_JOB)
    agents = [agent(host, node, str(script)) for node, host in enumerate(hosts)]
    lines = [line for one in agents for line in ended(one, 90).splitlines()]
    expected = [f"{rank} of 4 on node {rank // 2}: 4.0" for rank in range(4)]
    assert [line for line in sorted(lines) if " of 4 " in line] == expected, lines
    assert [one.returncode for one in agents] == [0, 0]


def _lose(fault: str, hosts: tuple[str, str], agents: list[Any]) -> None:
    """Cut the second host off, or kill its agent."""
    if fault == "link":
        subprocess.run(["ip", "-n", hosts[1], "link", "set", "v1", "down"], check=True, timeout=20)
    else:
        os.killpg(agents[1].pid, signal.SIGKILL)


@pytest.mark.faults
@pytest.mark.slow
@pytest.mark.parametrize("fault", ["link", "kill"])
def test_a_host_that_is_lost_ends_the_others(
    hosts: tuple[str, str], agent: Command, ended: Command, tmp_path: Path, fault: str
) -> None:
    """One host is cut off, or its agent killed: all end, the others soon after the collective's timeout of 6 s."""
    script = tmp_path / "job.py"
    script.write_text(_JOB)
    agents = [agent(host, node, str(script), "forever") for node, host in enumerate(hosts)]
    assert agents[0].stdout is not None
    while " of 4 " not in (line := agents[0].stdout.readline()):
        assert line, "the first agent ended"
    start = time.monotonic()
    _lose(fault, hosts, agents)
    ended(agents[0], 60)
    assert time.monotonic() - start < 45
    assert agents[0].returncode != 0
    ended(agents[1], 60)
    assert agents[1].returncode != 0


@pytest.mark.faults
@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("fault", ["link", "kill"])
def test_training_that_lost_a_host_goes_on_from_the_last_checkpoint(
    hosts: tuple[str, str], agent: Command, ended: Command, tmp_path: Path, fault: str
) -> None:
    """Started again after it, it ends with the weights of a training that nothing had happened to."""
    script = tmp_path / "job.py"
    script.write_text(_RESUMED)
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()

    def train(name: str, steps: int) -> list[Any]:
        return [agent(host, node, str(script), str(tmp_path / name), str(steps)) for node, host in enumerate(hosts)]

    def outputs(agents: list[Any]) -> list[str]:
        return [line for one in agents for line in ended(one, 120).splitlines()]

    agents = train("cut", 1_000_000)
    reached = tmp_path / "cut" / "step"
    _wait_for(reached.exists)
    start = time.monotonic()
    _lose(fault, hosts, agents)
    outputs(agents)
    assert time.monotonic() - start < 60
    assert 0 not in [one.returncode for one in agents]
    subprocess.run(["ip", "-n", hosts[1], "link", "set", "v1", "up"], check=True, timeout=20)
    steps = int(reached.read_text()) + 10
    agents = train("cut", steps)
    again = outputs(agents)
    assert [one.returncode for one in agents] == [0, 0], again
    begun = {int(line.split()[-1]) for line in again if line.startswith("begins at")}
    assert len(begun) == 1, again
    assert 0 < begun.pop() < steps
    whole = outputs(train("whole", steps))
    last = sorted(line for line in whole if line.startswith("rank"))
    assert len(last) == 4, whole
    assert sorted(line for line in again if line.startswith("rank")) == last


@pytest.mark.faults
@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("lost", [0, 1])
def test_a_rank_that_is_killed_is_restarted_on_both_hosts(
    hosts: tuple[str, str], agent: Command, ended: Command, tmp_path: Path, lost: int
) -> None:
    """All four start again, load the last checkpoint, and end with the weights of a training that was left alone."""
    script = tmp_path / "job.py"
    script.write_text(_RESUMED)
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    steps = 100

    def train(name: str, *options: str) -> list[Any]:
        words = (*options, str(script), str(tmp_path / name), str(steps))
        return [agent(host, node, *words) for node, host in enumerate(hosts)]

    agents = train("cut", "--max-restarts", "2")
    reached = tmp_path / "cut" / "step"
    _wait_for(reached.exists)
    ranks = Path(f"/proc/{agents[lost].pid}/task/{agents[lost].pid}/children").read_text().split()
    os.kill(int(ranks[-1]), signal.SIGKILL)
    lines = [line for one in agents for line in ended(one, 200).splitlines()]
    assert [one.returncode for one in agents] == [0, 0], lines
    begun = [int(line.split()[-1]) for line in lines if line.startswith("begins at")]
    assert len(begun) == 8, lines
    assert begun.count(0) == 4, lines
    whole = [line for one in train("whole") for line in ended(one, 120).splitlines()]
    last = sorted(line for line in whole if line.startswith("rank"))
    assert len(last) == 4, whole
    assert sorted(line for line in lines if line.startswith("rank")) == last


def _wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 90
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
