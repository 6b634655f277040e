"""Entry points and in-process registrations become offers: what could be chosen, known without importing it.

[Note: known elsewhere] The core knows no plugin, so what isn't installed is known from what is: a distribution may
declare, in the group ``fabric.known``, names that other distributions provide
(``"strategy/name" = "their_distribution"``), and an entry point may name an extra of its own distribution
(``module:Class [extra]``) whose packages it needs. Neither is imported to say what to install.
"""

import os
import re
import shlex
import sys
import threading
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from difflib import get_close_matches
from email import message_from_string
from email.message import Message
from functools import cached_property, lru_cache
from importlib.metadata import Distribution, EntryPoint, PackageNotFoundError, distribution, distributions
from pathlib import Path
from typing import TYPE_CHECKING, Final

from fabric_core.choosing.offers import Offer, canonical, matches, same
from fabric_core.contracts import Plugin, Preset
from fabric_core.errors import (
    ConflictError,
    FabricWarning,
    NotInstalledError,
    PluginError,
    RequestError,
    UnavailableError,
    UnknownPluginError,
)
from fabric_core.kinds import AUTO_GROUP, EXTENSION, KINDS, Count, groups

if TYPE_CHECKING:
    from fabric_core.choosing.lock import Lock

__all__ = ["IN_PROCESS", "Registry", "Stray", "register", "registered", "registrations"]

IN_PROCESS: Final = "(this process)"
"""Stands for the distribution of an offer that came through ``register``."""

_KNOWN: Final = "fabric.known"
_AUTO_NAME: Final = re.compile(r"(?P<kind>[a-z_]+)/(?P<priority>-?[0-9]{1,9})/(?P<name>.+)")


_CORE: Final = "fabric-registry"


def _install_command() -> str:
    """Give the command that installs the distribution of this core: from its source tree, where it runs from one."""
    tree = Path(__file__).parents[2]
    if not (tree / "pyproject.toml").is_file():
        return f"pip install {_CORE}"
    return f"pip install -e {'.' if tree == Path.cwd() else shlex.quote(str(tree))}"


_lock = threading.Lock()
_registrations: dict[tuple[str, str], Offer] = {}


