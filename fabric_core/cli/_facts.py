"""What a rank finds out about itself and its host, before it meets the others."""

import hashlib
import json
import os
import platform
import resource
import shutil
import socket
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median_low
from threading import Thread
from typing import Any, Final

import torch

from fabric_core.choosing.plan import Plan
from fabric_core.choosing.registry import Registry
from fabric_core.collectives import ProcessInfo
from fabric_core.kinds import groups

__all__ = ["Fault", "find_facts", "judge_facts", "node_of", "rank_of", "resolve_name"]

_PATIENCE: Final = 5.0
"""How many seconds a name may take to be resolved."""
_SLOW_NAME: Final = 1.0
_LEAST: Final = {"temporary": 1 << 30, "shared": 128 << 20}
"""Free bytes below which a folder is too full: data loaders with workers pass batches through shared memory."""
_FILES: Final = 1024
_CLOCKS: Final = 1.0
"""How many seconds clocks may differ."""
_LATE: Final = 15.0
_SLOWER: Final = 4.0
"""How many times slower than most a rank may compute."""


@dataclass(frozen=True)
class Fault:
    """Something that is broken.

    Args:
        where: The rank, node or link.
        what: What is wrong there.
        instead: What to do.
    """

    where: str
    what: str
    instead: str


def find_facts(info: ProcessInfo, registry: Registry, plan: Plan | None, error: str | None) -> dict[str, Any]:
    """Find out what can be compared with the other ranks, and what this host has.

    Args:
        info: This process's place.
        registry: What is installed.
        plan: What would be chosen here.
        error: Why nothing can be chosen here.
    """
    text = None if plan is None else json.dumps(plan.as_dict(), sort_keys=True, default=str)
    names = {"own": socket.gethostname(), **({"main": info.main_address} if info.main_port else {})}
    soft = {
        name: limit if (limit := resource.getrlimit(number)[0]) != resource.RLIM_INFINITY else None
        for name, number in (("open_files", resource.RLIMIT_NOFILE), ("locked_memory", resource.RLIMIT_MEMLOCK))
    }
    return {
        "rank": info.global_rank,
        "local_rank": info.local_rank,
        "node": info.node_rank,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "plugins": {one.distribution: one.version for kind in groups() for one in registry.offers(kind)},
        "plan": None if text is None else hashlib.sha256(text.encode()).hexdigest()[:16],
        "plan_error": error,
        "names": {which: resolve_name(name) for which, name in names.items()},
        "free_bytes": {
            name: shutil.disk_usage(path).free
            for name, path in (("temporary", tempfile.gettempdir()), ("shared", "/dev/shm"))  # noqa: S108 - read alone
            if Path(path).is_dir()
        },
        "limits": soft,
    }


def resolve_name(name: str) -> dict[str, Any]:
    """Resolve a host name, and say how long it took; one that gives no answer is left behind."""
    found: dict[str, Any] = {"name": name, "addresses": [], "error": f"no answer within {_PATIENCE:.0f} s"}

    def resolve() -> None:
        try:
            entries = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
            found.update(addresses=sorted({str(entry[4][0]) for entry in entries}), error=None)
        except OSError as error:
            found["error"] = str(error)

    start = time.perf_counter()
    thread = Thread(target=resolve, daemon=True)
    thread.start()
    thread.join(_PATIENCE)
    return {**found, "seconds": round(time.perf_counter() - start, 4)}


def node_of(one: Mapping[str, Any]) -> str:
    """Name the node of a rank."""
    return f"node {one['node']} ({one['host']})"


def rank_of(one: Mapping[str, Any]) -> str:
    """Name a rank."""
    return f"rank {one['rank']} on {node_of(one)}"


def judge_facts(ranks: Iterable[Mapping[str, Any]]) -> list[Fault]:
    """Say what is wrong with what the ranks found, and where they differ from most."""
    known = sorted(ranks, key=lambda one: int(one["rank"]))
    faults = [fault for one in known for fault in _own(one, several=len({each["node"] for each in known}) > 1)]
    same = "the same on every rank"
    for key, what in (("python", "Python"), ("torch", "PyTorch")):
        faults += _differing(known, {one["rank"]: one[key] for one in known}, what, same)
    for name in sorted({name for one in known for name in one["plugins"]}):
        versions = {one["rank"]: one["plugins"].get(name) or "nothing" for one in known}
        faults += _differing(known, versions, name, f"one version of {name} on every rank")
    plans = {one["rank"]: one["plan"] for one in known if one["plan"] is not None}
    faults += _differing(known, plans, "the plan", "the same arguments, variables, plugins and devices on every rank")
    return faults + _slow(known)


def _own(one: Mapping[str, Any], *, several: bool) -> list[Fault]:
    faults = []
    if one["plan_error"] is not None:
        faults.append(Fault(rank_of(one), f"no plan can be made: {one['plan_error']}", "what the error says"))
    for which, name in one["names"].items():
        if name["error"] is not None and (which == "main" or several):
            instead = "a name or address that every host knows; see /etc/hosts and the name servers"
            faults.append(
                Fault(rank_of(one), f"the host name {name['name']} does not resolve: {name['error']}", instead)
            )
        elif name["seconds"] > _SLOW_NAME:
            what = f"the host name {name['name']} took {name['seconds']:.1f} s to resolve"
            faults.append(Fault(rank_of(one), what, "look at the name servers of that host"))
    if one["local_rank"] == 0:
        for name, least in _LEAST.items():
            free = one["free_bytes"].get(name, least)
            if free < least:
                what = f"{name} {'folder' if name == 'temporary' else 'memory'} has {free >> 20} MiB free"
                instead = "TMPDIR, or free it" if name == "temporary" else "more of /dev/shm (docker run --shm-size)"
                faults.append(Fault(node_of(one), what, f"{instead}: at least {least >> 20} MiB"))
        files = one["limits"]["open_files"]
        if files is not None and files < _FILES:
            faults.append(Fault(node_of(one), f"a process may open {files} files", f"ulimit -n {_FILES} or more"))
    return faults


def _differing(known: list[Mapping[str, Any]], values: Mapping[int, str], what: str, instead: str) -> list[Fault]:
    """Name the ranks that differ from most; of two that are as many, those that differ from the lowest rank."""
    every = list(values.values())
    if not every:
        return []
    usual = max(dict.fromkeys(every), key=every.count)
    return [
        Fault(rank_of(one), f"{what} is {values[one['rank']]} here, and {usual} elsewhere", instead)
        for one in known
        if values.get(one["rank"], usual) != usual
    ]


def _slow(known: list[Mapping[str, Any]]) -> list[Fault]:
    """Name the ranks that came late, compute slowly, or have another time, as far as it was measured."""
    faults = []
    for one in known:
        late, compute, clock = (one.get(key) for key in ("late", "compute", "clock"))
        if late is not None and late > _LATE:
            faults.append(Fault(rank_of(one), f"it came {late:.0f} s after rank 0", "look at its file system"))
        usual = median_low(own for each in known if (own := each.get("compute")) is not None) if compute else 0.0
        if compute is not None and compute > usual * _SLOWER:
            what = f"it is slow: it computes in {compute:.4f} s what takes most {usual:.4f} s"
            faults.append(Fault(rank_of(one), what, "look what else runs on its device, and at the device's clocks"))
        if clock is not None and abs(clock) > _CLOCKS:
            faults.append(Fault(rank_of(one), f"its clock is {clock:+.1f} s off rank 0's", "chrony, or another NTP"))
    return faults
