"""From a plan to a world: the one place that reads ``os.environ``."""

import inspect
import itertools
import json
import os
import sys
import time
from collections.abc import Iterable
from datetime import timedelta
from functools import cache
from typing import Any, Final

import torch.distributed as dist
from torch.distributed import PrefixStore, Store

from fabric_core.choosing.offers import causes
from fabric_core.choosing.plan import Plan
from fabric_core.collectives import Collectives
from fabric_core.contracts import Accelerator, Launcher, ProcessInfo, Strategy, World
from fabric_core.errors import FabricError, LaunchError, LaunchTypeError, QuarantinedError
from fabric_core.running.failing import Failures
from fabric_core.running.meeting import meet

__all__ = [
    "agree",
    "check_connected",
    "check_launched",
    "check_nodes",
    "detect",
    "environment",
    "make_world",
    "starter",
]


_LOOK: Final = 1.0
"""How often, in seconds, a waiting rank looks whether the others can still come."""
_LOOKS: Final = 2_000
"""How many looks a second the store gets from a large world whose ranks wait."""
_SAY: Final = 30.0
"""After how many seconds a waiting rank says whom it waits for."""
_NAMED: Final = 8
"""How many missing ranks a message names."""


def environment() -> dict[str, str]:
    """Give the environment variables as they are now."""
    return dict(os.environ)


def detect(launchers: Iterable[tuple[str, Launcher]]) -> tuple[str, Launcher, ProcessInfo] | None:
    """Ask the launchers, the highest priority first, whether their system started this process.

    Raises:
        LaunchError: A launcher's system did, and what it says of this process makes no sense.
        QuarantinedError: A launcher fails as it is asked. It isn't passed over: were its system the one that started
            this process, each process would train alone.
    """
    variables = environment()
    for name, launcher in launchers:
        info: Any = None
        try:
            info = launcher.detect(variables)
        except (FabricError, KeyboardInterrupt):
            raise
        except BaseException as error:  # a stranger's code may raise anything
            raise _broken(name, f"detect failed: {causes(error)}") from error
        if info is not None and not isinstance(info, ProcessInfo):
            raise _broken(name, f"detect gave an object of the type {type(info).__name__}, and no ProcessInfo")
        if info is not None:
            return name, launcher, info
    return None


def _broken(name: str, reason: str) -> QuarantinedError:
    return QuarantinedError(
        f"the launcher {name!r} can't be used: {reason}",
        where="fabric.launch()",
        instead=f"fix it, or FABRIC_DISABLE_PLUGINS={name} where it isn't needed",
    )


def starter(launchers: Iterable[tuple[str, Launcher]], nodes: int) -> Launcher:
    """Choose who starts the processes: the launcher with the highest priority that works for this number of nodes.

    Raises:
        LaunchError: No launcher is installed, or there are several nodes and none declares ``multi_node``.
    """
    names = []
    for name, launcher in launchers:
        if nodes == 1 or launcher.capabilities.multi_node:
            return launcher
        names.append(name)
    raise LaunchError(
        f"no launcher that starts processes on {nodes} nodes is installed" if names else "no launcher is installed",
        where="fabric.launch()",
        got=f"{', '.join(names)}, which don't declare multi_node" if names else None,
        instead="num_nodes=1, or install one that declares multi_node=True" if names else "install one",
    )


def check_nodes(name: str, launcher: Launcher, info: ProcessInfo) -> None:
    """Refuse several nodes under a launcher that doesn't declare them.

    Raises:
        LaunchError: There are more processes than on this node, and ``multi_node`` is not declared.
    """
    if info.world_size > info.local_world_size and not launcher.capabilities.multi_node:
        raise LaunchError(
            f"the launcher {name!r} found processes on several nodes, and doesn't declare multi_node",
            where="fabric.launch()",
            got=f"{info.world_size} processes, {info.local_world_size} of them on this node",
            instead="start all processes on one node, or a launcher with LauncherCapabilities(multi_node=True)",
        )


def has_joined() -> bool:
    """Say whether this process has joined others already."""
    return dist.is_initialized() and dist.get_world_size() > 1


