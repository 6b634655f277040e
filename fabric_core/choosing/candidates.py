"""From a request to bound plugins: finds what it names, makes the plan, binds what the plan chose."""

import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from fabric_core.binding import Trace, bind, check_extension, life_cycle
from fabric_core.choosing.registry import EXTENSION, Offer, Registry, matches
from fabric_core.choosing.request import PluginRef, Request
from fabric_core.choosing.resolve import Candidate, Plan, alternatives, resolve
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
from fabric_core.errors import (
    FabricError,
    FabricWarning,
    NotInstalledError,
    PlanError,
    RequestError,
    UnavailableError,
)

__all__ = ["Parts", "assemble", "plan"]

_AUTO: Final = PluginRef(name="auto")
_IN_PLUGINS: Final = ("precision", "launcher", "checkpoint")
"""The kinds that go into ``plugins``; one of each."""


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


def assemble(request: Request, environment: Mapping[str, str], rank: Callable[[], int | None]) -> Parts:
    """Find, choose and bind.

    Args:
        request: What was asked for.
        environment: The environment variables; those that switch plugins and tracing are read.
        rank: Gives this process's rank, once it is known; for the trace.

    Raises:
        RequestError: An argument can't be understood.
        PluginError: A plugin can't be had.
        PlanError: The choices don't fit together.
    """
    trace = _tracer(rank) if environment.get("FABRIC_TRACE", "0") not in {"", "0"} else None
    chosen = plan(request, environment, trace)
    return Parts(
        plan=chosen,
        accelerator=chosen.accelerator.plugin,
        strategy=chosen.strategy.plugin,
        precision=chosen.precision.plugin,
        wrappers=[choice.plugin for choice in chosen.wrappers],
        launchers=[(choice.name, choice.plugin) for choice in chosen.launchers],
        checkpoints=[(choice.name, choice.plugin) for choice in chosen.checkpoints],
        loggers=[choice.plugin for choice in chosen.loggers],
        hooks=life_cycle([choice.plugin for choice in chosen.extensions]),
    )


def plan(request: Request, environment: Mapping[str, str], trace: Trace | None = None) -> Plan:
    """Find what a request names, and choose.

    Raises:
        RequestError: An argument can't be understood.
        PluginError: A plugin can't be had.
        PlanError: The choices don't fit together; it names the nearest requests that work.
    """
    registry = Registry(disabled=_items(environment.get("FABRIC_DISABLE_PLUGINS", "")))
    given, own = _sort_plugins(request.plugins)
    extensions = [*own, *_installed_extensions(registry, environment.get("FABRIC_EXTENSIONS"))]
    find = _Finder(registry, [one.plugin for one in extensions], trace)
    candidates: dict[str, Sequence[Candidate]] = {
        "accelerator": find(request.accelerator, "accelerator"),
        "strategy": find(request.strategy, "strategy"),
        "precision": find(given.get("precision", request.precision), "precision"),
        "wrapper": [one for ref in request.wrappers for one in find(ref, "wrapper")],
        "launcher": find(given.get("launcher", _AUTO), "launcher"),
        "checkpoint": find(given.get("checkpoint", _AUTO), "checkpoint"),
        "logger": [one for ref in request.loggers for one in find(ref, "logger")],
        EXTENSION: extensions,
    }
    _warn_of_unknown(registry, environment)
    _warn_of_failures(candidates)
    try:
        return resolve(request, candidates)
    except (PlanError, UnavailableError) as error:
        if error.fields.get("ordered"):
            raise
        offered = {kind: find.everything(kind) for kind in ("accelerator", "strategy", "precision")}
        works = alternatives(request, candidates, offered)
        if works:
            error.instead = " or ".join(works)
        raise


class _Finder:
    """Makes candidates: finds, imports, makes and binds plugins."""

    def __init__(self, registry: Registry, extensions: Sequence[object], trace: Trace | None) -> None:
        self._registry = registry
        self._extensions = extensions
        self._trace = trace

    def __call__(self, ref: PluginRef, kind: str) -> list[Candidate]:
        """Give what a reference names: one plugin, or every one that may be chosen automatically."""
        contract = CONTRACTS[kind]
        source = "the request" if ref.source in {"", kind, f"{kind}s", "plugins"} else ref.source
        if ref.instance is not None:
            instance = ref.instance if isinstance(ref.instance, contract) else contract.adapt(ref.instance)
            if instance is None:
                raise RequestError(
                    f"{kind} was given what is no {contract.__name__}",
                    where=ref.source,
                    got=repr(ref.instance),
                    instead=f"a name, a mapping, or an instance of {contract.__name__}",
                )
            plugin = bind(instance, self._extensions, self._trace)
            return [Candidate(kind, ref.name, "(given)", plugin, named=source)]
        if ref.is_auto:
            self._registry.require(kind)
            return self._automatic(kind, ref.options)
        offer = self._registry.find(kind, ref.name, ref.distribution)
        return [Candidate(kind, offer.name, offer.owner, self._make(offer, ref.options), named=source)]

    def everything(self, kind: str) -> list[Candidate]:
        """Give every plugin of a kind that could be named, aliases left out."""
        return self._automatic(kind, {})

    def _automatic(self, kind: str, options: Mapping[str, Any]) -> list[Candidate]:
        if options:
            raise RequestError(
                f"{kind}='auto' takes no options, for they belong to one plugin",
                where=kind,
                got=", ".join(options),
                instead=f"the name of a {kind}",
            )
        found = []
        for offer in self._registry.offers(kind):
            try:
                if self._registry.is_disabled(offer):
                    raise self._registry.refuse_disabled(offer)
                if offer.is_alias:
                    continue
                found.append(Candidate(kind, offer.name, offer.owner, self._make(offer, {})))
            except FabricError as error:
                found.append(Candidate(kind, offer.name, offer.owner, failure=error))
        return found

    def _make(self, offer: Offer, options: Mapping[str, Any]) -> Plugin:
        preset = offer.load()
        try:
            plugin = preset.plugin(preset.plugin.parse_options({**preset.options, **options}))
        except FabricError:
            raise
        except Exception as error:
            raise offer.quarantine(f"making it failed: {error!r}") from error
        return bind(plugin, self._extensions, self._trace)


