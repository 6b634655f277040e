"""From what a user wrote for one argument to what it means: names, options, numbers and devices.

[Note: plugin text] A plugin is named by ``[distribution/]name[:option=value,...]``. A value is JSON where it parses as
JSON (``2``, ``true``, ``null``, ``[1, 2]``, ``"a,b"``) and text otherwise; a comma inside brackets or quotes belongs to
the value. So everything that a mapping can say in JSON, text can say too. A kind that has no argument of its own goes
before it, in ``plugins``: ``launcher=name:option=value``.
"""

import json
import math
import os
import re
import reprlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, cast

from fabric_core.contracts.accelerator import MOST_DEVICES
from fabric_core.errors import DeviceError, RequestError
from fabric_core.kinds import AUTO

__all__ = [
    "MOST_NODES",
    "PluginRef",
    "brief",
    "listed",
    "parse_devices",
    "parse_list",
    "parse_nodes",
    "parse_part",
    "parse_path",
    "parse_plugin",
]

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")
_OPTION: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_KIND: Final = re.compile(r"(?P<kind>[a-z_]+)=(?P<rest>.*)", re.DOTALL)


class _Short(reprlib.Repr):
    """Shows a value in a message, however large it is."""

    def repr_int(self, x: int, level: int) -> str:
        """Python refuses to write whole numbers of thousands of digits."""
        return super().repr_int(x, level) if abs(x) < _HUGE else f"a whole number of {x.bit_length()} bits"


MOST_NODES: Final = 1_000_000
"""No cluster has more nodes; a larger number is a mistake."""
_HUGE: Final = 10**9
"""From here on a number is no count, index or name."""

_short: Final = _Short()
_short.maxlevel = 3
_short.maxstring = _short.maxother = _short.maxlong = 200


def brief(value: object) -> str:
    """Show a value in a message, however large it is."""
    return _short.repr(value)


@dataclass(frozen=True, kw_only=True)
class PluginRef:
    """A plugin as the user named it: by name and options, or as an instance.

    Args:
        name: The lookup string; of an instance, its class's name.
        distribution: The distribution that must provide it.
        options: The options.
        instance: The plugin itself.
        kind: Its kind, where the place in the request doesn't say it.
        source: Where it was named: an argument, a variable, a file.
    """

    name: str
    distribution: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    instance: Any = None
    kind: str | None = None
    source: str = ""

    @property
    def is_auto(self) -> bool:
        """Whether the choice is left to the plan."""
        return self.instance is None and self.name == AUTO

    def __str__(self) -> str:
        """Give the text that parses to this reference ([Note: plugin text])."""
        head = self.name if self.distribution is None else f"{self.distribution}/{self.name}"
        head = head if self.kind is None else f"{self.kind}={head}"
        if not self.options:
            return head
        return head + ":" + ",".join(f"{key}={_value_text(value)}" for key, value in self.options.items())


def parse_plugin(given: Any, where: str) -> PluginRef:
    """Turn what a user wrote into a reference.

    Args:
        given: Text ([Note: plugin text]), a number (``32``), a mapping with ``name`` and optionally ``distribution``
            and ``options``, or an instance of a plugin.
        where: The argument, the variable, or the place in a file.

    Raises:
        RequestError: It can't be parsed.
    """
    if isinstance(given, PluginRef):
        return given
    if isinstance(given, bool) or given is None:
        raise _not_understood(given, where)
    if isinstance(given, str):
        return _parse_text(given, where)
    if isinstance(given, int):
        return _parse_text(brief(given), where)
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


def parse_part(given: Any, where: str = "plugins") -> Any:
    """Parse an item of ``plugins``: a reference that says its kind, or an object, which comes back as it is.

    Raises:
        RequestError: It names no kind, or is a value that is never a plugin or an extension.
    """
    if isinstance(given, str):
        match = _KIND.fullmatch(given.strip())
        if match is None:
            raise RequestError(
                f"{where} has text that names no kind",
                where=where,
                got=brief(given),
                instead='the kind before the name: "launcher=NAME", "checkpoint=NAME"',
            )
        return replace(_parse_text(match["rest"], where), kind=match["kind"])
    if isinstance(given, Mapping):
        kind = given.get("kind")
        if not isinstance(kind, str) or not kind.isidentifier():
            raise RequestError(
                f"{where} has a mapping that names no kind",
                where=where,
                got=brief(given),
                instead='a mapping such as {"kind": "launcher", "name": "NAME"}',
            )
        rest = {key: value for key, value in given.items() if key != "kind"}
        return replace(_parse_mapping(rest, where), kind=kind)
    if given is None or isinstance(given, bool | int | float | list | tuple | set):
        raise RequestError(
            f"{where} was given what is neither a plugin nor an extension",
            where=where,
            got=brief(given),
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
                f"{where} has an option that can't be parsed",
                where=f"{where}={brief(text)}",
                got=brief(item),
                instead="options as name=value, separated by commas",
            )
        if key in options:
            raise RequestError(
                f"{where} has the option {key!r} twice",
                where=where,
                got=brief(text),
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
            f"{where} can't be parsed",
            where=where,
            got=brief(given),
            instead='a mapping such as {"name": "NAME", "options": {"option": 1}}',
        )
    return PluginRef(name=name, distribution=distribution, options=dict(options), source=where)


