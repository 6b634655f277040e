"""The base class of every plugin, and what its signatures must be."""

import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, ClassVar, Final, Self, cast

from pydantic import BaseModel, ConfigDict, ValidationError

from fabric_core.errors import FabricWarning, OptionError
from fabric_core.markers import PROJECT

API_VERSION: Final = 1
"""The version of the contracts that this core offers; it grows when a contract changes incompatibly."""

API_WINDOW: Final = range(1, 2)
"""The versions of the contracts that this core accepts plugins for."""


BOUND: Final = "_fabric_bound"
"""The attribute of an instance that says what a ``Fabric`` has bound on it."""


@dataclass(frozen=True, eq=False)
class Bound:
    """What a ``Fabric`` has bound on an instance.

    Args:
        living: Gives what bound it, or ``None`` once that is gone.
        names: The attributes that were set, each of which leads through the extensions or the trace.
        hidden: The attributes of the instance that had these names before.
        extensions: The extensions that wrap it, by name.
    """

    living: Callable[[], object | None]
    names: tuple[str, ...] = ()
    hidden: Mapping[str, Any] = field(default_factory=dict)
    extensions: tuple[str, ...] = ()


def bound_of(instance: object) -> Bound | None:
    """Give what a ``Fabric`` has bound on an instance, if one has."""
    bound: Bound | None = vars(instance).get(BOUND)
    return bound


def warn_of_lost_extensions(what: str, *instances: object) -> None:
    """Warn where what is pickled leaves the extensions of this process behind.

    Args:
        what: What is pickled.
        instances: What extensions may wrap.
    """
    lost = sorted({name for one in instances for bound in [bound_of(one)] if bound for name in bound.extensions})
    if lost:
        warnings.warn(
            f"{what} was pickled without the extensions that act on it here: {', '.join(lost)}; where it is loaded, "
            "none of them acts on it",
            FabricWarning,
            stacklevel=3,
        )


class PluginOptions(BaseModel):
    """The options of a plugin: a pydantic model that refuses what it doesn't know."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True, defer_build=True)


class Plugin:
    """What plugins of every kind share: options, and the version of the contracts that they were written for.

    A plugin is made by the core, as ``Plugin(options)`` with an instance of its own ``Options``, or by a user, with the
    options as keyword arguments: ``DDPStrategy(static_graph=True)``.

    Every method leaves its arguments as they are, nested values too, but for the module, optimizer and gradients that
    it is there to change. None draws from the random number generators of the process (``torch``, ``numpy``,
    ``random``), connecting, setup, backward passes and steps included: a plugin that needs numbers has a generator of
    its own. Once it is torn down, the process is as it was before it was made.

    Raises:
        OptionError: An option is unknown, or has a value of the wrong type.
    """

    kind: ClassVar[str]
    """Which of the kinds this is; set by the contract."""

    Options: ClassVar[type[PluginOptions]] = PluginOptions
    """The model of the options."""

    api_version: ClassVar[int] = API_VERSION
    """The version of the contracts that the plugin was written for."""

    def __init__(self, options: PluginOptions | None = None, /, **given: Any) -> None:
        self.options = type(self).parse_options(given) if options is None else options

    @classmethod
    def adapt(cls, instance: Any) -> Self | None:  # noqa: ARG003 - for a contract that takes more
        """Make a plugin of an object that is none, where its contract takes such objects; ``None`` where it doesn't."""
        return None

    @classmethod
    def parse_options(cls, given: Mapping[str, Any]) -> PluginOptions:
        """Validate options.

        Args:
            given: Option names and their values, as text or as the values themselves.

        Raises:
            OptionError: An option is unknown, or has a value of the wrong type.
        """
        try:
            return cls.Options.model_validate(dict(given))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            name = ".".join(str(part) for part in first["loc"]) or "options"
            known = sorted(cls.Options.model_fields)
            unknown = first["type"] == "extra_forbidden"
            raise OptionError(
                f"{cls.__name__} has no option {name!r}"
                if unknown
                else f"option {name!r} of {cls.__name__} can't take this value: {first['msg']}",
                where=f"options of the {cls.kind} {cls.__name__}",
                got=repr(first["input"]),
                instead=f"the options are: {', '.join(known) or 'none'}"
                if unknown
                else f"a value for {_field_type(cls.Options, name)}",
                option=name,
                known=known,
            ) from error

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel to another process as the options; what was bound in this one, and what wraps it here, stays here."""
        return type(self), (self.options,)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what a ``Fabric`` bound, for a subclass that travels by its attributes."""
        bound = bound_of(self)
        left_out = set() if bound is None else {BOUND, *bound.names}
        return {name: value for name, value in vars(self).items() if name not in left_out}

    def __repr__(self) -> str:
        """Show the plugin as the call that makes it, with the options that differ from their defaults."""
        given = ", ".join(
            f"{name}={by_name(getattr(self.options, name))!r}"
            for name, info in type(self.options).model_fields.items()
            if getattr(self.options, name) != info.get_default(call_default_factory=True)
        )
        return f"{type(self).__name__}({given})"


