"""From a request to bound plugins: finds what it names, makes the plan, binds what the plan chose."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fabric_core.binding import bind, life_cycle
from fabric_core.contracts import (
    CONTRACTS,
    Accelerator,
    Checkpoint,
    Launcher,
    LifeCycle,
    Logger,
    Plugin,
    Precision,
    Strategy,
    Wrapper,
)
from fabric_core.errors import FabricError, RequestError
from fabric_core.registry import Offer, Registry
from fabric_core.request import PluginRef, Request
from fabric_core.resolve import Candidate, Plan, resolve

__all__ = ["Parts", "assemble"]


@dataclass(frozen=True)
class Parts:
    """What a ``Fabric`` is made of: the plan, and the bound behaviours of what it chose.

    Args:
        plan: What was chosen, and why.
        accelerator: The accelerator.
        strategy: The strategy.
        precision: The precision.
        wrappers: The wrappers, in the order in which they act.
        launchers: The launchers with their names, in the order in which they are asked.
        checkpoints: The checkpoint formats with their names, in the order in which they are asked.
        loggers: The loggers.
        hooks: Calls every listener of a life-cycle hook.
    """

    plan: Plan
    accelerator: Accelerator
    strategy: Strategy
    precision: Precision
    wrappers: list[Wrapper]
    launchers: list[tuple[str, Launcher]]
    checkpoints: list[tuple[str, Checkpoint]]
    loggers: list[Logger]
    hooks: LifeCycle


def assemble(request: Request) -> Parts:
    """Find, choose and bind.

    Raises:
        RequestError: An argument can't be understood.
        PluginError: A plugin can't be had.
        PlanError: The choices don't fit together.
    """
    registry = Registry()
    given, extensions = _sort_plugins(request.plugins)
    wanted = {
        "accelerator": [request.accelerator],
        "strategy": [request.strategy],
        "precision": [given.get("precision", request.precision)],
        "wrapper": list(request.wrappers),
    }
    plan = resolve(
        request,
        {kind: [one for ref in refs for one in _candidates(registry, kind, ref)] for kind, refs in wanted.items()},
    )
    auto = PluginRef(name="auto")
    return Parts(
        plan=plan,
        accelerator=bind(plan.accelerator.plugin, extensions),
        strategy=bind(plan.strategy.plugin, extensions),
        precision=bind(plan.precision.plugin, extensions),
        wrappers=[bind(choice.plugin, extensions) for choice in plan.wrappers],
        launchers=[
            (name, bind(plugin, extensions))
            for name, plugin in _loaded(registry, "launcher", given.get("launcher", auto))
        ],
        checkpoints=[
            (name, bind(plugin, extensions))
            for name, plugin in _loaded(registry, "checkpoint", given.get("checkpoint", auto))
        ],
        loggers=[bind(plugin, extensions) for ref in request.loggers for _, plugin in _loaded(registry, "logger", ref)],
        hooks=life_cycle(extensions),
    )


def _sort_plugins(plugins: Sequence[Any]) -> tuple[dict[str, PluginRef], list[object]]:
    """Part instances of contracts, one of a kind, from extensions."""
    given: dict[str, PluginRef] = {}
    extensions: list[object] = []
    for plugin in plugins:
        if not isinstance(plugin, Plugin):
            extensions.append(plugin)
        elif plugin.kind in given or plugin.kind not in {"precision", "launcher", "checkpoint"}:
            raise RequestError(
                f"a {plugin.kind} doesn't go into plugins, or not twice",
                where="plugins",
                got=repr(plugin),
                instead=f"Fabric({plugin.kind}=...)",
            )
        else:
            given[plugin.kind] = PluginRef(name=type(plugin).__name__, instance=plugin)
    return given, extensions


def _candidates(registry: Registry, kind: str, ref: PluginRef) -> list[Candidate]:
    """Load what a reference names: one plugin, or every offer where the choice is automatic."""
    if ref.instance is not None:
        contract = CONTRACTS[kind]
        if not isinstance(ref.instance, contract):
            raise RequestError(
                f"{kind} was given what is no {contract.__name__}",
                where=kind,
                got=repr(ref.instance),
                instead=f"a name, a mapping, or an instance of {contract.__name__}",
            )
        return [Candidate(kind, ref.name, "(given)", ref.instance, named=True)]
    if ref.is_auto:
        return [_candidate(offer, {}, named=False) for offer in registry.offers(kind)]
    return [_candidate(registry.find(kind, ref.name, ref.distribution), ref.options, named=True)]


def _candidate(offer: Offer, options: Mapping[str, Any], *, named: bool) -> Candidate:
    owner = f"{offer.distribution} {offer.version}".strip()
    try:
        preset = offer.load()
        given = {**preset.options, **options}
        plugin = preset.plugin(preset.plugin.parse_options(given))
    except FabricError as error:
        if named:
            raise
        return Candidate(offer.kind, offer.name, owner, failure=error)
    return Candidate(offer.kind, offer.name, owner, plugin, named=named, alias=preset.alias)


def _loaded(registry: Registry, kind: str, ref: PluginRef) -> list[tuple[str, Any]]:
    """Load plugins of a kind that has no place in the plan, the highest priority first."""
    candidates = _candidates(registry, kind, ref)
    for candidate in candidates:
        if candidate.failure is not None:
            raise candidate.failure
    if ref.is_auto:
        candidates.sort(key=lambda one: (-one.plugin.capabilities.priority, one.name))  # type: ignore[union-attr]
    return [(candidate.name, candidate.plugin) for candidate in candidates]
