"""What the user asked for, validated: all parsing of strings, files and variables ends here.

[Note: plugin text] A plugin is named by ``[distribution/]name[:option=value,...]``. A value is JSON where it parses as
JSON (``2``, ``true``, ``null``, ``[1, 2]``, ``"a,b"``) and text otherwise; a comma inside brackets or quotes belongs to
the value. So everything that a mapping can say in JSON, text can say too. A kind that has no argument of its own goes
before it, in ``plugins``: ``launcher=name:option=value``.

[Note: who wins] What the code says wins over the variables ``FABRIC_*``, and those over a configuration file. An
argument that the code leaves at its default says nothing.
"""

import json
import math
import re
import reprlib
import warnings
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final, cast

from pydantic import BaseModel, ConfigDict

from fabric_core.errors import FabricWarning, NotInstalledError, RequestError

__all__ = ["DEFAULTS", "VARIABLES", "PluginRef", "Request", "fill", "parse_plugin", "read_environment", "read_file"]

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")
_OPTION: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_KIND: Final = re.compile(r"(?P<kind>[a-z]+)=(?P<rest>.*)", re.DOTALL)
_AUTO: Final = "auto"

DEFAULTS: Final[Mapping[str, Any]] = {
    "accelerator": _AUTO,
    "strategy": _AUTO,
    "devices": _AUTO,
    "num_nodes": 1,
    "precision": None,
    "wrappers": None,
    "plugins": None,
    "callbacks": None,
    "loggers": None,
}
"""The arguments of ``Fabric(...)`` and what each says when it is left out."""

_LISTS: Final = ("wrappers", "loggers")
_SINGLE: Final = ("accelerator", "strategy", "precision")

VARIABLES: Final[Mapping[str, str]] = {
    **{f"FABRIC_{name.upper()}": name for name in (*_SINGLE, "devices", "num_nodes")},
    **{f"FABRIC_{name.upper()}": name for name in _LISTS},
}
"""The environment variables that fill arguments; a list's items are separated by ``;``."""

_SWITCHES: Final = ("FABRIC_EXTENSIONS", "FABRIC_DISABLE_PLUGINS", "FABRIC_TRACE")


class _Short(reprlib.Repr):
    """Shows a value in a message, however large it is."""

    def repr_int(self, x: int, level: int) -> str:
        """Python refuses to write whole numbers of thousands of digits."""
        return super().repr_int(x, level) if abs(x) < _HUGE else f"a whole number of {x.bit_length()} bits"


_HUGE: Final = 10**9
"""From here on a number is no count, index or name."""

_short: Final = _Short()
_short.maxlevel = 3
_short.maxstring = _short.maxother = _short.maxlong = 200