def register(
    kind: str, name: str, plugin: type[Plugin] | Preset, *, override: bool = False, auto: int | None = None
) -> None:
    """Offer a plugin in this process, for as long as it runs.

    Args:
        kind: The kind, such as ``"strategy"``.
        name: The name to find it by.
        plugin: The class, or a preset of it.
        override: Replace an offer of that name that was registered before.
        auto: Its priority where it takes part in automatic choice, the highest first.

    Raises:
        RequestError: There is no such kind.
        ConflictError: The name is registered already.
        QuarantinedError: It is no plugin of that kind.
        IncompatibleApiError: It was written for another version of the contracts.
    """
    if kind not in KINDS:
        raise RequestError(
            "there is no such kind",
            where="register",
            got=kind,
            instead=f"one of {', '.join(KINDS)}",
        )
    cls = plugin.plugin if isinstance(plugin, Preset) else plugin
    value = f"{getattr(cls, '__module__', '')}:{getattr(cls, '__qualname__', cls)}"
    offer = Offer(kind, name, IN_PROCESS, "", value, loaded=plugin, auto=auto)
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
def registered(kind: str, name: str, plugin: type[Plugin] | Preset, *, auto: int | None = None) -> Iterator[None]:
    """Offer a plugin in this process inside a ``with`` block; what was registered before comes back after it."""
    before = _registrations.get((kind, name))
    register(kind, name, plugin, override=True, auto=auto)
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
        lock: What says which distributions' code may run; ``None`` lets all run.
    """

    def __init__(
        self,
        installed: Collection[Offer] | None = None,
        disabled: Collection[str] = (),
        lock: "Lock | None" = None,
    ) -> None:
        self._installed = None if installed is None else _Scan(tuple(installed), {}, ())
        self.disabled = frozenset(disabled)
        self._lock = lock

    def offers(self, kind: str) -> list[Offer]:
        """List the offers of a kind in the order of their names; imports none of them.

        One registered in this process hides those of the same name.
        """
        installed = self._scan.offers
        with _lock:
            local = {offer.name: offer for (its, _), offer in _registrations.items() if its == kind}
        hidden = [offer for offer in installed if offer.kind == kind and offer.name not in local]
        return sorted([*hidden, *local.values()], key=lambda offer: (offer.name, offer.distribution))

    def automatic(self, kind: str) -> list[Offer]:
        """List the offers of a kind that take part in automatic choice, the highest priority first.

        Raises:
            LockError: The lock doesn't let one of them run: what came along uninvited is told, not passed over.
        """
        offers = [one for one in self.offers(kind) if one.auto is not None]
        for one in offers:
            if not self.is_disabled(one):
                one.check_lock()
        return sorted(offers, key=lambda one: one.rank)

    @property
    def strays(self) -> Sequence["Stray"]:
        """The entries of ``fabric.auto`` that don't count, with the reason."""
        return self._scan.strays

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
            LockError: The lock doesn't let one that offers it run.
            ConflictError: Several distributions offer it.
            UnavailableError: It is switched off.
            NotInstalledError: It is known, and the distribution that provides it isn't installed.
            UnknownPluginError: Nobody offers it.
        """
        everything = self.offers(kind)
        offers = [one for one in everything if distribution is None or same(one.distribution, distribution)]
        found = [offer for offer in offers if offer.name == name] or [
            offer for offer in offers if offer.name.casefold() == name.casefold()
        ]
        usable = [offer for offer in found if not self.is_disabled(offer)]
        for offer in usable:
            offer.check_lock()
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
        if kind != EXTENSION and KINDS[kind].count is Count.ONE and not self.offers(kind):
            raise NotInstalledError(
                f"no distribution that provides plugins of the kind {kind} is installed",
                where=kind,
                got=f"no entry point in the group {KINDS[kind].group}",
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
        offers = [one for one in everything if distribution is None or same(one.distribution, distribution)]
        names = sorted({offer.name for offer in offers})
        near = [*dict.fromkeys(_near(name, names))]
        elsewhere = "" if distribution is None else f" in {distribution}"
        also = [other for other in KINDS if other != kind and any(one.name == name for one in self.offers(other))]
        return UnknownPluginError(
            f"there is no {kind} {name!r}{elsewhere}" + (f"; it is a {' and a '.join(also)}" if also else ""),
            where=f"{kind}={name!r}",
            instead=(f"did you mean {' or '.join(map(repr, near))}? " if near else "")
            + f"There are: {', '.join(names) or 'none'}; what another package provides needs that package installed",
            kind=kind,
            name=name,
            suggestions=near,
        )

    def _known(self, kind: str) -> Mapping[str, str]:
        return {name: owner for (its, name), owner in self._scan.known.items() if its == kind}

    @cached_property
    def _scan(self) -> "_Scan":
        scan = _scan() if self._installed is None else self._installed
        if self._lock is None:
            return scan
        return replace(scan, offers=tuple(replace(offer, lock=self._lock) for offer in scan.offers))


def _near(name: str, names: list[str]) -> list[str]:
    folded = {one.casefold(): one for one in names}
    return [folded[one] for one in get_close_matches(name.casefold(), folded, n=3, cutoff=0.5)]


def _is_installed(name: str) -> bool:
    try:
        distribution(name)
    except (PackageNotFoundError, ValueError):
        return False
    return True


@dataclass(frozen=True)
class Stray:
    """An entry of ``fabric.auto`` that doesn't count.

    Args:
        entry: Its name.
        owner: The distribution that has it, with its version.
        reason: Why it doesn't count.
    """

    entry: str
    owner: str
    reason: str


@dataclass(frozen=True)
class _Scan:
    offers: tuple[Offer, ...]
    known: Mapping[tuple[str, str], str]
    strays: tuple[Stray, ...]


def _scan() -> _Scan:
    """Read the entry points, once for as long as nothing is installed or uninstalled."""
    state = []
    for entry in sys.path:
        try:
            state.append((entry, os.stat(entry or ".").st_mtime_ns))  # noqa: PTH116 - a Path takes five times as long
        except OSError:
            state.append((entry, 0))
    return _read(tuple(state), tuple(groups().items()))


@lru_cache(maxsize=1)
def _read(state: tuple[tuple[str, int], ...], kinds_and_groups: tuple[tuple[str, str], ...]) -> _Scan:
    """Read the entry points of all distributions.

    A distribution that is seen twice (stale metadata beside an editable install, a link to the same folder) counts
    once, as it does for imports: the first on the path.
    """
    kinds = {group: kind for kind, group in kinds_and_groups}
    offers: list[Offer] = []
    known: dict[tuple[str, str], str] = {}
    strays: list[Stray] = []
    seen: set[str] = set()
    for one in distributions(path=[entry for entry, _ in state]):
        try:
            text = one.read_text("entry_points.txt")
            if text is None or "fabric." not in text:
                continue
            metadata = _headers(one)
            name, its_version = metadata["Name"], metadata["Version"]
            requires = tuple(metadata.get_all("Requires-Dist", []))
            points = list(one.entry_points)
            its_canonical = canonical(name)
        except Exception as error:  # noqa: BLE001 - whatever is wrong with one must not take the rest down
            warnings.warn(f"the metadata of {one} can't be read: {error!r}", FabricWarning, stacklevel=2)
            continue
        if its_canonical in seen:
            continue
        seen.add(its_canonical)
        for point in points:
            if point.group == _KNOWN:
                kind, _, its_name = point.name.partition("/")
                known[kind, its_name.casefold()] = point.value
        own = {
            (kinds[point.group], point.name): Offer(
                kinds[point.group], point.name, name, its_version, point.value, requires
            )
            for point in points
            if point.group in kinds
        }
        strays += _give_priorities(points, own, kinds.values(), f"{name} {its_version}")
        offers += own.values()
    return _Scan(tuple(offers), known, tuple(strays))


def _headers(one: Distribution) -> Message:
    """Read a distribution's metadata without its long description, which takes ten times as long."""
    text = one.read_text("METADATA") or one.read_text("PKG-INFO") or ""
    return message_from_string(text.partition("\n\n")[0])


