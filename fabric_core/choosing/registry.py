"""Entry points and in-process registrations become offers: what could be chosen, known without importing it.

[Note: known elsewhere] The core knows no plugin, so what isn't installed is known from what is: a distribution may
declare, in the group ``fabric.known``, names that other distributions bring
(``"strategy/name" = "their_distribution"``), and an entry point may name an extra of its own distribution
(``module:Class [extra]``) whose packages it needs. Neither is imported to say what to install.
"""

import os
import re
import shlex
import sys
import threading
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from functools import cached_property, lru_cache
from importlib.metadata import EntryPoint, PackageNotFoundError, distribution, distributions, version
from pathlib import Path
from typing import TYPE_CHECKING, Final

from fabric_core.contracts import API_WINDOW, CONTRACTS, Plugin, PluginOptions, Preset
from fabric_core.contracts._spec import signature_fault
from fabric_core.errors import (
    ConflictError,
    FabricWarning,
    IncompatibleApiError,
    NotInstalledError,
    PluginError,
    QuarantinedError,
    RequestError,
    UnavailableError,
    UnknownPluginError,
)

if TYPE_CHECKING:
    from packaging.requirements import Requirement

__all__ = [
    "EXTENSION",
    "GROUPS",
    "IN_PROCESS",
    "Offer",
    "Registry",
    "matches",
    "register",
    "registered",
    "registrations",
]

EXTENSION: Final = "extension"
"""Stands for a kind where an extension is meant, which implements no contract."""

GROUPS: Final[Mapping[str, str]] = {
    "accelerator": "fabric.accelerators",
    "strategy": "fabric.strategies",
    "precision": "fabric.precisions",
    "wrapper": "fabric.wrappers",
    "launcher": "fabric.launchers",
    "checkpoint": "fabric.checkpoints",
    "logger": "fabric.loggers",
    EXTENSION: "fabric.extensions",
}
"""The entry-point group of each kind."""

IN_PROCESS: Final = "(this process)"
"""Stands for the distribution of an offer that came through ``register``."""

_KNOWN: Final = "fabric.known"
_ESSENTIAL: Final = frozenset({"accelerator", "strategy", "precision"})
"""The kinds of which every run has a plugin."""
_CORE: Final = "fabric-registry"