def _installed_extensions(registry: Registry, allowed: str | None) -> list[Candidate]:
    """Make the extensions that distributions bring, but for those that the variables leave out."""
    found = []
    for offer in registry.offers(EXTENSION):
        if registry.is_disabled(offer):
            continue
        if allowed is not None and not any(matches(item, offer) for item in _items(allowed)):
            continue
        try:
            extension = offer.make_extension()
            try:
                check_extension(extension)
            except FabricError as error:
                raise offer.quarantine(error.what, got=error.got, instead=error.instead) from error
            found.append(Candidate(EXTENSION, offer.name, offer.owner, extension, named="the group fabric.extensions"))
        except FabricError as error:
            found.append(Candidate(EXTENSION, offer.name, offer.owner, failure=error))
    _warn_of_failures({EXTENSION: found})
    return [one for one in found if one.failure is None]


def _sort_plugins(plugins: Sequence[Any]) -> tuple[dict[str, PluginRef], list[Candidate]]:
    """Part what names or is a plugin, one of a kind, from extensions."""
    given: dict[str, PluginRef] = {}
    extensions: list[Candidate] = []
    for part in plugins:
        if not isinstance(part, PluginRef | Plugin):
            check_extension(part)
            if any(part is one.plugin for one in extensions):
                raise RequestError("plugins was given one extension twice", where="plugins", got=repr(part))
            extensions.append(Candidate(EXTENSION, type(part).__name__, "(given)", part, named="the request"))
            continue
        kind = part.kind or ""
        if kind in given or kind not in _IN_PLUGINS:
            raise RequestError(
                f"a {kind} doesn't go into plugins, or not twice" if kind in CONTRACTS else "there is no such kind",
                where="plugins",
                got=str(part),
                instead=f"Fabric({kind}=...)" if kind in CONTRACTS else f"one of {', '.join(_IN_PLUGINS)}",
            )
        given[kind] = part if isinstance(part, PluginRef) else PluginRef(name=type(part).__name__, instance=part)
    return given, extensions


def _items(text: str) -> list[str]:
    return [item.strip() for item in text.split(",") if item.strip()]


def _warn_of_unknown(registry: Registry, environment: Mapping[str, str]) -> None:
    """Warn of names in the variables that mean nothing that is installed."""
    for variable, kinds in (("FABRIC_EXTENSIONS", [EXTENSION]), ("FABRIC_DISABLE_PLUGINS", [*CONTRACTS, EXTENSION])):
        for item in _items(environment.get(variable, "")):
            offers = [offer for kind in kinds for offer in registry.offers(kind)]
            if not any(matches(item, offer) for offer in offers):
                names = ", ".join(sorted({offer.name for offer in offers})) or "none"
                warnings.warn(
                    f"{variable} has {item!r}, which is the name of nothing that is installed; there are: {names}",
                    FabricWarning,
                    stacklevel=2,
                )


def _warn_of_failures(candidates: Mapping[str, Sequence[Candidate]]) -> None:
    """Warn of plugins that an automatic choice must leave out because they are broken."""
    for kind, found in candidates.items():
        for one in found:
            if one.failure is not None and not isinstance(one.failure, UnavailableError | NotInstalledError):
                warnings.warn(
                    f"the {kind} {one.name!r} of {one.distribution} was left out: {one.failure}",
                    FabricWarning,
                    stacklevel=2,
                )


def _tracer(rank: Callable[[], int | None]) -> Trace:
    def trace(call: str, seconds: float, error: BaseException | None) -> None:
        here = "not launched" if rank() is None else f"rank {rank()}"
        raised = "" if error is None else f", raised {type(error).__name__}"
        print(f"[fabric, {here}] {call}: {seconds * 1e3:.3f} ms{raised}", file=sys.stderr)  # noqa: T201 - asked for

    return trace