def _give_priorities(
    points: Collection[EntryPoint], own: dict[tuple[str, str], Offer], kinds: Collection[str], owner: str
) -> Iterator[Stray]:
    for point in points:
        reason = _give_priority(point, own, kinds) if point.group == AUTO_GROUP else None
        if reason is not None:
            yield Stray(point.name, owner, reason)


def _give_priority(point: EntryPoint, own: dict[tuple[str, str], Offer], kinds: Collection[str]) -> str | None:
    """Let an entry of ``fabric.auto`` count, or say why it doesn't."""
    match = _AUTO_NAME.fullmatch(point.name)
    if match is None or match["kind"] not in kinds:
        return f"it is not KIND/PRIORITY/NAME, with a whole number and one of the kinds {', '.join(kinds)}"
    offer = own.get((match["kind"], match["name"]))
    if offer is None:
        return f"its own distribution has no {match['kind']} {match['name']!r}, and nobody may offer another's plugin"
    if offer.value.replace(" ", "") != point.value.replace(" ", ""):
        return f"it names {point.value}, and the {match['kind']} {match['name']!r} is {offer.value}"
    if offer.auto is not None:
        return f"the {match['kind']} {match['name']!r} has the priority {offer.auto} already"
    own[match["kind"], match["name"]] = replace(offer, auto=int(match["priority"]))
    return None
