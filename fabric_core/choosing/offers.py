"""What could be chosen, known without importing it; and how it is imported, checked and made."""

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property, lru_cache
from importlib.metadata import EntryPoint, PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, Final

from fabric_core.contracts import API_WINDOW, Plugin, PluginOptions, Preset
from fabric_core.contracts._spec import signature_fault
from fabric_core.errors import FabricError, IncompatibleApiError, NotInstalledError, QuarantinedError
from fabric_core.kinds import KINDS, groups

if TYPE_CHECKING:
    from packaging.requirements import Requirement

    from fabric_core.choosing.lock import Lock

__all__ = ["Offer", "canonical", "causes", "matches", "same"]

_CORE: Final = "fabric-registry"


@dataclass(frozen=True)
class Offer:
    """One name of one kind, from one distribution, that could be chosen.

    Args:
        kind: The kind.
        name: The lookup string.
        distribution: The distribution that provides it.
        version: That distribution's version.
        value: Where the plugin lies, as ``module:attribute``.
        requires: What the distribution says that it needs.
        loaded: The plugin itself, where it was registered in this process.
        auto: Its priority in automatic choice; ``None`` where it takes no part in it.
        lock: What says which code may run; asked before the plugin is imported.
    """

    kind: str
    name: str
    distribution: str
    version: str
    value: str
    requires: tuple[str, ...] = field(default=(), compare=False, repr=False)
    loaded: type[Plugin] | Preset | None = field(default=None, compare=False)
    auto: int | None = None
    lock: "Lock | None" = field(default=None, compare=False, repr=False)

    @property
    def owner(self) -> str:
        """The distribution with its version."""
        return f"{self.distribution} {self.version}".strip()

    @property
    def rank(self) -> tuple[int, str, str]:
        """Where it stands in the order of automatic choice."""
        return -(self.auto or 0), self.name, self.distribution

    @property
    def is_imported(self) -> bool:
        """Whether loading it imports no module."""
        return self.loaded is not None or self.value.partition(":")[0].strip() in sys.modules

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
            LockError: The lock doesn't let it run; nothing was imported.
        """
        return self._preset

    @cached_property
    def _preset(self) -> Preset:
        loaded = self._imported
        preset = loaded if isinstance(loaded, Preset) else Preset(loaded)  # type: ignore[arg-type]
        self._check(preset.plugin)
        return preset

    def make(self, options: Mapping[str, Any]) -> Plugin:
        """Import the plugin, and make one.

        Args:
            options: Options that win over those that an alias presets.

        Raises:
            PluginError: As for ``load``; or making it failed.
            OptionError: An option is unknown, or has a value of the wrong type.
        """
        preset = self.load()
        try:
            plugin = preset.plugin(preset.plugin.parse_options({**preset.options, **options}))
            repr(plugin)  # plans and errors show it
        except (FabricError, KeyboardInterrupt):
            raise
        except BaseException as error:
            raise self.quarantine(f"making it failed: {causes(error)}") from error
        return plugin

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
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            raise self.quarantine(f"making it failed: {causes(error)}") from error

    @cached_property
    def _imported(self) -> object:
        if self.loaded is not None:
            return self.loaded
        self.check_lock()
        self._check_requirements()
        try:
            return EntryPoint(self.name, self.value, groups()[self.kind]).load()
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a plugin's module may raise anything, SystemExit too
            raise self.quarantine(f"importing {self.value} failed: {causes(error)}") from error

    def check_lock(self) -> None:
        """Ask the lock, if there is one; imports nothing.

        Raises:
            LockError: It doesn't let the plugin run.
        """
        if self.lock is not None and self.loaded is None:
            self.lock.refuse(self)

    def _check_requirements(self) -> None:
        """Check what the distribution says that it needs of the core, and for this entry point, before an import."""
        _, _, tail = self.value.partition("[")
        extras = [extra.strip() for extra in tail.rstrip("] ").split(",") if extra.strip()]
        # Most requirements do not apply here; parsing one takes 50 µs, and importing the parser 10 ms.
        telling = [text for text in self.requires if extras or _CORE in canonical(text)]
        if not telling:
            return
        from packaging.requirements import InvalidRequirement, Requirement

        for text in telling:
            try:
                need = Requirement(text)
            except InvalidRequirement:
                continue
            here = need.marker is None or need.marker.evaluate({"extra": ""})
            if here and canonical(need.name) == _CORE:
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
        contract = KINDS[self.kind].contract
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
            instead=instead or f"fix or uninstall {self.distribution}",
            offer=self,
        )

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle as data: what an entry point gave stays behind."""
        return Offer, tuple(getattr(self, one.name) for one in fields(self))


@lru_cache(maxsize=1)
def _core_version() -> str | None:
    """Give the version of the core that runs; ``None`` in a bare source tree."""
    try:
        return version(_CORE)
    except PackageNotFoundError:
        return None


def causes(error: BaseException) -> str:
    """Show an error with everything that caused it."""
    chain, seen = [], {id(error)}
    one: BaseException | None = error
    while one is not None:
        chain.append(repr(one))
        one = one.__cause__ or (None if one.__suppress_context__ else one.__context__)
        if one is not None and id(one) in seen:
            break
        seen.add(id(one))
    return ", caused by ".join(chain)


def canonical(name: str) -> str:
    """Give the form in which names of distributions are compared."""
    return re.sub(r"[-_.]+", "-", name).lower()


def same(one: str, other: str) -> bool:
    """Whether two names mean one distribution."""
    return canonical(one) == canonical(other)


def matches(item: str, offer: Offer) -> bool:
    """Whether an item of a variable such as FABRIC_EXTENSIONS means an offer: its name, its distribution, or both."""
    owner, slash, name = item.rpartition("/")
    if slash:
        return same(owner, offer.distribution) and name == offer.name
    return item == offer.name or same(item, offer.distribution)
