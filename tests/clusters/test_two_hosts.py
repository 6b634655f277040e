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
    if fault == "link":
        subprocess.run(["ip", "-n", hosts[1], "link", "set", "v1", "down"], check=True, timeout=20)
    else:
        os.killpg(agents[1].pid, signal.SIGKILL)
    ended(agents[0], 60)
    assert time.monotonic() - start < 45
    assert agents[0].returncode != 0
    ended(agents[1], 60)
    assert agents[1].returncode != 0