@dataclass(frozen=True)
class Offer:
    """One name of one kind, from one distribution, that could be chosen.

    Args:
        kind: The kind.
        name: The lookup string.
        distribution: The distribution that brings it.
        version: That distribution's version.
        value: Where the plugin lies, as ``module:attribute``.
        requires: What the distribution says that it needs.
        loaded: The plugin itself, where it was registered in this process.
    """

    kind: str
    name: str
    distribution: str
    version: str
    value: str
    requires: tuple[str, ...] = field(default=(), compare=False, repr=False)
    loaded: type[Plugin] | Preset | None = field(default=None, compare=False)

    @property
    def owner(self) -> str:
        """The distribution with its version."""
        return f"{self.distribution} {self.version}".strip()

    @property
    def is_alias(self) -> bool:
        """Whether it is another name for a plugin, with options; imports it."""
        return isinstance(self._imported, Preset)

    def load(self) -> Preset:
        """Import the plugin, at the first call.

        Returns:
            The class, with the options that an alias presets.

        Raises:
            IncompatibleApiError: It was written for another version of the core or of the contracts.
            NotInstalledError: A package that it needs isn't installed.
            QuarantinedError: It can't be imported, or is no plugin of its kind.
        """
        return self._preset

    @cached_property
    def _preset(self) -> Preset:
        loaded = self._imported
        preset = loaded if isinstance(loaded, Preset) else Preset(loaded)  # type: ignore[arg-type]
        self._check(preset.plugin)
        return preset

    def make_extension(self) -> object:
        """Import an extension, and make one where it is a class.

        Raises:
            PluginError: As for a plugin.
        """
        loaded = self._imported
        if not isinstance(loaded, type):
            return loaded
        try:
            return loaded()
        except Exception as error:
            raise self.quarantine(f"making it failed: {error!r}") from error

    @cached_property
    def _imported(self) -> object:
        if self.loaded is not None:
            return self.loaded
        self._check_requirements()
        try:
            return EntryPoint(self.name, self.value, GROUPS[self.kind]).load()
        except (Exception, SystemExit) as error:
            raise self.quarantine(f"importing {self.value} failed: {error!r}") from error

    def _check_requirements(self) -> None:
        """Check what the distribution says that it needs of the core, and for this entry point, before an import."""
        _, _, tail = self.value.partition("[")
        extras = [extra.strip() for extra in tail.rstrip("] ").split(",") if extra.strip()]
        # Most requirements say nothing here; parsing one takes 50 µs, and importing the parser 10 ms.
        telling = [text for text in self.requires if extras or _CORE in _canonical(text)]
        if not telling:
            return
        from packaging.requirements import InvalidRequirement, Requirement

        for text in telling:
            try:
                need = Requirement(text)
            except InvalidRequirement:
                continue
            here = need.marker is None or need.marker.evaluate({"extra": ""})
            if here and _canonical(need.name) == _CORE:
                self._check_core(need)
            for extra in extras:
                if not here and need.marker is not None and need.marker.evaluate({"extra": extra}):
                    self._check_needed(need, extra)

    def _check_core(self, need: "Requirement") -> None:
        core = _core_version()
        if core is not None and not need.specifier.contains(core, prereleases=True):
            raise IncompatibleApiError(
                f"the {self.kind} {self.name!r} of {self.owner} needs {need}, and {core} is installed",
                where=self.owner,
                got=f"{_CORE} {core}",
                instead=f"a version of {self.distribution} for {_CORE} {core}, or {need}",
                offer=self,
            )

    def _check_needed(self, need: "Requirement", extra: str) -> None:
        try:
            found = version(need.name)
        except PackageNotFoundError:
            found = None
        if found is None or not need.specifier.contains(found, prereleases=True):
            raise NotInstalledError(
                f"the {self.kind} {self.name!r} of {self.owner} needs {need.name}{need.specifier}",
                where=self.owner,
                got=f"{need.name} {found}" if found else f"{need.name} isn't installed",
                instead=f"pip install '{self.distribution}[{extra}]'",
                offer=self,
            )

    def _check(self, plugin: object) -> None:
        contract = CONTRACTS[self.kind]
        if not (isinstance(plugin, type) and issubclass(plugin, contract)):
            raise self.quarantine(f"{self.value} is {plugin!r}, which is no subclass of {contract.__name__}")
        if plugin.api_version not in API_WINDOW:
            raise IncompatibleApiError(
                f"the {self.kind} {self.name!r} was written for version {plugin.api_version} of the contracts",
                where=self.owner,
                got=f"this core accepts {API_WINDOW[0]} to {API_WINDOW[-1]}",
                instead=f"a version of {self.distribution} for the contracts {API_WINDOW[0]} to {API_WINDOW[-1]}",
                offer=self,
            )
        missing = sorted(getattr(plugin, "__abstractmethods__", ()))
        if missing:
            raise self.quarantine(f"{plugin.__name__} lacks {', '.join(missing)}")
        options = plugin.Options
        if not (isinstance(options, type) and issubclass(options, PluginOptions)):
            raise self.quarantine(f"{plugin.__name__}.Options is {options!r}, which is no subclass of PluginOptions")
        if options.model_config.get("extra") != "forbid":
            raise self.quarantine(f"{plugin.__name__}.Options takes unknown options: keep extra='forbid'")
        declared = getattr(contract, "capabilities", None)
        if declared is not None and not isinstance(getattr(plugin, "capabilities", None), type(declared)):
            raise self.quarantine(
                f"{plugin.__name__}.capabilities is {getattr(plugin, 'capabilities', None)!r}, "
                f"which is no {type(declared).__name__}"
            )
        fault = signature_fault(contract, plugin)
        if fault is not None:
            got, expected = fault
            raise self.quarantine(
                f"{plugin.__name__} doesn't keep the signature of its contract", got=got, instead=expected
            )

    def quarantine(self, reason: str, *, got: object = None, instead: str | None = None) -> QuarantinedError:
        """Make the error that says why this offer can't be used."""
        return QuarantinedError(
            f"the {self.kind} {self.name!r} of {self.owner} can't be used: {reason}",
            got=got,
            instead=instead or f"mend or uninstall {self.distribution}",
            offer=self,
        )

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle as data: what an entry point gave stays behind."""
        return Offer, tuple(getattr(self, one.name) for one in fields(self))


def _install_command() -> str:
    """Give the command that installs the distribution of this core: from its source tree, where it runs from one."""
    tree = Path(__file__).parents[2]
    if not (tree / "pyproject.toml").is_file():
        return f"pip install {_CORE}"
    return f"pip install -e {'.' if tree == Path.cwd() else shlex.quote(str(tree))}"


@lru_cache(maxsize=1)
def _core_version() -> str | None:
    """Give the version of the core that runs; ``None`` in a bare source tree."""
    try:
        return version(_CORE)
    except PackageNotFoundError:
        return None


_lock = threading.Lock()
_registrations: dict[tuple[str, str], Offer] = {}


def register(kind: str, name: str, plugin: type[Plugin] | Preset, *, override: bool = False) -> None:
    """Offer a plugin in this process, for as long as it runs.

    Args:
        kind: The kind, such as ``"strategy"``.
        name: The name to find it by.
        plugin: The class, or a preset of it.
        override: Replace an offer of that name that was registered before.

    Raises:
        RequestError: There is no such kind.
        ConflictError: The name is registered already.
        QuarantinedError: It is no plugin of that kind.
        IncompatibleApiError: It was written for another version of the contracts.
    """
    if kind not in CONTRACTS:
        raise RequestError(
            "there is no such kind",
            where="register",
            got=kind,
            instead=f"one of {', '.join(CONTRACTS)}",
        )
    cls = plugin.plugin if isinstance(plugin, Preset) else plugin
    value = f"{getattr(cls, '__module__', '')}:{getattr(cls, '__qualname__', cls)}"
    offer = Offer(kind, name, IN_PROCESS, "", value, loaded=plugin)
    offer.load()
    with _lock:
        if not override and (kind, name) in _registrations:
            raise ConflictError(
                f"the {kind} {name!r} is registered already",
                where="register",
                got=offer.value,
                instead="another name, or override=True",
            )
        _registrations[kind, name] = offer


def registrations() -> list[Offer]:
    """List what is registered in this process, for a process that is to offer the same."""
    with _lock:
        return list(_registrations.values())


@contextmanager
def registered(kind: str, name: str, plugin: type[Plugin] | Preset) -> Iterator[None]:
    """Offer a plugin in this process inside a ``with`` block; what was registered before comes back after it."""
    before = _registrations.get((kind, name))
    register(kind, name, plugin, override=True)
    try:
        yield
    finally:
        with _lock:
            if before is None:
                _registrations.pop((kind, name), None)
            else:
                _registrations[kind, name] = before


class Registry:
    """All offers: those of the installed distributions, and those registered in this process.

    Args:
        installed: The offers of distributions; by default the entry points, scanned at the first look-up.
        disabled: What must not be used: names, distributions, or ``distribution/name``.
    """

    def __init__(self, installed: Collection[Offer] | None = None, disabled: Collection[str] = ()) -> None:
        self._installed = None if installed is None else _Scan(tuple(installed), {})
        self.disabled = frozenset(disabled)

    def offers(self, kind: str) -> list[Offer]:
        """List the offers of a kind in the order of their names; imports none of them.

        One registered in this process hides those of the same name.
        """
        installed = self._scan.offers
        with _lock:
            local = {offer.name: offer for (its, _), offer in _registrations.items() if its == kind}
        hidden = [offer for offer in installed if offer.kind == kind and offer.name not in local]
        return sorted([*hidden, *local.values()], key=lambda offer: (offer.name, offer.distribution))

    def is_disabled(self, offer: Offer) -> bool:
        """Whether an offer must not be used."""
        return any(matches(item, offer) for item in self.disabled)

    def refuse_disabled(self, offer: Offer) -> UnavailableError:
        """Make the error that says that an offer must not be used."""
        return UnavailableError(
            f"the {offer.kind} {offer.name!r} of {offer.owner} is switched off",
            where="FABRIC_DISABLE_PLUGINS",
            got=", ".join(sorted(self.disabled)),
            instead=f"another {offer.kind}, or take it out of FABRIC_DISABLE_PLUGINS",
            offer=offer,
        )

    def find(self, kind: str, name: str, distribution: str | None = None) -> Offer:
        """Find the one offer of a name: the exact name first, then whatever its case.

        Raises:
            ConflictError: Several distributions offer it.
            UnavailableError: It is switched off.
            NotInstalledError: It is known, and the distribution that brings it isn't installed.
            UnknownPluginError: Nobody offers it.
        """
        everything = self.offers(kind)
        offers = [one for one in everything if distribution is None or _same(one.distribution, distribution)]
        found = [offer for offer in offers if offer.name == name] or [
            offer for offer in offers if offer.name.casefold() == name.casefold()
        ]
        usable = [offer for offer in found if not self.is_disabled(offer)]
        if len(usable) == 1:
            return usable[0]
        if usable:
            raise ConflictError(
                f"{len(usable)} distributions offer the {kind} {name!r}"
                if len({offer.distribution for offer in usable}) > 1
                else f"several names are the {kind} {name!r} in another case",
                where=f"{kind}={name!r}",
                got=", ".join(f"{offer.name!r} of {offer.owner}" for offer in usable),
                instead=" or ".join(f'"{offer.distribution}/{offer.name}"' for offer in usable),
                offers=usable,
            )
        if found:
            raise self.refuse_disabled(found[0])
        raise self._absent(kind, name, distribution, everything)

    def require(self, kind: str) -> None:
        """Refuse to choose a plugin of a kind of which every run needs one, where no plugin of it is installed at all.

        That is so in a source tree that was never installed: entry points come with an installation.

        Raises:
            NotInstalledError: There is none; it says how to install the built-in ones.
        """
        if kind in _ESSENTIAL and not self.offers(kind):
            raise NotInstalledError(
                f"no distribution that provides plugins of the kind {kind} is installed",
                where=kind,
                got=f"no entry point in the group {GROUPS[kind]}",
                instead=f"{_install_command()}, which provides the built-in plugins",
                kind=kind,
                distribution=_CORE,
            )

    def _absent(self, kind: str, name: str, distribution: str | None, everything: list[Offer]) -> PluginError:
        """Tell a name that isn't installed from one that nobody knows."""
        wanted = distribution or self._known(kind).get(name.casefold())
        if wanted is not None and not _is_installed(wanted):
            return NotInstalledError(
                f"the {kind} {name!r} comes with {wanted}, which isn't installed",
                where=f"{kind}={name!r}",
                instead=f"pip install {wanted}",
                kind=kind,
                name=name,
                distribution=wanted,
            )
        if wanted is None:
            self.require(kind)
        offers = [one for one in everything if distribution is None or _same(one.distribution, distribution)]
        names = sorted({offer.name for offer in offers})
        near = [*dict.fromkeys(_near(name, names))]
        elsewhere = "" if distribution is None else f" in {distribution}"
        also = [other for other in CONTRACTS if other != kind and any(one.name == name for one in self.offers(other))]
        return UnknownPluginError(
            f"there is no {kind} {name!r}{elsewhere}" + (f"; it is a {' and a '.join(also)}" if also else ""),
            where=f"{kind}={name!r}",
            instead=(f"did you mean {' or '.join(map(repr, near))}? " if near else "")
            + f"There are: {', '.join(names) or 'none'}; what another package brings needs that package installed",
            kind=kind,
            name=name,
            suggestions=near,
        )

    def _known(self, kind: str) -> Mapping[str, str]:
        return {name: owner for (its, name), owner in self._scan.known.items() if its == kind}

    @cached_property
    def _scan(self) -> "_Scan":
        return _scan() if self._installed is None else self._installed