def parse_nodes(given: Any, where: str) -> int:
    """Read a number of nodes.

    Raises:
        RequestError: It is no positive whole number.
    """
    if _is_whole(given) and 1 <= given <= MOST_NODES:
        return cast("int", given)
    raise RequestError(
        f"num_nodes must be a positive whole number, and at most {MOST_NODES:,}",
        where=where,
        got=brief(given),
        instead="num_nodes=1 for one machine",
    )


def parse_switch(given: Any, where: str) -> bool:
    """Validate what is on or off; a variable says ``1`` or ``0``, ``true`` or ``false``.

    Raises:
        RequestError: It is neither.
    """
    word = given.strip().lower() if isinstance(given, str) else given
    if isinstance(word, bool):
        return word
    if word in {"1", "true", "0", "false", ""}:
        return word in {"1", "true"}
    raise RequestError(f"{where} can't be parsed", where=where, got=brief(given), instead="True or False")


def parse_seconds(given: Any, where: str) -> float | None:
    """Validate a number of seconds above zero; ``None``, or ``0``, is never.

    Raises:
        RequestError: It is no such number.
    """
    try:
        seconds = 0.0 if given is None else float(given)
    except (TypeError, ValueError, OverflowError):
        seconds = math.nan
    if isinstance(given, bool) or not 0 <= seconds < math.inf:
        raise RequestError(
            f"{where} can't be parsed", where=where, got=brief(given), instead="a number of seconds, or None for never"
        )
    return seconds or None


def parse_path(given: Any, where: str) -> str | None:
    """Validate the path of a file; ``None``, or nothing, is none.

    Raises:
        RequestError: It is no path.
    """
    if given is None or isinstance(given, str | os.PathLike):
        path = None if given is None else os.fspath(given)
        if not isinstance(path, bytes):
            return path or None
    raise RequestError(f"{where} can't be parsed", where=where, got=brief(given), instead="the path of a file")


def parse_devices(given: Any, where: str) -> int | str | tuple[int, ...]:
    """Read devices: a count, indices, or text, which the accelerator reads.

    Raises:
        RequestError: It is something else.
        DeviceError: There are too many for any machine.
    """
    if isinstance(given, str):
        return given
    counts = _is_whole(given)
    listed = isinstance(given, Sequence) and not isinstance(given, bytes | bytearray)
    # The length first: a range of a million million would be looked through.
    if (given if counts else _length(given) if listed else 0) > MOST_DEVICES:
        raise DeviceError(
            "those are more devices than any machine has",
            where=where,
            got=brief(given),
            instead=f"at most {MOST_DEVICES:,} on each node",
        )
    if counts and given > -_HUGE:
        return cast("int", given)
    if listed and all(_is_whole(one) and abs(one) < _HUGE for one in given):
        return tuple(given)
    raise RequestError(
        "devices can't be parsed",
        where=where,
        got=brief(given),
        instead='a count (devices=2), indices (devices=[0, 1] or "0,1"), -1 or "auto" for all',
    )


def _length(given: Sequence[Any]) -> int:
    try:
        return len(given)
    except OverflowError:  # a range that is longer than any list
        return sys.maxsize


def _is_whole(given: object) -> bool:
    return isinstance(given, int) and not isinstance(given, bool)


def parse_list(given: Any, where: str) -> list[PluginRef]:
    """Read what names several plugins.

    Raises:
        RequestError: An item can't be parsed, or leaves the choice to the plan.
    """
    refs = [parse_plugin(one, where) for one in listed(given)]
    if any(ref.is_auto for ref in refs):
        raise RequestError(
            f"{where} are never chosen automatically",
            where=where,
            got=AUTO,
            instead=f"their names, or no {where}",
        )
    return refs


def listed(given: Any) -> list[Any]:
    """Give the items of what may be one item, a list of them, or nothing."""
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
            return json.dumps(brief(value))
    plain = value == value.strip() and _split(f"{value},") == [value, ""] and '"' not in value
    return value if plain and isinstance(_parse_value(value), str) else json.dumps(value)


def _not_understood(given: object, where: str) -> RequestError:
    return RequestError(
        f"{where} can't be parsed",
        where=where,
        got=brief(given),
        instead=f'a name ({where}="name", {where}="name:option=value"), a mapping, or an instance of a plugin',
    )
