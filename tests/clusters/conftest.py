"""Real clusters on one machine: SLURM on loopback, MPI's process managers, and hosts that are network namespaces."""

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

_INSTALL = "not installed: .ci/install-clusters installs it"
_SLURM = """
ClusterName=trial
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={daemon}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CryptoType=crypto/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
KillWait=2
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmdParameters=config_overrides
NodeName={host} NodeAddr=127.0.0.1 CPUs=4 RealMemory=1000 State=UNKNOWN
PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


@dataclass(frozen=True)
class Finished:
    """A command that came to its end."""

    code: int
    out: str
    err: str


def run(*command: str, timeout: float = 90, cwd: Path | None = None, **variables: str) -> Finished:
    """Run a command to its end, in an environment that says nothing of the machine's own cluster."""
    done = subprocess.run(
        command, cwd=cwd, env={**clean(), **variables}, capture_output=True, text=True, timeout=timeout, check=False
    )
    return Finished(done.returncode, done.stdout, done.stderr)


def clean() -> dict[str, str]:
    """Give this process's environment without what a cluster sets."""
    foreign = ("SLURM", "OMPI_", "PMI", "MPI", "RANK", "LOCAL_", "WORLD_SIZE", "MASTER_", "TORCHELASTIC", "FABRIC_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def free_port() -> int:
    """Give a port that nobody uses at the moment."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def needs(*programs: str, root: bool = True) -> None:
    """Skip a test where a program or the permission is missing."""
    for program in programs:
        if shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin") is None:
            pytest.skip(f"{program} is {_INSTALL}")
    if root and os.geteuid() != 0:
        pytest.skip("only root may do this")


def wait_until(condition: Callable[[], bool], seconds: float, what: str) -> None:
    """Wait for something to become true."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"after {seconds:.0f} s still not so: {what}")
        time.sleep(0.05)


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Finished]]:
    """Start a SLURM of one node on loopback; gives what runs a command in it."""
    needs("munged", "slurmctld", "slurmd", "srun", "sbatch", "salloc", "sinfo")
    folder = tmp_path_factory.mktemp("slurm")
    for name in ("munge", "state", "spool"):
        (folder / name).mkdir()
    host = socket.gethostname().partition(".")[0]
    (folder / "slurm.conf").write_text(
        _SLURM.format(folder=folder, host=host, controller=free_port(), daemon=free_port())
    )
    variables = {"SLURM_CONF": str(folder / "slurm.conf")}

    def command(*words: str, **options: Any) -> Finished:
        return run(*words, **{**variables, **options})

    with contextlib.ExitStack() as stack:
        stack.callback(_stop, folder / "munge" / "pid")
        _start_munge(folder / "munge")
        for daemon in ("slurmctld", "slurmd"):
            stack.callback(_stop, folder / f"{daemon}.pid")
            _daemon(f"/usr/sbin/{daemon}", **variables)
        wait_until(lambda: command("sinfo", "-h", "-o", "%T").out.strip() == "idle", 30, "the node is idle")
        yield command
        command("scancel", "--state=RUNNING")