class PluginRef(BaseModel):
    """A plugin as the user named it: by name and options, or as an instance.

    Args:
        name: The lookup string; of an instance, its class's name.
        distribution: The distribution that must bring it.
        options: The options.
        instance: The plugin itself.
        kind: Its kind, where the place in the request doesn't say it.
        source: Where it was named: an argument, a variable, a file.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True, defer_build=True)

    name: str
    distribution: str | None = None
    options: dict[str, Any] = {}
    instance: Any = None
    kind: str | None = None
    source: str = ""

    @property
    def is_auto(self) -> bool:
        """Whether the choice is left to the plan."""
        return self.instance is None and self.name == _AUTO

    def __str__(self) -> str:
        """Give the text that parses to this reference ([Note: plugin text])."""
        head = self.name if self.distribution is None else f"{self.distribution}/{self.name}"
        head = head if self.kind is None else f"{self.kind}={head}"
        if not self.options:
            return head
        return head + ":" + ",".join(f"{key}={_value_text(value)}" for key, value in self.options.items())


class Request(BaseModel):
    """What the user asked for. Says nothing of what is possible here."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True, defer_build=True)

    accelerator: PluginRef
    strategy: PluginRef
    devices: int | str | tuple[int, ...]
    num_nodes: int
    precision: PluginRef
    wrappers: tuple[PluginRef, ...] = ()
    plugins: tuple[Any, ...] = ()
    callbacks: tuple[Any, ...] = ()
    loggers: tuple[PluginRef, ...] = ()

    @classmethod
    def of(
        cls,
        *,
        accelerator: Any = _AUTO,
        strategy: Any = _AUTO,
        devices: Any = _AUTO,
        num_nodes: Any = 1,
        precision: Any = None,
        wrappers: Any = None,
        plugins: Any = None,
        callbacks: Any = None,
        loggers: Any = None,
    ) -> "Request":
        """Validate the arguments of ``Fabric(...)``.

        Raises:
            RequestError: An argument can't be understood.
        """
        return cls(
            accelerator=parse_plugin(accelerator, "accelerator"),
            strategy=parse_plugin(strategy, "strategy"),
            devices=_parse_devices(devices, "devices"),
            num_nodes=_parse_nodes(num_nodes, "num_nodes"),
            precision=parse_plugin(_AUTO if precision is None else precision, "precision"),
            wrappers=tuple(_parse_listed(wrappers, "wrappers")),
            plugins=tuple(_parse_part(one) for one in _listed(plugins)),
            callbacks=tuple(_listed(callbacks)),
            loggers=tuple(_parse_listed(loggers, "loggers")),
        )

    def arguments(self) -> dict[str, Any]:
        """Give the arguments that make this request, references as text: what a configuration file would hold."""
        devices = list(self.devices) if isinstance(self.devices, tuple) else self.devices
        given: dict[str, Any] = {
            **{name: _shown(getattr(self, name)) for name in _SINGLE},
            "devices": devices,
            "num_nodes": self.num_nodes,
        }
        given = {name: value for name, value in given.items() if value not in (_AUTO, DEFAULTS[name])}
        for name in (*_LISTS, "plugins", "callbacks"):
            if getattr(self, name):
                given[name] = [_shown(one) if isinstance(one, PluginRef) else one for one in getattr(self, name)]
        return given


def _shown(ref: PluginRef) -> Any:
    return str(ref) if ref.instance is None else ref.instance


def fill(code: Mapping[str, Any], *others: Mapping[str, Any]) -> dict[str, Any]:
    """Fill what the code leaves at its default ([Note: who wins]).

    Args:
        code: The arguments that the code gives.
        others: Arguments that are taken where no earlier one says anything.
    """
    filled = dict(code)
    for other in others:
        for name, value in other.items():
            default = DEFAULTS[name]
            given = filled.get(name, default)
            if type(given) is type(default) and given == default:
                filled[name] = value
    return filled


def read_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    """Read the arguments that the variables ``FABRIC_*`` give.

    Raises:
        RequestError: A variable can't be understood.
    """
    known = {*VARIABLES, *_SWITCHES}
    for name in environment:
        near = get_close_matches(name, known, n=1, cutoff=0.9) if name.startswith("FABRIC_") else []
        if near and name not in known:
            warnings.warn(f"the variable {name} says nothing; did you mean {near[0]}?", FabricWarning, stacklevel=2)
    return {
        name: _parse_argument(name, environment[variable], variable)
        for variable, name in VARIABLES.items()
        if variable in environment
    }


