"""Entry points and in-process registrations become offers: what could be chosen, known without importing it."""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Final

from fabric_core.contracts import API_WINDOW, CONTRACTS, Plugin, Preset
from fabric_core.errors import (
    ConflictError,
    IncompatibleApiError,
    QuarantinedError,
    RequestError,
    UnknownPluginError,
)

__all__ = ["GROUPS", "IN_PROCESS", "Offer", "Registry", "register", "registered", "registrations"]

GROUPS: Final[Mapping[str, str]] = {
    "accelerator": "fabric.accelerators",
    "strategy": "fabric.strategies",
    "precision": "fabric.precisions",
    "wrapper": "fabric.wrappers",
    "launcher": "fabric.launchers",
    "checkpoint": "fabric.checkpoints",
    "logger": "fabric.loggers",
}
"""The entry-point group of each kind."""

IN_PROCESS: Final = "(this process)"
"""Stands for the distribution of an offer that came through ``register``."""


@dataclass(frozen=True)
class Offer:
    """One name of one kind, from one distribution, that could be chosen.

    Args:
        kind: The kind.
        name: The lookup string.
        distribution: The distribution that brings it.
        version: That distribution's version.
        value: Where the plugin lies, as ``module:attribute``.
        loaded: The plugin itself, where it was registered in this process.
    """

    kind: str
    name: str
    distribution: str
    version: str
    value: str
    loaded: type[Plugin] | Preset | None = field(default=None, compare=False)

    def load(self) -> Preset:
        """Import the plugin.

        Returns:
            The class, with the options that an alias presets.

        Raises:
            QuarantinedError: It can't be imported, or is no plugin of its kind.
            IncompatibleApiError: It was written for another version of the contracts.
        """
        loaded: object = self.loaded
        if loaded is None:
            try:
                loaded = EntryPoint(self.name, self.value, GROUPS[self.kind]).load()
            except (Exception, SystemExit) as error:
                raise self._quarantine(f"importing {self.value} failed: {error!r}") from error
        preset = loaded if isinstance(loaded, Preset) else Preset(loaded, alias=False)  # type: ignore[arg-type]
        self._check(preset.plugin)
        return preset

    def _check(self, plugin: object) -> None:
        contract = CONTRACTS[self.kind]
        if not (isinstance(plugin, type) and issubclass(plugin, contract)):
            raise self._quarantine(f"{self.value} is {plugin!r}, which is no subclass of {contract.__name__}")
        if plugin.api_version not in API_WINDOW:
            raise IncompatibleApiError(
                f"the {self.kind} {self.name!r} was written for version {plugin.api_version} of the contracts",
                where=f"{self.distribution} {self.version}",
                instead=f"a version of {self.distribution} for the contracts {API_WINDOW[0]} to {API_WINDOW[-1]}",
            )
        missing = sorted(getattr(plugin, "__abstractmethods__", ()))
        if missing:
            raise self._quarantine(f"{plugin.__name__} lacks {', '.join(missing)}")

    def _quarantine(self, reason: str) -> QuarantinedError:
        return QuarantinedError(
            f"the {self.kind} {self.name!r} of {self.distribution} {self.version} can't be used: {reason}",
            instead=f"mend or uninstall {self.distribution}",
            offer=self,
        )


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
    if kind not in GROUPS:
        raise RequestError(
            "there is no such kind",
            where="register",
            got=kind,
            instead=f"one of {', '.join(GROUPS)}",
        )
    cls = plugin.plugin if isinstance(plugin, Preset) else plugin
    value = f"{cls.__module__}:{cls.__qualname__}"
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
    """

    def __init__(self, installed: list[Offer] | None = None) -> None:
        self._installed = installed

    def offers(self, kind: str) -> list[Offer]:
        """List the offers of a kind in the order of their names; imports none of them.

        One registered in this process hides those of the same name.
        """
        if self._installed is None:
            self._installed = _scan()
        with _lock:
            local = {offer.name: offer for (its, _), offer in _registrations.items() if its == kind}
        installed = [offer for offer in self._installed if offer.kind == kind and offer.name not in local]
        return sorted([*installed, *local.values()], key=lambda offer: (offer.name, offer.distribution))

    def find(self, kind: str, name: str, distribution: str | None = None) -> Offer:
        """Find the one offer of a name: the exact name first, then whatever its case.

        Raises:
            UnknownPluginError: Nobody offers it.
            ConflictError: Several distributions do.
        """
        offers = self.offers(kind)
        if distribution is not None:
            offers = [offer for offer in offers if _canonical(offer.distribution) == _canonical(distribution)]
        found = [offer for offer in offers if offer.name == name] or [
            offer for offer in offers if offer.name.casefold() == name.casefold()
        ]
        if not found:
            names = sorted({offer.name for offer in offers})
            near = get_close_matches(name.casefold(), names, n=3, cutoff=0.5)
            raise UnknownPluginError(
                f"there is no {kind} {name!r}" + (f" in {distribution}" if distribution else ""),
                where=f"{kind}={name!r}",
                instead=(f"did you mean {' or '.join(map(repr, near))}? " if near else "")
                + f"There are: {', '.join(names) or 'none'}",
                kind=kind,
                name=name,
                suggestions=near,
            )
        if len(found) > 1:
            raise ConflictError(
                f"{len(found)} distributions offer the {kind} {name!r}",
                where=f"{kind}={name!r}",
                got=", ".join(f"{offer.distribution} {offer.version}" for offer in found),
                instead=" or ".join(f'"{offer.distribution}/{offer.name}"' for offer in found),
                offers=found,
            )
        return found[0]


def _scan() -> list[Offer]:
    """Read the entry points. The same one seen twice (an editable install beside stale metadata) counts once."""
    found: dict[Offer, Any] = {}
    for kind, group in GROUPS.items():
        for point in entry_points(group=group):
            owner = point.dist
            found[
                Offer(
                    kind,
                    point.name,
                    owner.name if owner is not None else "(unknown)",
                    owner.version if owner is not None else "",
                    point.value,
                )
            ] = None
    return list(found)


def _canonical(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")
