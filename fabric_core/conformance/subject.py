"""The plugin under test, in a form that travels to other processes."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from fabric_core.choosing.offers import Offer
from fabric_core.choosing.parsing import parse_plugin
from fabric_core.choosing.registry import IN_PROCESS, Registry
from fabric_core.contracts import Accelerator, Launcher, Plugin, Preset
from fabric_core.errors import RequestError
from fabric_core.kinds import KINDS

__all__ = ["Subject"]

_PLACE: Final = re.compile(r"(?P<module>[\w.]+):(?P<name>[^\W\d][\w.]*)(?P<options>:.*)?", re.DOTALL)
"""``module:Class``, which may have options as a name may."""


_TORCHRUN: Final = {
    "RANK": "0",
    "LOCAL_RANK": "0",
    "GROUP_RANK": "0",
    "WORLD_SIZE": "1",
    "LOCAL_WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "kit",
    "TORCHELASTIC_RESTART_COUNT": "0",
}


@dataclass(frozen=True)
class Subject:
    """The plugin under test: where it lies and with which options it is made.

    Args:
        kind: Its kind.
        name: The name that it is offered under.
        value: Where it lies, as ``module:attribute``.
        distribution: Which distribution provides it; empty where it was given as a class.
        version: That distribution's version.
        options: The options that it is made with.
        auto: Its priority in automatic choice; ``None`` where it takes no part in it.
        strays: The entries about it in ``fabric.auto`` that don't count, with the reason.
    """

    kind: str
    name: str
    value: str
    distribution: str = ""
    version: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    auto: int | None = None
    strays: tuple[str, ...] = ()

    @classmethod
    def of(cls, kind: str, plugin: str | type[Plugin], options: Mapping[str, Any] | None = None) -> "Subject":
        """Find a plugin by its name, or by ``module:Class``, or take a class.

        Args:
            kind: Its kind.
            plugin: A class, or text as in a request: ``"[distribution/]name[:option=value,...]"``; in the place of the
                name may stand ``module:Class``.
            options: The options to make it with; they win over those in the text.

        Raises:
            RequestError: There is no such kind, the text can't be parsed, or the class can't be imported by its
                name.
            UnknownPluginError: Nobody offers the name.
        """
        if kind not in KINDS:
            raise RequestError(
                "there is no such kind", where="conformance", got=kind, instead=f"one of {', '.join(KINDS)}"
            )
        given = dict(options or {})
        if isinstance(plugin, type):
            if "<locals>" in plugin.__qualname__:
                raise RequestError(
                    "the class can't be imported by its name, so no other process can make it",
                    where="conformance",
                    got=plugin.__qualname__,
                    instead="define it at the top of a module",
                )
            return cls(kind, plugin.__name__, f"{plugin.__module__}:{plugin.__qualname__}", options=given)
        place = _PLACE.fullmatch(plugin)
        if place is not None:
            more = parse_plugin(f"plugin{place['options'] or ''}", kind).options
            return cls(kind, place["name"], f"{place['module']}:{place['name']}", options={**more, **given})
        named = parse_plugin(plugin, kind)
        given = {**named.options, **given}
        registry = Registry()
        offer = registry.find(kind, named.name, named.distribution)
        owner = "" if offer.distribution == IN_PROCESS else offer.distribution
        strays = tuple(
            f"{one.entry}: {one.reason}"
            for one in registry.strays
            if one.owner == offer.owner and one.entry.startswith(f"{kind}/") and one.entry.endswith(f"/{offer.name}")
        )
        return cls(kind, offer.name, offer.value, owner, offer.version, given, offer.auto, strays)

    @property
    def offer(self) -> Offer:
        """The offer, as the registry would find it."""
        return Offer(self.kind, self.name, self.distribution, self.version, self.value)

    def load(self) -> Preset:
        """Import the plugin: its class, and the options that it is made with."""
        preset = self.offer.load()
        return Preset(preset.plugin, {**preset.options, **self.options})

    def make(self) -> Plugin:
        """Make a new plugin, as the core does."""
        preset = self.load()
        return preset.plugin(preset.plugin.parse_options(preset.options))

    def declared(self) -> dict[str, Any]:
        """Gather what it declares, and what the kit can't ask of every plugin.

        The capabilities, the policy, for an accelerator whether a device is here, and for a launcher whether it
        detects a job of ``torchrun``, the only one that the kit can make.
        """
        plugin = self.make()
        found: dict[str, Any] = {}
        for source in (getattr(plugin, "capabilities", None), getattr(plugin, "policy", None)):
            if source is not None:
                fields = type(source).__dict__.get("__dataclass_fields__") or type(source).model_fields
                found.update({name: getattr(source, name) for name in fields})
        if isinstance(plugin, Accelerator):
            try:
                found["available"] = bool(plugin.is_available())
            except Exception:  # noqa: BLE001 - that it raises is for a rule to say
                found["available"] = False
        if isinstance(plugin, Launcher):
            try:
                found["detects"] = plugin.detect(dict(_TORCHRUN)) is not None
            except Exception:  # noqa: BLE001 - as above
                found["detects"] = True
        return found