def _start_munge(folder: Path) -> None:
    """Start the authentication service of SLURM with files of its own, and not with the machine's."""
    (folder / "key").write_bytes(secrets.token_bytes(128))
    (folder / "key").chmod(0o600)
    files = {"socket": "socket", "key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    # --force: the folders of a temporary folder may be writable by others than root.
    _daemon("/usr/sbin/munged", "--force", *(f"--{option}={folder / name}" for option, name in files.items()))


def _daemon(*command: str, **variables: str) -> None:
    """Start a program that goes on in the background, and that must not keep the pipes of the tests open."""
    done = subprocess.run(
        command,
        env={**clean(), **variables},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        timeout=30,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()


def _stop(file: Path) -> None:
    """End a daemon by its file, and wait until it is gone."""
    if not file.exists():
        return
    pid = int(file.read_text())
    for sign, seconds in ((signal.SIGTERM, 10.0), (signal.SIGKILL, 5.0)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, sign)
        deadline = time.monotonic() + seconds
        while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
            time.sleep(0.05)


TRAIN = """
import json, os, sys, torch
from torch import nn
from fabric_core import Fabric

with Fabric(accelerator="cpu", strategy="ddp", devices=int(sys.argv[1])) as fabric:
    fabric.launch()
    fabric.seed_everything(7)
    model, optimizer = fabric.setup(model := nn.Linear(4, 1), torch.optim.SGD(model.parameters(), lr=0.1))
    for step in range(3):
        batch = torch.full((2, 4), float(fabric.global_rank + step))
        fabric.backward(model(batch).square().mean())
        optimizer.step()
        optimizer.zero_grad()
    fabric.save(sys.argv[2], {"model": model})
    world = fabric.world
    row = {"rank": world.global_rank, "size": world.world_size, "local": world.local_rank, "node": world.node_rank,
           "owner": world.owner, "weights": [round(w, 5) for w in model.weight.flatten().tolist()]}
    print(json.dumps(row) + "\\n", end="", flush=True)
"""


@pytest.fixture
def train(tmp_path: Path) -> str:
    """Give a script that trains under DDP and writes one checkpoint: ``script devices checkpoint``."""
    path = tmp_path / "train.py"
    path.write_text(TRAIN)
    return str(path)


@pytest.fixture(scope="session")
def command() -> Callable[..., Finished]:
    """Give what runs a command to its end: ``command("mpirun", ..., timeout=90, cwd=None, VARIABLE="value")``."""
    return run


@pytest.fixture(scope="session")
def needing() -> Callable[..., None]:
    """Give what skips a test where programs are missing, or where this isn't root: ``needing("mpirun")``."""
    return needs


def rows(output: str) -> list[dict[str, Any]]:
    """Give what the ranks printed, in their order."""
    found = (json.loads(line) for line in output.splitlines() if line.startswith("{"))
    return sorted(found, key=lambda row: int(row["rank"]))


@pytest.fixture(scope="session")
def ranks() -> Callable[[str], list[dict[str, Any]]]:
    """Give what reads what the ranks of ``train`` printed."""
    return rows


_HOSTS = (("10.99.0.1", "v0"), ("10.99.0.2", "v1"))


@pytest.fixture
def hosts(needing: Callable[..., None]) -> Iterator[tuple[str, str]]:
    """Make two namespaces joined by a pair of interfaces; gives their names."""
    needing("ip")
    names = (f"fabric-a{os.getpid()}", f"fabric-b{os.getpid()}")
    if subprocess.run(["ip", "netns", "add", names[0]], capture_output=True, check=False).returncode:
        pytest.skip("network namespaces are not allowed here")
    with contextlib.ExitStack() as stack:
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


def _agent(host: str, node: int, *words: str) -> "subprocess.Popen[str]":
    """Start the agent of one host, with a script and its arguments."""
    address, link = _HOSTS[node]
    where = ("--nnodes", "2", "--node-rank", str(node), "--rdzv-endpoint", f"{_HOSTS[0][0]}:29571")
    command = (sys.executable, "-m", "fabric_core", "run", *where, "--accelerator", "cpu", "--devices", "2")
    return subprocess.Popen(
        ["ip", "netns", "exec", host, *command, *words],
        env={**clean(), "GLOO_SOCKET_IFNAME": link, "OMP_NUM_THREADS": "1", "HOST": address},
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


@pytest.fixture
def agent() -> Callable[..., "subprocess.Popen[str]"]:
    """Give what starts ``fabric-core run`` on a host: ``agent(host, node, script, *arguments)``."""
    return _agent


@pytest.fixture
def ended() -> Callable[..., str]:
    """Give what waits for an agent, killed when it takes too long, for its output: ``ended(agent, seconds)``."""
    return _ended