def by_name(value: Any) -> Any:
    """Show a function or class by its name, not by its address, and a set in order: alike on every rank."""
    if isinstance(value, set | frozenset):
        return sorted(str(by_name(one)) for one in value)
    if callable(value):
        named = value if hasattr(value, "__qualname__") else type(value)
        return f"{named.__module__}.{named.__qualname__}"
    return value


def behaviours(contract: type[Any]) -> Mapping[str, tuple[str, ...]]:
    """Give the behaviours that a contract specifies, each with the names of its arguments, in order."""
    return _behaviours(cast("Any", contract))


@lru_cache(maxsize=32)
def _behaviours(contract: type[Any]) -> Mapping[str, tuple[str, ...]]:
    return {
        name: tuple(inspect.signature(method).parameters)[1:]
        for name, method in vars(contract).items()
        if hasattr(method, f"{PROJECT}_spec")
    }


def signature_fault(contract: type[Plugin], plugin: type[Any]) -> tuple[str, str] | None:
    """Find a method of a plugin that pluggy would accept but that doesn't have the signature of its contract.

    That is one with fewer arguments, or with default values ([Note: no default values]).

    Returns:
        The method with its own signature, and what it should be; ``None`` where all is well.
    """
    return _signature_fault(cast("Any", contract), cast("Any", plugin))


@lru_cache(maxsize=512)
def _signature_fault(contract: type[Any], plugin: type[Any]) -> tuple[str, str] | None:
    for name, arguments in behaviours(contract).items():
        method = getattr(plugin, name)
        if method is getattr(contract, name):
            continue
        shown = ", ".join(("self", *arguments))
        if not callable(method):
            return f"{name} = {method!r}", f"def {name}({shown})"
        try:
            own = list(inspect.signature(method).parameters.values())
        except ValueError:  # a builtin that doesn't tell
            return f"{name} = {method!r}", f"def {name}({shown})"
        if not isinstance(inspect.getattr_static(plugin, name), staticmethod | classmethod):
            own = own[1:]
        if [parameter.name for parameter in own] != list(arguments) or any(
            parameter.default is not parameter.empty for parameter in own
        ):
            return f"{name}{inspect.signature(method)}", f"{name}({shown}), without default values"
    return None


def _field_type(model: type[BaseModel], name: str) -> str:
    info = model.model_fields.get(name.split(".", maxsplit=1)[0])
    if info is None:
        return "that option"
    annotation = info.annotation
    shown = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    return f"`{name}: {shown.replace('typing.', '')}`"


@dataclass(frozen=True)
class Preset:
    """A plugin with some options already given: what an alias's entry point names.

    Args:
        plugin: The plugin class.
        options: The options that the alias sets; a user's own options win over them.
    """

    plugin: type[Plugin]
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, plugin: type[Plugin], **options: Any) -> Self:
        """Make a preset from keyword arguments."""
        return cls(plugin, options)