def matches(item: str, offer: Offer) -> bool:
    """Whether an item of a variable such as FABRIC_EXTENSIONS means an offer: its name, its distribution, or both."""
    owner, slash, name = item.rpartition("/")
    if slash:
        return _same(owner, offer.distribution) and name == offer.name
    return item == offer.name or _same(item, offer.distribution)


def _near(name: str, names: list[str]) -> list[str]:
    folded = {one.casefold(): one for one in names}
    return [folded[one] for one in get_close_matches(name.casefold(), folded, n=3, cutoff=0.5)]


def _same(one: str, other: str) -> bool:
    return _canonical(one) == _canonical(other)


def _is_installed(name: str) -> bool:
    try:
        distribution(name)
    except (PackageNotFoundError, ValueError):
        return False
    return True


@dataclass(frozen=True)
class _Scan:
    offers: tuple[Offer, ...]
    known: Mapping[tuple[str, str], str]


def _scan() -> _Scan:
    """Read the entry points, once for as long as nothing is installed or uninstalled."""
    state = []
    for entry in sys.path:
        try:
            state.append((entry, os.stat(entry or ".").st_mtime_ns))  # noqa: PTH116 - a Path takes five times as long
        except OSError:
            state.append((entry, 0))
    return _read(tuple(state))


def _canonical(name: str) -> str:
    """Give the form in which names of distributions are compared."""
    return re.sub(r"[-_.]+", "-", name).lower()


