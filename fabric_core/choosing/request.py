"""What the user asked for, validated: code, variables and files become one request.

[Note: who wins] What the code says wins over the variables ``FABRIC_*``, and those over a configuration file. An
argument that the code leaves at its default is not asked for.
"""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final

from fabric_core.choosing.parsing import (
    PluginRef,
    brief,
    listed,
    parse_devices,
    parse_list,
    parse_nodes,
    parse_part,
    parse_path,
    parse_plugin,
    parse_seconds,
    parse_switch,
)
from fabric_core.contracts import Plugin
from fabric_core.errors import FabricWarning, NotInstalledError, RequestError
from fabric_core.kinds import AUTO, EXTENSION, KINDS, Count, argument_defaults

__all__ = ["Request", "file_arguments", "fill", "read_environment", "read_file", "read_outside", "variables"]

_DIGITS: Final = 9
"""A number of nodes with more digits than this is none."""

_PLAIN: Final[Mapping[str, Callable[[Any, str], Any]]] = {
    "num_nodes": parse_nodes,
    "devices": parse_devices,
    "callbacks": lambda given, _where: tuple(listed(given)),
    "check": parse_switch,
    "warn_after": parse_seconds,
    "lock": parse_path,
}
"""How the arguments are validated that name no plugins."""

_CONFIG: Final = "FABRIC_CONFIG"

_SWITCHES: Final = ("FABRIC_EXTENSIONS", "FABRIC_DISABLE_PLUGINS", "FABRIC_TRACE", _CONFIG)


def variables() -> Mapping[str, str]:
    """Give the environment variables that fill arguments; a list's items are separated by ``;``."""
    return {f"FABRIC_{name.upper()}": name for name in argument_defaults() if name not in {"plugins", "callbacks"}}


def file_arguments() -> list[str]:
    """Give the arguments that a configuration file may have."""
    return [name for name in argument_defaults() if name != "callbacks"]


@dataclass(frozen=True)
class Request:
    """What the user asked for. Independent of what is possible here.

    The arguments of ``Fabric`` are attributes too: ``request.strategy``, ``request.devices``.

    Args:
        values: The validated value of each argument of ``Fabric``.
    """

    values: Mapping[str, Any]

    @classmethod
    def of(cls, **given: Any) -> "Request":
        """Validate the arguments of ``Fabric(...)``; one that is left out has its default.

        Raises:
            RequestError: An argument can't be parsed.
            TypeError: There is no such argument.
        """
        defaults = argument_defaults()
        unknown = given.keys() - defaults.keys()
        if unknown:
            raise TypeError(f"Fabric has no argument {', '.join(sorted(unknown))}; it has {', '.join(defaults)}")
        values = {name: _validated(name, given.get(name, default)) for name, default in defaults.items()}
        _check_parts(values)
        return cls(values)

    def __getattr__(self, name: str) -> Any:
        """Give the value of an argument."""
        values: Mapping[str, Any] = vars(self).get("values", {})
        if name not in values:
            raise AttributeError(f"a request has no {name!r}")
        return values[name]

    def refs(self, kind: str) -> tuple[PluginRef, ...]:
        """Give what names the plugins of a kind, in its own argument or in ``plugins``."""
        there = [_as_ref(one) for one in self.values["plugins"] if _kind_of(one) == kind]
        if there or kind == EXTENSION:
            return tuple(there)
        argument, count = KINDS[kind].argument, KINDS[kind].count
        value = None if argument is None else self.values[argument]
        if value is None:
            return () if count is Count.MANY else (PluginRef(name=AUTO),)
        return value if isinstance(value, tuple) else (value,)

    def with_devices(self, devices: Any, num_nodes: int) -> "Request":
        """Give the same request with other devices."""
        return replace(self, values={**self.values, "devices": devices, "num_nodes": num_nodes})

    @property
    def extensions(self) -> tuple[object, ...]:
        """The objects in ``plugins`` that are no plugins, and the references to installed extensions."""
        return tuple(one for one in self.values["plugins"] if _kind_of(one) == EXTENSION)

    def arguments(self) -> dict[str, Any]:
        """Give the arguments that make this request, references as text: what a configuration file would hold."""
        given: dict[str, Any] = {}
        for name, default in argument_defaults().items():
            value = self.values[name]
            shown = [_shown(one) for one in value] if isinstance(value, tuple) else _shown(value)
            if shown not in (AUTO, default) and (shown != [] or name == "devices"):
                given[name] = shown
        return given


def _shown(value: Any) -> Any:
    if not isinstance(value, PluginRef):
        return value
    return str(value) if value.instance is None else value.instance


def _validated(name: str, given: Any, where: str | None = None) -> Any:
    """Validate the value of an argument, wherever it was given."""
    where = where or name
    if name in _PLAIN:
        return _PLAIN[name](given, where)
    if name == "plugins":
        return tuple(parse_part(one, where) for one in listed(given))
    kind = next(kind for kind in KINDS.values() if kind.argument == name)
    if kind.count is Count.MANY:
        return tuple(parse_list(given, where))
    return parse_plugin(AUTO if given is None and kind.default is None else given, where)


def _kind_of(part: object) -> str:
    """Say of which kind an item of ``plugins`` is; what is no plugin counts as an extension."""
    return (part.kind or "") if isinstance(part, PluginRef | Plugin) else EXTENSION


def _as_ref(part: Any) -> PluginRef:
    if isinstance(part, PluginRef):
        return part
    return PluginRef(name=type(part).__name__, instance=part, source="plugins")


