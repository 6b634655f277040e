"""From a request to what was chosen: finds what it names, makes candidates, and lets the plan choose among them."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fabric_core.choosing.offers import Offer, matches
from fabric_core.choosing.parsing import PluginRef
from fabric_core.choosing.plan import Plan
from fabric_core.choosing.registry import Registry
from fabric_core.choosing.request import Request
from fabric_core.choosing.resolve import Candidate, check_declared, resolve
from fabric_core.choosing.suggest import alternatives
from fabric_core.contracts import Plugin
from fabric_core.errors import (
    FabricError,
    FabricWarning,
    NotInstalledError,
    PlanError,
    RequestError,
    UnavailableError,
)
from fabric_core.kinds import EXTENSION, KINDS, Count

__all__ = ["Chosen", "Ranked", "choose", "find_extensions", "items"]


class Ranked:
    """Plugins that are asked one after the other; each is loaded when it is its turn.

    One that is broken is left out with a warning, unless it was named: then it is an error.
    """

    def __init__(self, candidates: Sequence[Candidate]) -> None:
        self._candidates = candidates

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        """Give each with its name, in the order in which they are asked."""
        for one in self._candidates:
            if one.refusal(check_declared) is None:
                yield one.name, one.plugin

    def __len__(self) -> int:
        """Count them, loaded or not."""
        return len(self._candidates)

    @property
    def names(self) -> list[str]:
        """Their names."""
        return [one.name for one in self._candidates]


@dataclass(frozen=True)
class Chosen:
    """What was chosen: the plan, and beside it the plugins.

    Args:
        plan: What was chosen, and why.
        candidates: The candidates that the plan chose, by their kind.
    """

    plan: Plan
    candidates: Mapping[str, Sequence[Candidate]]

    def one(self, kind: str) -> Any:
        """Give the plugin of a kind that has one."""
        return self.candidates[kind][0].plugin

    def all(self, kind: str) -> list[Any]:
        """Give the plugins of a kind, or the extensions."""
        return [one.plugin for one in self.candidates.get(kind, ())]

    def ranked(self, kind: str) -> Ranked:
        """Give the plugins of a kind that are asked one after the other."""
        return Ranked(self.candidates.get(kind, ()))


def choose(
    request: Request, registry: Registry, extensions: Sequence[Candidate], bind: Callable[[Plugin], object]
) -> Chosen:
    """Find what a request names, and choose.

    Args:
        request: What was asked for.
        registry: What there is.
        extensions: The extensions that take part.
        bind: Called with each plugin that is made, before it is asked anything.

    Raises:
        RequestError: An argument can't be parsed.
        PluginError: A plugin is not available, or can't be loaded.
        PlanError: The choices don't fit together; it names the nearest requests that work.
    """
    find = _Finder(registry, bind)
    candidates: dict[str, Sequence[Candidate]] = {
        kind: [one for ref in request.refs(kind) for one in find(ref, kind)] for kind in KINDS
    }
    candidates[EXTENSION] = extensions
    try:
        return Chosen(*resolve(request, candidates))
    except (PlanError, UnavailableError) as error:
        if error.fields.get("ordered"):
            raise
        offered = {kind.name: find.everything(kind.name) for kind in KINDS.values() if kind.count is Count.ONE}
        works = alternatives(request, candidates, offered)
        if works:
            error.instead = " or ".join(works)
        raise


class _Finder:
    """Makes candidates."""

    def __init__(self, registry: Registry, bind: Callable[[Plugin], object]) -> None:
        self._registry = registry
        self._bind = bind

    def __call__(self, ref: PluginRef, kind: str) -> list[Candidate]:
        """Give what a reference names: one plugin, or every one that takes part in automatic choice."""
        source = "the request" if ref.source in {"", kind, KINDS[kind].argument, "plugins"} else ref.source
        if ref.instance is not None:
            return [self._given(ref, kind, source)]
        if ref.is_auto:
            self._registry.require(kind)
            return self._automatic(kind, ref.options)
        offer = self._registry.find(kind, ref.name, ref.distribution)
        candidate = Candidate(kind, offer.name, offer.owner, lambda: self._make(offer, ref.options), named=source)
        candidate.plugin  # noqa: B018 - what was named fails at once
        return [candidate]

    def everything(self, kind: str) -> list[Candidate]:
        """Give what could be named instead: what is offered to automatic choice, and what is imported already."""
        offers = [one for one in self._registry.offers(kind) if not self._registry.is_disabled(one) and _at_hand(one)]
        offers.sort(key=lambda one: (one.auto is None, one.rank))
        return [self._candidate(one) for one in offers]

    def _given(self, ref: PluginRef, kind: str, source: str) -> Candidate:
        contract = KINDS[kind].contract
        instance = ref.instance if isinstance(ref.instance, contract) else contract.adapt(ref.instance)
        if instance is None:
            raise RequestError(
                f"{kind} was given what is no {contract.__name__}",
                where=ref.source,
                got=type(ref.instance).__name__,
                instead=f"a name, a mapping, or an instance of {contract.__name__}",
            )
        self._bind(instance)
        return Candidate.of(kind, ref.name, "(given)", instance, named=source)

    def _automatic(self, kind: str, options: Mapping[str, Any]) -> list[Candidate]:
        if options:
            raise RequestError(
                f"{kind}='auto' takes no options, for they belong to one plugin",
                where=kind,
                got=", ".join(options),
                instead=f"the name of a {kind}",
            )
        return [self._candidate(offer, left_out=_warn_of) for offer in self._registry.automatic(kind)]

    def _candidate(self, offer: Offer, **rest: Any) -> Candidate:
        return Candidate(
            offer.kind, offer.name, offer.owner, lambda: self._make(offer, {}), priority=offer.auto or 0, **rest
        )

    def _make(self, offer: Offer, options: Mapping[str, Any]) -> Plugin:
        if self._registry.is_disabled(offer):
            raise self._registry.refuse_disabled(offer)
        plugin = offer.make(options)
        self._bind(plugin)
        return plugin


def _at_hand(offer: Offer) -> bool:
    """Whether an offer may be proposed: nothing is imported that nobody named or offered to the automatic choice."""
    if offer.auto is not None:
        return True
    try:
        return offer.is_imported and not offer.is_alias
    except FabricError:
        return False


def find_extensions(
    request: Request, environment: Mapping[str, str], registry: Registry, check: Callable[[object], None]
) -> list[Candidate]:
    """Find the extensions that take part.

    Those in the request, in its order; then the installed ones that ``FABRIC_EXTENSIONS`` names, or, where it isn't
    set, those that their own distributions offer to the automatic choice.

    Args:
        request: What was asked for.
        environment: The environment variables.
        registry: What there is.
        check: Raises a ``FabricError`` where an object is no sound extension.

    Raises:
        RequestError: What is in ``plugins`` is no extension, or is there twice.
        PluginError: An extension that was named is not available, or can't be loaded.
    """
    found: list[Candidate] = []
    for part in request.extensions:
        one = _named_extension(part, registry, check)
        if any(one.plugin is other.plugin or one.name == other.name != type(one.plugin).__name__ for other in found):
            raise RequestError("plugins was given one extension twice", where="plugins", got=one.name)
        found.append(one)
    variable = environment.get("FABRIC_EXTENSIONS")
    if variable is None:
        offers = registry.automatic(EXTENSION)
    else:
        offers = [one for one in registry.offers(EXTENSION) if any(matches(item, one) for item in items(variable))]
    for offer in offers:
        if registry.is_disabled(offer) or any(
            (one.name, one.distribution) == (offer.name, offer.owner) for one in found
        ):
            continue
        named = "" if variable is None else "FABRIC_EXTENSIONS"
        try:
            found.append(_installed(offer, named, check))
        except FabricError as error:
            if named:
                raise
            _warn_of(Candidate.of(EXTENSION, offer.name, offer.owner, None), error)
    _warn_of_unknown(registry, environment)
    return found


def _named_extension(part: object, registry: Registry, check: Callable[[object], None]) -> Candidate:
    if isinstance(part, PluginRef):
        if part.options:
            raise RequestError("an extension has no options", where="plugins", got=str(part), instead="its name alone")
        return _installed(registry.find(EXTENSION, part.name, part.distribution), "the request", check)
    check(part)
    return Candidate.of(EXTENSION, type(part).__name__, "(given)", part, named="the request")


def _installed(offer: Offer, named: str, check: Callable[[object], None]) -> Candidate:
    extension = offer.make_extension()
    try:
        check(extension)
    except FabricError as error:
        raise offer.quarantine(error.what, got=error.got, instead=error.instead) from error
    candidate = Candidate.of(EXTENSION, offer.name, offer.owner, extension, named=named, priority=offer.auto or 0)
    candidate.plugin  # noqa: B018 - it is made
    return candidate


def items(text: str) -> list[str]:
    """Give the items of a variable, which commas separate."""
    return [item.strip() for item in text.split(",") if item.strip()]


def _warn_of_unknown(registry: Registry, environment: Mapping[str, str]) -> None:
    """Warn of names in the variables that mean nothing that is installed."""
    for variable, kinds in (("FABRIC_EXTENSIONS", [EXTENSION]), ("FABRIC_DISABLE_PLUGINS", [*KINDS, EXTENSION])):
        for item in items(environment.get(variable, "")):
            offers = [offer for kind in kinds for offer in registry.offers(kind)]
            if not any(matches(item, offer) for offer in offers):
                names = ", ".join(sorted({offer.name for offer in offers})) or "none"
                warnings.warn(
                    f"{variable} has {item!r}, which is the name of nothing that is installed; there are: {names}",
                    FabricWarning,
                    stacklevel=2,
                )


def _warn_of(candidate: Candidate, failure: FabricError) -> None:
    """Warn of a plugin that an automatic choice must leave out because it is broken."""
    if not isinstance(failure, UnavailableError | NotInstalledError):
        warnings.warn(
            f"the {candidate.kind} {candidate.name!r} of {candidate.distribution} was left out: {failure}",
            FabricWarning,
            stacklevel=2,
        )
