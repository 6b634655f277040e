"""``fabric-core doctor`` under real schedulers and on two hosts: what is broken is named, in time."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest

Command = Callable[..., Any]

_DOCTOR = (sys.executable, "-m", "fabric_core", "doctor", "--json", "--accelerator", "cpu", "--strategy", "ddp")
_LENIENT = ("--max-latency", "1000", "--min-bandwidth", "0")  # of a machine that does much else
_OPEN_MPI = ("mpirun.openmpi", "--allow-run-as-root", "--oversubscribe", "-np", "2")
_METADATA = "Metadata-Version: 2.1\nName: acme-extra\nVersion: {}\n"


def _wrapper(folder: Path, line: str) -> str:
    """Make a script that runs the doctor, after a line for rank 1 of Open MPI alone."""
    script = folder / "wrapper.sh"
    words = " ".join((*_DOCTOR, *_LENIENT))
    script.write_text(f'#!/bin/sh\nif [ "$OMPI_COMM_WORLD_RANK" = 1 ]; then\n{line}\nfi\nexec {words}\n')
    script.chmod(0o755)
    return str(script)


def _said(faults: list[dict[str, str]]) -> str:
    return "\n".join(f"{one['where']}: {one['what']}" for one in faults)


@pytest.mark.sampled(0.15)
@pytest.mark.slow
def test_under_slurm_all_is_sound(slurm: Command) -> None:
    """``srun -n2``: one world of two, with its ranks, versions, plan, plugins and links."""
    done = slurm("srun", "-n2", *_DOCTOR, *_LENIENT)
    report = json.loads(done.out)
    assert (done.code, report["sound"], report["faults"]) == (0, True, [])
    assert (report["started_by"], report["world_size"]) == ("srun", 2)
    assert len({(one["torch"], one["python"], one["plan"]) for one in report["ranks"]}) == 1
    assert [(link["ranks"], [one["bytes"] for one in link["sizes"]][:2]) for link in report["links"]] == [
        ([0, 1], [8, 65536])
    ]
    assert [one["bytes"] for one in report["all_reduce"]][:2] == [8, 65536]


@pytest.mark.sampled(0.15)
@pytest.mark.slow
def test_another_version_of_a_plugin_is_named(command: Command, needing: Command, tmp_path: Path) -> None:
    """Rank 1 finds another version of a distribution: both versions are said, with its rank."""
    needing(_OPEN_MPI[0])
    for version in ("1.0", "2.0"):
        info = tmp_path / version / f"acme_extra-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(_METADATA.format(version))
        (info / "entry_points.txt").write_text("[fabric.loggers]\nacme = fabric_plugins.loggers.csv:CSVLogger\n")
    script = _wrapper(tmp_path, f"export PYTHONPATH={tmp_path}/2.0")
    done = command(*_OPEN_MPI, script, PYTHONPATH=f"{tmp_path}/1.0")
    report = json.loads(done.out)
    assert done.code == 1
    assert [one["what"] for one in report["faults"]] == ["acme-extra is 2.0 here, and 1.0 elsewhere"]
    assert report["faults"][0]["where"].startswith("rank 1 on node 0")


@pytest.mark.sampled(0.15)
@pytest.mark.slow
@pytest.mark.parametrize("line", ["sleep 100", "exit 0"], ids=["silent", "ended"])
def test_a_missing_rank_is_named(command: Command, needing: Command, tmp_path: Path, line: str) -> None:
    """Rank 1 does something else, or nothing: it is named, well within a minute."""
    needing(_OPEN_MPI[0])
    start = time.monotonic()
    done = command(*_OPEN_MPI, _wrapper(tmp_path, line))
    assert time.monotonic() - start < 60
    assert done.code == 1
    report = json.loads(done.out)
    assert "rank 1: it did not come within" in _said(report["faults"])
    assert [one["rank"] for one in report["ranks"]] == [0]


@pytest.mark.sampled(0.15)
@pytest.mark.slow
def test_a_name_that_does_not_resolve_is_named(command: Command, needing: Command, tmp_path: Path) -> None:
    """Rank 1 is told another host for rank 0, which nobody knows: it says so itself, and rank 0 misses it."""
    needing(_OPEN_MPI[0])
    start = time.monotonic()
    done = command(*_OPEN_MPI, _wrapper(tmp_path, "export MASTER_ADDR=no-such-host.invalid"))
    assert time.monotonic() - start < 60
    assert done.code != 0
    assert "the host name no-such-host.invalid does not resolve" in done.out
    assert '"seen_by": 1' in done.out


_TC: Final = shutil.which("tc", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin") or "tc"


@pytest.mark.sampled(0.15)
@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "limits"),
    [
        ("netem delay 30ms", ("--min-bandwidth", "0", "--max-latency", "20")),
        ("tbf rate 40mbit burst 64kb latency 400ms", ("--min-bandwidth", "10", "--max-latency", "1000")),
    ],
    ids=["late", "narrow"],
)
def test_a_slow_link_between_two_hosts_is_named(
    hosts: tuple[str, str], agent: Command, ended: Command, shape: str, limits: tuple[str, ...]
) -> None:
    """A link that ``tc`` delays, or lets 5 MB/s through: both hosts are named, and no rank."""
    for host, link in zip(hosts, ("v0", "v1"), strict=True):
        command = [_TC, "-n", host, "qdisc", "add", "dev", link, "root", *shape.split()]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip(f"the kernel has no {shape.split(maxsplit=1)[0]}")
    start = time.monotonic()
    words = ("-m", "fabric_core", "doctor", "--json", "--strategy", "ddp", *limits)
    agents = [agent(host, node, *words) for node, host in enumerate(hosts)]
    outputs = [ended(one, 90) for one in agents]
    assert time.monotonic() - start < 90  # two agents and four ranks start on what may be two cores
    assert all(one.returncode for one in agents)
    report = json.loads(outputs[0][outputs[0].index("{\n") : outputs[0].rindex("\n}") + 2])
    links = [one for one in report["faults"] if "link" in one["where"]]
    assert [one["where"].partition(" (")[0] for one in links] == ["the link of node 0"], _said(report["faults"])
    assert "and node 1" in links[0]["where"]
    assert links[0]["what"].startswith("it is slow: ")