def make_world(
    info: ProcessInfo, plan: Plan, accelerator: Accelerator, strategy: Strategy, timeout: timedelta
) -> World:
    """Find this process's device, and check that as many processes were started as the plan has.

    Raises:
        LaunchError: Another number of processes was started.
    """
    devices = len(plan.device_indices)
    if info.world_size != plan.world_size or info.local_world_size != devices:
        alone = ""
        if plan.world_size == 1 and not strategy.capabilities.distributed:
            alone = f'; or strategy="{plan.strategy.name}", for each to be alone'
        started = f"devices={info.local_world_size}, num_nodes={info.world_size // info.local_world_size}"
        how = info.how_to_start.format(nodes=plan.num_nodes, devices=devices)
        raise LaunchError(
            f"{info.owner or 'the launcher'} started {info.world_size} processes"
            f" ({info.local_world_size} on this node), and the plan has {plan.world_size}"
            f" ({devices} on each of {plan.num_nodes} nodes)",
            where="Fabric(devices=, num_nodes=)",
            instead=(f"{started}; or {how}" if how else started) + alone,
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


def agree(world: World, plan: Plan, launcher: Launcher, failures: Failures) -> None:
    """Compare the plan over the ranks, before the first collective.

    What a rank asks of the store doesn't grow with their number: it compares with rank 0, says so if it differs, and
    waits for the one that came last to have counted all.

    Args:
        world: This process.
        plan: This process's plan.
        launcher: What recognised this process, and may notice that another one will never come.
        failures: Is told the store.

    Raises:
        LaunchError: Ranks differ; raised on every rank, and names those that differ from rank 0. Or one will not come.
    """
    if world.open_store is None:
        return
    store: Any = world.open_store()  # of its methods PyTorch types not all
    own = world.global_rank
    failures.meet(store)
    text = json.dumps(
        [[choice.kind, choice.name, choice.distribution, str(choice.options)] for choice in plan.choices]
        + [["processes", str(plan.world_size), "", ""]]
    )
    if own == 0:
        store.set("plan", text)
    store.append("came", f"{own},")
    _wait(store, "plan", world, launcher)
    first = store.get("plan").decode()
    if first != text:
        store.set(f"plan/{own}", text)
        store.append("differing", f"{own},")
    if store.add("compared", 1) == world.world_size:
        store.append("differing", "")
        store.set("verdict", store.get("differing"))
    _wait(store, "verdict", world, launcher)
    differing = sorted(int(rank) for rank in store.get("verdict").decode().split(",") if rank)
    if differing:
        mine, its = json.loads(first), json.loads(store.get(f"plan/{differing[0]}"))
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


def _wait(store: Store, key: str, world: World, launcher: Launcher) -> None:
    """Wait for a key; say after a while who has not come.

    Raises:
        LaunchError: Somebody will not come, or did not in time.
    """
    start = looked = time.monotonic()
    said = False
    pause = 0.002  # seconds
    # No wait of the store's own, which prints a warning each time that it was for nothing.
    while not store.check([key]):
        time.sleep(pause)
        pause = min(2 * pause, max(0.5, world.world_size / _LOOKS))
        now = time.monotonic()
        if now - looked > _LOOK:
            looked = now
            launcher.check_peers(world)
        waited = now - start
        late = waited > world.timeout.total_seconds()
        if not late and (said or waited < _SAY):
            continue
        said = True
        came = set(map(int, store.get("came").decode().split(",")[:-1]))  # one question, however many ranks there are
        missing = sorted(set(range(world.world_size)) - came)
        names = ", ".join(map(str, missing[:_NAMED])) + (", ..." if len(missing) > _NAMED else "")
        awaited = (
            f"rank {names} to call fabric.launch()"
            if missing
            else "a rank that called fabric.launch() and went no further"
        )
        what = f"rank {world.global_rank} has waited {waited:.0f} s for {awaited}"
        if late:
            raise LaunchError(what, where="fabric.launch()", ranks=missing)
        print(f"fabric: {what}", file=sys.stderr, flush=True)  # noqa: T201 - in place of a hang without a word


def check_connected(collectives: object, world: World, strategy: Strategy) -> None:
    """Make sure that a strategy has connected this process with all others.

    Raises:
        LaunchError: It has not.
    """
    if not isinstance(collectives, Collectives):
        fault = "returned no Collectives"
    elif collectives.world_size == 1 < world.world_size:
        fault = f"did not connect the {world.world_size} processes"
    else:
        return
    raise LaunchError(
        f"{type(strategy).__name__}.connect {fault}",
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


def check_launched(function: Any) -> None:
    """Refuse what can't be called with a ``Fabric``.

    Raises:
        LaunchTypeError: It can't.
    """
    if function is None:
        return
    if not callable(function):
        raise LaunchTypeError(
            "what was given can't be called", where="fabric.launch(function)", got=repr(function),
            instead="fabric.launch(function), not fabric.launch(function())",
        )  # fmt: skip
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # a builtin that doesn't tell
        return
    if not any(one.kind is not one.KEYWORD_ONLY and one.kind is not one.VAR_KEYWORD for one in parameters):
        raise LaunchTypeError(
            "the function takes no Fabric", where="fabric.launch(function)",
            got=f"{getattr(function, '__qualname__', function)}{inspect.signature(function)}",
            instead="a function whose first argument is the Fabric of the rank that it runs in",
        )  # fmt: skip
