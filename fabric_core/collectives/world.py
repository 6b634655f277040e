"""Who this process is while it runs."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import timedelta

import torch
from torch.distributed import Store

__all__ = ["ProcessInfo", "World"]


@dataclass(frozen=True, kw_only=True)
class ProcessInfo:
    """This process's place among the others, and how to meet them.

    Args:
        global_rank: This process among all, from 0.
        local_rank: This process among those of its node, from 0.
        node_rank: This node among all, from 0.
        world_size: The number of processes.
        local_world_size: The number of processes on this node.
        main_address: Where the store listens: a host name or an address.
        main_port: Where the store listens: a TCP port; with a ``job_id`` the first of those that may be taken.
        job_id: What this job has in common with no other. With it nobody chose the port: rank 0 takes the first free
            one from ``main_port`` on, and the others find it by this.
        attempt: How often the processes were restarted before.
        agent_store: Whether the store belongs to the process that started the ranks; otherwise rank 0 makes it.
        owner: What started the processes, for messages and for tearing down.
        how_to_start: How to start another number of processes, for messages; ``{nodes}`` and ``{devices}`` stand for
            the numbers of nodes and of devices on each.
    """

    global_rank: int = 0
    local_rank: int = 0
    node_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    main_address: str = "127.0.0.1"
    main_port: int = 0
    job_id: str = ""
    attempt: int = 0
    agent_store: bool = False
    owner: str = ""
    how_to_start: str = ""


@dataclass(frozen=True, kw_only=True)
class World(ProcessInfo):
    """Who this process is: its ranks, as in ``ProcessInfo``, its device, and what a process group needs.

    Args:
        device: The device that this process trains on.
        backend: The process group's backend for that device, as ``torch.distributed.init_process_group`` takes it.
        open_store: Gives the store that the ranks share; the same object on every call, and empty for every ``Fabric``.
            Absent with one process that nobody started.
        timeout: How long a collective waits for the other ranks.
        closing: What is called when the ``Fabric`` ends, the last first; also where connecting failed half-way.
    """

    device: torch.device
    backend: str
    open_store: Callable[[], Store] | None = None
    timeout: timedelta = timedelta(minutes=30)
    closing: ExitStack = field(default_factory=ExitStack, repr=False, compare=False)

    @property
    def is_global_zero(self) -> bool:
        """Whether this is the process that speaks for all."""
        return self.global_rank == 0
