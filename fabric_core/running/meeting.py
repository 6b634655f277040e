"""Where the ranks of a job meet: the store that one process serves and all others find.

[Note: ports] A scheduler tells a job's ranks no port. So launchers derive one from the job's id, which all ranks
know, and that port may be in use. Rank 0 takes the first free one of a few that follow each other, and writes the job's
id into its store. The others try those ports in turn until one of them has the id: neither another program nor the
store of another job is taken for it.
"""

import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from typing import Final

from torch.distributed import Store, TCPStore

from fabric_core.contracts import ProcessInfo
from fabric_core.errors import LaunchError

__all__ = ["meet"]

_PORTS: Final = 16
"""How many ports are tried."""
_KNOCK: Final = 2.0
"""How many seconds a host may take to answer at all."""
_ANSWER: Final = timedelta(seconds=5)
"""How long a store may take to say whose it is."""
_PAUSE: Final = 0.2
"""How many seconds lie between two rounds over the ports."""
_JOB: Final = "fabric-job"


def meet(info: ProcessInfo, timeout: timedelta) -> Store:
    """Open the store that the ranks of a job share.

    Args:
        info: This process's place.
        timeout: How long the ranks wait for each other.

    Raises:
        LaunchError: Rank 0 is not where the others look for it, or has no free port, or was not found in time.
    """
    if not info.job_id:
        server = info.global_rank == 0 and not info.agent_store
        return _connect(info, info.main_port, timeout, server=server)
    return _serve(info, timeout) if info.global_rank == 0 else _find(info, timeout)


def _serve(info: ProcessInfo, timeout: timedelta) -> Store:
    """Make the store at the first free port ([Note: ports])."""
    family, address = _resolve(info)
    _check_own(info, family, address)
    # The loopback address alone where all ranks are here; an IPv4 socket wherever possible: on a dual one PyTorch looks
    # up the name of each mapped address that connects.
    host = address if info.world_size == info.local_world_size else ""
    for port in _ports(info):
        try:
            listener = socket.create_server((host, port), family=family, backlog=socket.SOMAXCONN)
        except OSError:
            continue
        store = _connect(info, port, timeout, server=True, descriptor=listener.detach())
        store.set(_JOB, info.job_id)
        return store
    raise LaunchError(
        "no port is free for the ranks to meet at",
        where="rank 0",
        got=f"{_PORTS} ports from {info.main_port} on are in use",
        instead="MASTER_PORT, the same free port in every process",
    )


def _check_own(info: ProcessInfo, family: socket.AddressFamily, address: str) -> None:
    """Check that the others will look for rank 0 on this machine."""
    try:
        socket.create_server((address, 0), family=family).close()
    except OSError as error:
        raise LaunchError(
            f"rank 0 runs on {socket.gethostname()}, and the other ranks look for it elsewhere",
            where="environment",
            got=info.main_address,
            instead="MASTER_ADDR, the address of rank 0's host, in every process",
        ) from error


def _find(info: ProcessInfo, timeout: timedelta) -> Store:
    """Look for the store of this job until rank 0 has made it ([Note: ports])."""
    deadline = time.monotonic() + timeout.total_seconds()
    while time.monotonic() < deadline:
        _, address = _resolve(info)
        for port in _ports(info):
            try:
                socket.create_connection((address, port), timeout=_KNOCK).close()
            except OSError:
                continue
            with suppress(RuntimeError, ValueError):  # it is no store
                store = _connect(info, port, _ANSWER, server=False)
                if store.check([_JOB]) and store.get(_JOB).decode() == info.job_id:
                    store.set_timeout(timeout)
                    return store
        time.sleep(_PAUSE)
    raise LaunchError(
        f"rank {info.global_rank} did not find rank 0 within {timeout.total_seconds():.0f} s",
        where=f"{info.main_address}, {_PORTS} ports from {info.main_port} on",
        instead="MASTER_ADDR and MASTER_PORT, the same in every process, where another address or port must be used",
    )


def _ports(info: ProcessInfo) -> Iterator[int]:
    yield from range(info.main_port, info.main_port + _PORTS)


def _resolve(info: ProcessInfo) -> tuple[socket.AddressFamily, str]:
    """Find the address of the host of rank 0, an IPv4 one if there is one."""
    try:
        entries = socket.getaddrinfo(info.main_address, None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise LaunchError(
            f"nothing is known of the host of rank 0: {error}",
            where="environment",
            got=info.main_address,
            instead="MASTER_ADDR, an address of rank 0's host, in every process",
        ) from error
    family, _, _, _, address = min(entries, key=lambda entry: entry[0] != socket.AF_INET)
    return family, str(address[0])


def _connect(
    info: ProcessInfo, port: int, timeout: timedelta, *, server: bool, descriptor: int | None = None
) -> TCPStore:
    return TCPStore(
        info.main_address,
        port,
        info.world_size,
        is_master=server,
        timeout=timeout,
        wait_for_workers=False,
        master_listen_fd=descriptor,
    )