@lru_cache(maxsize=1)
def _read(state: tuple[tuple[str, int], ...]) -> _Scan:
    """Read the entry points of all distributions.

    A distribution that is seen twice (stale metadata beside an editable install, a link to the same folder) counts
    once, as it does for imports: the first on the path.
    """
    kinds = {group: kind for kind, group in GROUPS.items()}
    offers: list[Offer] = []
    known: dict[tuple[str, str], str] = {}
    seen: set[str] = set()
    for one in distributions(path=[entry for entry, _ in state]):
        try:
            text = one.read_text("entry_points.txt")
            if text is None or "fabric." not in text:
                continue
            metadata = one.metadata
            name, its_version = metadata["Name"], metadata["Version"]
            requires = tuple(metadata.get_all("Requires-Dist", []))
            points = list(one.entry_points)
            canonical = _canonical(name)
        except Exception as error:  # noqa: BLE001 - whatever is wrong with one must not take the rest down
            warnings.warn(f"the metadata of {one} can't be read: {error!r}", FabricWarning, stacklevel=2)
            continue
        if canonical in seen:
            continue
        seen.add(canonical)
        for point in points:
            if point.group in kinds:
                offers.append(Offer(kinds[point.group], point.name, name, its_version, point.value, requires))
            elif point.group == _KNOWN:
                kind, _, its_name = point.name.partition("/")
                known[kind, its_name.casefold()] = point.value
    return _Scan(tuple(dict.fromkeys(offers)), known)