def read_file(path: str | Path) -> dict[str, Any]:
    """Read the arguments that a configuration file gives: TOML (``.toml``) or YAML (``.yaml``, ``.yml``).

    Raises:
        RequestError: There is no such file, or it can't be understood.
        NotInstalledError: It is YAML, and the package that reads YAML isn't installed.
    """
    path = Path(path)
    where = str(path)
    if path.suffix not in {".toml", ".yaml", ".yml"}:
        raise RequestError(
            "the configuration file has no known format",
            where=where,
            got=path.suffix or "no suffix",
            instead="a file that ends in .toml, .yaml or .yml",
        )
    try:
        data = path.read_bytes()
    except OSError as error:
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
    known = [name for name in DEFAULTS if name != "callbacks"]
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise RequestError(
            "the configuration file holds no mapping",
            where=where,
            got=_short.repr(content),
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
    if name == "num_nodes":
        return _parse_nodes(int(given) if isinstance(given, str) and given.isdecimal() else given, where)
    if name == "devices":
        return _parse_devices(given, where)
    if name in _LISTS:
        parts = [part for part in given.split(";") if part.strip()] if isinstance(given, str) else given
        return _parse_listed(parts, where)
    if name == "plugins":
        return [_parse_part(one, where) for one in _listed(given)]
    return parse_plugin(given, where)


def parse_plugin(given: Any, where: str) -> PluginRef:
    """Turn what a user wrote into a reference.

    Args:
        given: Text ([Note: plugin text]), a number (``32``), a mapping with ``name`` and optionally ``distribution``
            and ``options``, or an instance of a plugin.
        where: The argument, the variable, or the place in a file.

    Raises:
        RequestError: It can't be understood.
    """
    if isinstance(given, PluginRef):
        return given
    if isinstance(given, bool) or given is None:
        raise _not_understood(given, where)
    if isinstance(given, str):
        return _parse_text(given, where)
    if isinstance(given, int):
        return _parse_text(_short.repr(given), where)
    if isinstance(given, Mapping):
        return _parse_mapping(given, where)
    if isinstance(given, type):
        raise RequestError(
            f"{where} was given a class",
            where=where,
            got=given.__name__,
            instead=f"an instance: {where}={given.__name__}(...)",
        )
    if isinstance(given, Sequence | set | frozenset | float | complex):
        raise _not_understood(given, where)
    return PluginRef(name=type(given).__name__, instance=given, source=where)


def _parse_part(given: Any, where: str = "plugins") -> Any:
    """Parse an item of ``plugins``: a reference that says its kind, or an object, which comes back as it is."""
    if isinstance(given, str):
        match = _KIND.fullmatch(given.strip())
        if match is None:
            raise RequestError(
                f"{where} has text that names no kind",
                where=where,
                got=_short.repr(given),
                instead='the kind before the name: "launcher=NAME", "checkpoint=NAME"',
            )
        return _parse_text(match["rest"], where).model_copy(update={"kind": match["kind"]})
    if isinstance(given, Mapping):
        kind = given.get("kind")
        if not isinstance(kind, str) or not kind.isidentifier():
            raise RequestError(
                f"{where} has a mapping that names no kind",
                where=where,
                got=_short.repr(given),
                instead='a mapping such as {"kind": "launcher", "name": "NAME"}',
            )
        rest = {key: value for key, value in given.items() if key != "kind"}
        return _parse_mapping(rest, where).model_copy(update={"kind": kind})
    if given is None or isinstance(given, bool | int | float | list | tuple | set):
        raise RequestError(
            f"{where} was given what is neither a plugin nor an extension",
            where=where,
            got=_short.repr(given),
            instead="instances of plugins, and extensions",
        )
    return given


def _parse_text(text: str, where: str) -> PluginRef:
    head, colon, tail = text.strip().partition(":")
    distribution, slash, name = head.rpartition("/")
    for part in (distribution, name) if slash else (name,):
        if not _NAME.fullmatch(part):
            raise _not_understood(text, where)
    options: dict[str, Any] = {}
    for item in _split(tail) if colon else ():
        key, equals, value = item.partition("=")
        key = key.strip()
        if not equals or not _OPTION.fullmatch(key):
            raise RequestError(
                f"{where} has an option that can't be understood",
                where=f"{where}={_short.repr(text)}",
                got=_short.repr(item),
                instead="options as name=value, separated by commas",
            )
        if key in options:
            raise RequestError(
                f"{where} has the option {key!r} twice",
                where=where,
                got=_short.repr(text),
                instead=f"{key}=value once",
            )
        options[key] = _parse_value(value.strip())
    return PluginRef(name=name, distribution=distribution or None, options=options, source=where)


def _parse_mapping(given: Mapping[Any, Any], where: str) -> PluginRef:
    unknown = [key for key in given if key not in {"name", "distribution", "options"}]
    name, distribution, options = (
        given.get("name"),
        given.get("distribution"),
        given.get("options", {}),
    )
    name = str(name) if isinstance(name, int) and not isinstance(name, bool) and abs(name) < _HUGE else name
    if (
        unknown
        or not (isinstance(name, str) and _NAME.fullmatch(name))
        or not (distribution is None or (isinstance(distribution, str) and _NAME.fullmatch(distribution)))
        or not (isinstance(options, Mapping) and all(isinstance(key, str) for key in options))
        or not all(_OPTION.fullmatch(key) for key in options)
    ):
        raise RequestError(
            f"{where} can't be understood",
            where=where,
            got=_short.repr(given),
            instead='a mapping such as {"name": "NAME", "options": {"option": 1}}',
        )
    return PluginRef(name=name, distribution=distribution, options=dict(options), source=where)


def _parse_nodes(given: Any, where: str) -> int:
    if isinstance(given, int) and not isinstance(given, bool) and 1 <= given < _HUGE:
        return given
    raise RequestError(
        "num_nodes must be a positive whole number",
        where=where,
        got=_short.repr(given),
        instead="num_nodes=1 for one machine",
    )


def _parse_devices(given: Any, where: str) -> int | str | tuple[int, ...]:
    if isinstance(given, str) or _is_number(given):
        return cast("int | str", given)
    if isinstance(given, Sequence) and all(_is_number(one) for one in given):
        return tuple(given)
    raise RequestError(
        "devices can't be understood",
        where=where,
        got=_short.repr(given),
        instead='a count (devices=2), indices (devices=[0, 1] or "0,1"), -1 or "auto" for all',
    )


def _is_number(given: object) -> bool:
    return isinstance(given, int) and not isinstance(given, bool) and abs(given) < _HUGE


def _parse_listed(given: Any, where: str) -> list[PluginRef]:
    refs = [parse_plugin(one, where) for one in _listed(given)]
    if any(ref.is_auto for ref in refs):
        raise RequestError(
            f"{where} are never chosen automatically",
            where=where,
            got=_AUTO,
            instead=f"their names, or no {where}",
        )
    return refs


def _listed(given: Any) -> list[Any]:
    if given is None:
        return []
    return list(given) if isinstance(given, list | tuple) else [given]


def _split(text: str) -> list[str]:
    """Split at the commas that stand outside brackets and quotes."""
    parts: list[str] = []
    depth, start, quoted, escaped = 0, 0, False, False
    for index, char in enumerate(text):
        if quoted:
            quoted = char != '"' or escaped
            escaped = char == "\\" and not escaped
        elif char == '"':
            quoted = True
        elif char in "[{":
            depth += 1
        elif char in "]}":
            depth = max(0, depth - 1)
        elif char == "," and depth <= 0:
            parts.append(text[start:index])
            start = index + 1
    return [*parts, text[start:]]


def _parse_value(text: str) -> Any:
    try:
        return json.loads(text, parse_float=_parse_float, parse_constant=_parse_float)
    except (ValueError, RecursionError):  # no JSON, or nested past what can be read
        return text


def _parse_float(text: str) -> float:
    """Read a number; one that JSON can't say (NaN, infinity) stays text, which an option's own model may read."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


def _value_text(value: Any) -> str:
    if not isinstance(value, str):
        try:
            return json.dumps(value, default=str)
        except ValueError:  # a circle, or a whole number of thousands of digits: only code can say such
            return json.dumps(_short.repr(value))
    plain = value == value.strip() and _split(f"{value},") == [value, ""] and '"' not in value
    return value if plain and isinstance(_parse_value(value), str) else json.dumps(value)


def _not_understood(given: object, where: str) -> RequestError:
    return RequestError(
        f"{where} can't be understood",
        where=where,
        got=_short.repr(given),
        instead=f'a name ({where}="name", {where}="name:option=value"), a mapping, or an instance of a plugin',
    )
