"""From a plan to a world: the one place that reads ``os.environ``."""

import hashlib
import itertools
import json
import os
from collections.abc import Iterable
from datetime import timedelta
from functools import cache
from typing import Any

from torch.distributed import PrefixStore, Store

from fabric_core.choosing.plan import Plan
from fabric_core.collectives import Collectives
from fabric_core.contracts import Accelerator, Launcher, ProcessInfo, Strategy, World
from fabric_core.errors import LaunchError
from fabric_core.running.meeting import meet

__all__ = ["agree", "check_connected", "detect", "environment", "make_world"]


def environment() -> dict[str, str]:
    """Give the environment variables as they are now."""
    return dict(os.environ)


def detect(launchers: Iterable[tuple[str, Launcher]]) -> tuple[str, Launcher, ProcessInfo] | None:
    """Ask the launchers, the highest priority first, whether their system started this process."""
    variables = environment()
    for name, launcher in launchers:
        info = launcher.detect(variables)
        if info is not None:
            return name, launcher, info
    return None


def make_world(info: ProcessInfo, plan: Plan, accelerator: Accelerator, timeout: timedelta) -> World:
    """Find this process's device, and check that as many processes were started as the plan has.

    Raises:
        LaunchError: Another number of processes was started.
    """
    devices = len(plan.device_indices)
    if info.world_size != plan.world_size or info.local_world_size != devices:
        started = f"devices={info.local_world_size}, num_nodes={info.world_size // info.local_world_size}"
        how = info.how_to_start.format(nodes=plan.num_nodes, devices=devices)
        raise LaunchError(
            f"{info.owner or 'the launcher'} started {info.world_size} processes"
            f" ({info.local_world_size} on this node), and the plan has {plan.world_size}"
            f" ({devices} on each of {plan.num_nodes} nodes)",
            where="Fabric(devices=, num_nodes=)",
            instead=f"{started}; or {how}" if how else started,
        )
    device = accelerator.devices(plan.device_indices)[info.local_rank]
    return World(
        **{name: getattr(info, name) for name in ProcessInfo.__dataclass_fields__},
        device=device,
        backend=accelerator.process_group_backend,
        open_store=_store_opener(info, timeout) if info.main_port else None,
        timeout=timeout,
    )


def _store_opener(info: ProcessInfo, timeout: timedelta) -> Any:
    @cache
    def open_store() -> Store:
        mine = PrefixStore(f"fabric/{info.attempt}", meet(info, timeout))
        # The n-th time that this rank joins meets the n-th time of the others, and finds no key of an earlier time.
        return PrefixStore(f"join/{mine.add(f'joined/{info.global_rank}', 1)}", mine)

    return open_store


def agree(world: World, plan: Plan) -> None:
    """Compare the plan over the ranks, before the first collective.

    Args:
        world: This process.
        plan: This process's plan.

    Raises:
        LaunchError: Ranks differ; raised on every rank, and names those that differ from rank 0.
    """
    if world.open_store is None or world.world_size == 1:
        return
    store = world.open_store()
    text = json.dumps(
        [[choice.kind, choice.name, choice.distribution, str(choice.options)] for choice in plan.choices]
        + [["processes", str(plan.world_size), "", ""]]
    )
    digest = hashlib.sha256(text.encode()).hexdigest()
    store.set(f"plan/{world.global_rank}", f"{digest}\n{text}")
    others = [store.get(f"plan/{rank}").decode().partition("\n") for rank in range(world.world_size)]
    first = others[0]
    differing = [rank for rank, other in enumerate(others) if other[0] != first[0]]
    if differing:
        mine, its = json.loads(first[2]), json.loads(others[differing[0]][2])
        changes = [
            f"{_side(here)} on rank 0, {_side(there)} on rank {differing[0]}"
            for here, there in itertools.zip_longest(mine, its)
            if here != there
        ]
        raise LaunchError(
            f"the ranks don't agree on the plan: rank {', '.join(map(str, differing))} differs from rank 0",
            where="Fabric(...)",
            got="; ".join(changes),
            instead="the same arguments, variables, plugins and versions on every rank",
            ranks=differing,
        )


def check_connected(collectives: object, world: World, strategy: Strategy) -> None:
    """Make sure that a strategy has connected this process with all others.

    Raises:
        LaunchError: It has not.
    """
    there = isinstance(collectives, Collectives)
    if isinstance(collectives, Collectives) and (collectives.world_size > 1 or world.world_size == 1):
        return
    raise LaunchError(
        f"{type(strategy).__name__}.connect did not connect the {world.world_size} processes"
        if there
        else f"{type(strategy).__name__}.connect returned no Collectives",
        where="fabric.launch()",
        got=repr(collectives),
        instead="return ProcessGroup(world) from connect; SingleProcess() is for one process",
    )


def _side(choice: list[str] | None) -> str:
    if choice is None:
        return "nothing"
    kind, name, distribution, options = choice
    return (
        f"{kind} {name}"
        + (f" {options}" if options not in {"", "{}"} else "")
        + (distribution and f" ({distribution})")
    )
