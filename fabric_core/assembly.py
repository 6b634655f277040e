"""What a ``Fabric`` is made of: joins what was chosen with the extensions that go round it."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from fabric_core.binding import Bindings, Trace, check_extension, life_cycle
from fabric_core.choosing.candidates import Chosen, choose, find_extensions, items
from fabric_core.choosing.plan import Plan
from fabric_core.choosing.registry import Registry
from fabric_core.choosing.request import Request
from fabric_core.contracts import LifeCycle
from fabric_core.running.checking import CheckedCalls
from fabric_core.running.watching import WatchedWaits

__all__ = ["Assembly", "assemble", "make_plan", "make_registry"]


@dataclass(frozen=True)
class Assembly:
    """What a ``Fabric`` is made of.

    Args:
        chosen: The plan, and the plugins that it chose, bound.
        bindings: What was bound; to be undone at the end.
        hooks: Calls every listener of a life-cycle hook.
    """

    chosen: Chosen
    bindings: Bindings
    hooks: LifeCycle


def assemble(request: Request, environment: Mapping[str, str], rank: Callable[[], int | None]) -> Assembly:
    """Find, bind and choose.

    Args:
        request: What was asked for.
        environment: The environment variables; those that switch plugins, extensions and tracing are read.
        rank: Gives this process's rank, once it is known; for the trace.

    Raises:
        RequestError: An argument can't be parsed.
        PluginError: A plugin is not available, or can't be loaded.
        LockError: The lock doesn't let a plugin run, or can't be read.
        PlanError: The choices don't fit together.
    """
    registry = make_registry(environment, request.lock)
    extensions = find_extensions(request, environment, registry, check_extension)
    trace = _tracer(rank) if environment.get("FABRIC_TRACE", "0") not in {"", "0"} else None
    around = [one.plugin for one in extensions]
    check = CheckedCalls() if request.check else None
    if check is not None:
        around.append(check)
    bindings = Bindings(around, trace)
    try:
        chosen = choose(request, registry, extensions, bindings.bind)
        if check is not None:
            check.sharded = chosen.one("strategy").capabilities.sharded
        if request.warn_after is not None and chosen.plan.world_size > 1:
            around.append(WatchedWaits(request.warn_after))  # it wraps collectives alone, which are bound at the launch
        return Assembly(chosen, bindings, life_cycle(around))
    except BaseException:
        bindings.undo()
        raise


def make_plan(request: Request, environment: Mapping[str, str]) -> Plan:
    """Say what a ``Fabric`` would choose; what was given is left as it was.

    Raises:
        RequestError: An argument can't be parsed.
        PluginError: A plugin is not available, or can't be loaded.
        PlanError: The choices don't fit together.
    """
    assembly = assemble(request, environment, lambda: None)
    assembly.bindings.undo()
    return assembly.chosen.plan


def make_registry(environment: Mapping[str, str], lock: str | None) -> Registry:
    """Give what there is, but for what is switched off, and with the lock file that says what may run.

    Raises:
        LockError: The lock file can't be read.
    """
    disabled = items(environment.get("FABRIC_DISABLE_PLUGINS", ""))
    if lock is None:
        return Registry(disabled=disabled)
    from fabric_core.choosing.lock import Lock  # who has none doesn't wait for it

    return Registry(disabled=disabled, lock=Lock.read(lock))


def _tracer(rank: Callable[[], int | None]) -> Trace:
    def trace(call: str, seconds: float, error: BaseException | None) -> None:
        here = "not launched" if rank() is None else f"rank {rank()}"
        raised = "" if error is None else f", raised {type(error).__name__}"
        print(f"[fabric, {here}] {call}: {seconds * 1e3:.3f} ms{raised}", file=sys.stderr)  # noqa: T201 - asked for

    return trace
