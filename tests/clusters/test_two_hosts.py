"""Two hosts, each a network namespace of this machine: a world of four, cut off and killed."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

Command = Callable[..., Any]

_HOSTS = (("10.99.0.1", "v0"), ("10.99.0.2", "v1"))


@pytest.fixture
def hosts(needing: Command) -> Iterator[tuple[str, str]]:
    """Make two namespaces joined by a pair of interfaces; gives their names."""
    needing("ip")
    names = (f"fabric-a{os.getpid()}", f"fabric-b{os.getpid()}")
    if subprocess.run(["ip", "netns", "add", names[0]], capture_output=True, check=False).returncode:
        pytest.skip("network namespaces are not allowed here")
    with ExitStack() as stack:
        stack.callback(_ip, "netns", "del", names[0])
        _ip("netns", "add", names[1])
        stack.callback(_ip, "netns", "del", names[1])
        _ip("link", "add", "v0", "netns", names[0], "type", "veth", "peer", "name", "v1", "netns", names[1])
        for name, (address, link) in zip(names, _HOSTS, strict=True):
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", link)
            for one in (link, "lo"):
                _ip("-n", name, "link", "set", one, "up")
        yield names


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, timeout=20)


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


def _agent(host: str, node: int, script: Path, *arguments: str) -> "subprocess.Popen[str]":
    """Start the agent of one host."""
    address, link = _HOSTS[node]
    where = ("--nnodes", "2", "--node-rank", str(node), "--rdzv-endpoint", f"{_HOSTS[0][0]}:29571")
    command = (sys.executable, "-m", "fabric_core", "run", *where, "--accelerator", "cpu", "--devices", "2")
    return subprocess.Popen(
        ["ip", "netns", "exec", host, *command, str(script), *arguments],
        env={**os.environ, "GLOO_SOCKET_IFNAME": link, "OMP_NUM_THREADS": "1", "HOST": address},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def _ended(agent: "subprocess.Popen[str]", seconds: float) -> str:
    try:
        return agent.communicate(timeout=seconds)[0]
    finally:
        if agent.poll() is None:
            os.killpg(agent.pid, signal.SIGKILL)
            agent.communicate()


@pytest.mark.slow
def test_two_hosts_are_one_world_of_four(hosts: tuple[str, str], tmp_path: Path) -> None:
    """One agent on each host: four ranks, numbered by node, which reduce over all."""
    script = tmp_path / "job.py"
    script.write_text(_JOB)
    agents = [_agent(host, node, script) for node, host in enumerate(hosts)]
    lines = [line for agent in agents for line in _ended(agent, 90).splitlines()]
    expected = [f"{rank} of 4 on node {rank // 2}: 4.0" for rank in range(4)]
    assert [line for line in sorted(lines) if " of 4 " in line] == expected, lines
    assert [agent.returncode for agent in agents] == [0, 0]


@pytest.mark.faults
@pytest.mark.slow
@pytest.mark.parametrize("fault", ["link", "kill"])
def test_a_host_that_is_lost_ends_the_others(hosts: tuple[str, str], tmp_path: Path, fault: str) -> None:
    """One host is cut off, or its agent killed: all end, the others soon after the collective's timeout of 6 s."""
    script = tmp_path / "job.py"
    script.write_text(_JOB)
    agents = [_agent(host, node, script, "forever") for node, host in enumerate(hosts)]
    assert agents[0].stdout is not None
    while " of 4 " not in (line := agents[0].stdout.readline()):
        assert line, "the first agent ended"
    start = time.monotonic()
    if fault == "link":
        _ip("-n", hosts[1], "link", "set", "v1", "down")
    else:
        os.killpg(agents[1].pid, signal.SIGKILL)
    _ended(agents[0], 60)
    assert time.monotonic() - start < 45
    assert agents[0].returncode != 0
    _ended(agents[1], 60)
    assert agents[1].returncode != 0