def _same_origin(ref: PluginRef, part: Any) -> bool:
    """Whether an argument that isn't left to the plan was given in the same place as an item of ``plugins``."""
    origins = [
        "code" if source in argument_defaults() or not source else source.rpartition(": ")[0] or source
        for source in (ref.source, getattr(part, "source", ""))
    ]
    return not ref.is_auto and origins[0] == origins[1]


def _check_parts(values: Mapping[str, Any]) -> None:
    """Check that what is in ``plugins`` may be there, and once."""
    accepted = [kind.name for kind in KINDS.values() if kind.in_plugins]
    seen: set[str] = set()
    for part in values["plugins"]:
        name = _kind_of(part)
        if name == EXTENSION:
            continue
        kind = KINDS.get(name)
        argument = None if kind is None else kind.argument
        double = name in seen or (name in accepted and argument is not None and _same_origin(values[argument], part))
        if name not in accepted or double:
            raise RequestError(
                "there is no such kind"
                if kind is None
                else f"a {name} was given twice"
                if name in accepted
                else f"a {name} doesn't go into plugins",
                where="plugins",
                got=str(part),
                instead=f"one of {', '.join([*accepted, EXTENSION])}"
                if kind is None
                else f"one {name}"
                if name in accepted
                else f"Fabric({argument}=...)",
            )
        seen.add(name)


def fill(code: Mapping[str, Any], *others: Mapping[str, Any]) -> dict[str, Any]:
    """Fill what the code leaves at its default ([Note: who wins]).

    Args:
        code: The arguments that the code gives.
        others: Arguments that are taken where no earlier one says anything.
    """
    filled, defaults = dict(code), argument_defaults()
    for other in others:
        for name, value in other.items():
            default = defaults[name]
            given = filled.get(name, default)
            if type(given) is type(default) and given == default:
                filled[name] = value
    return filled


def read_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    """Read the arguments that the variables ``FABRIC_*`` give.

    Raises:
        RequestError: A variable can't be parsed.
    """
    known = {*variables(), *_SWITCHES}
    for name in environment:
        near = get_close_matches(name, known, n=1, cutoff=0.9) if name.startswith("FABRIC_") else []
        if near and name not in known:
            warnings.warn(f"the variable {name} is unknown; did you mean {near[0]}?", FabricWarning, stacklevel=2)
    return {
        name: _parse_argument(name, environment[variable], variable)
        for variable, name in variables().items()
        if variable in environment
    }


def read_outside(environment: Mapping[str, str], *paths: str | Path) -> dict[str, Any]:
    """Read what fills the arguments that the code leaves at their defaults ([Note: who wins]).

    Args:
        environment: The environment variables.
        paths: Configuration files; an earlier one wins.

    Raises:
        RequestError: A variable or a file can't be parsed.
        NotInstalledError: A file is YAML, and the package that reads YAML isn't installed.
    """
    its = environment.get(_CONFIG)
    return fill(read_environment(environment), *map(read_file, [*paths, *([its] if its else [])]))


def read_file(path: str | Path) -> dict[str, Any]:
    """Read the arguments that a configuration file gives: TOML (``.toml``) or YAML (``.yaml``, ``.yml``).

    Raises:
        RequestError: There is no such file, or it can't be parsed.
        NotInstalledError: It is YAML, and the package that reads YAML isn't installed.
    """
    try:
        path = Path(path)
    except TypeError:
        raise RequestError(
            "the configuration file is no path", got=brief(path), instead="the path of a file, as text or a Path"
        ) from None
    where = str(path).replace("\0", "\\0")
    if path.suffix not in {".toml", ".yaml", ".yml"}:
        raise RequestError(
            "the configuration file has no known format",
            where=where,
            got=path.suffix or "no suffix",
            instead="a file that ends in .toml, .yaml or .yml",
        )
    try:
        data = path.read_bytes()
    except (OSError, ValueError) as error:  # a name with a null byte is a ValueError
        raise RequestError(
            "the configuration file can't be read", where=where, got=str(error), instead="an existing file"
        ) from error
    try:
        import tomllib

        content = tomllib.loads(data.decode()) if path.suffix == ".toml" else _read_yaml(data.decode())
    except NotInstalledError:
        raise
    except Exception as error:  # the readers raise far more than their own error, such as IndexError and KeyError
        raise RequestError(
            "the configuration file is damaged", where=where, got=f"{type(error).__name__}: {error}"
        ) from error
    known = file_arguments()
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise RequestError(
            "the configuration file holds no mapping",
            where=where,
            got=brief(content),
            instead=f"a mapping of {', '.join(known)}",
        )
    unknown = sorted(set(content) - set(known))
    if unknown:
        near = get_close_matches(unknown[0], known, n=1)
        raise RequestError(
            f"the configuration file has {unknown[0]!r}, which is no argument",
            where=where,
            instead=(f"did you mean {near[0]!r}? " if near else "") + f"The arguments are {', '.join(known)}",
        )
    return {name: _parse_argument(name, value, f"{where}: {name}") for name, value in content.items()}


def _read_yaml(text: str) -> Any:
    try:
        import yaml
    except ImportError as error:
        raise NotInstalledError(
            "YAML needs a package that isn't installed", instead="pip install 'fabric-registry[yaml]', or write TOML"
        ) from error
    return yaml.safe_load(text)


def _parse_argument(name: str, given: Any, where: str) -> Any:
    """Parse what a variable or a file says for an argument, so that a message names that place."""
    if isinstance(given, str):
        if name == "num_nodes" and given.isdecimal() and len(given) <= _DIGITS:
            given = int(given)
        elif any(kind.argument == name and kind.count is Count.MANY for kind in KINDS.values()):
            given = [part for part in given.split(";") if part.strip()]
    value = _validated(name, given, where)
    return list(value) if isinstance(value, tuple) and name != "devices" else value
