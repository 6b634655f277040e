"""What the user asked for, validated: all parsing of strings ends here.

[Note: plugin text] A plugin is named by ``[distribution/]name[:option=value,...]``. A value is JSON where it parses as
JSON (``2``, ``true``, ``null``, ``[1, 2]``, ``"a,b"``) and text otherwise; a comma inside brackets or quotes belongs to
the value. So everything that a mapping can say in JSON, text can say too.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from pydantic import BaseModel, ConfigDict

from fabric_core.errors import RequestError

__all__ = ["PluginRef", "Request", "parse_plugin"]

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")
_OPTION: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_AUTO: Final = "auto"


class PluginRef(BaseModel):
    """A plugin as the user named it: by name and options, or as an instance."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    name: str
    distribution: str | None = None
    options: dict[str, Any] = {}
    instance: Any = None

    @property
    def is_auto(self) -> bool:
        """Whether the choice is left to the plan."""
        return self.instance is None and self.name == _AUTO

    def __str__(self) -> str:
        """Give the text that parses to this reference ([Note: plugin text])."""
        head = self.name if self.distribution is None else f"{self.distribution}/{self.name}"
        if not self.options:
            return head
        return head + ":" + ",".join(f"{k}={_value_text(v)}" for k, v in self.options.items())


class Request(BaseModel):
    """What the user asked for. Says nothing of what is possible here."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

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
        if not isinstance(num_nodes, int) or isinstance(num_nodes, bool) or num_nodes < 1:
            raise RequestError(
                "num_nodes must be a positive whole number",
                where="num_nodes",
                got=repr(num_nodes),
                instead="num_nodes=1 for one machine",
            )
        return cls(
            accelerator=parse_plugin(accelerator, "accelerator"),
            strategy=parse_plugin(strategy, "strategy"),
            devices=_parse_devices(devices),
            num_nodes=num_nodes,
            precision=parse_plugin(_AUTO if precision is None else precision, "precision"),
            wrappers=tuple(parse_plugin(one, "wrappers") for one in _listed(wrappers)),
            plugins=tuple(_listed(plugins)),
            callbacks=tuple(_listed(callbacks)),
            loggers=tuple(parse_plugin(one, "loggers") for one in _listed(loggers)),
        )


def parse_plugin(given: Any, where: str) -> PluginRef:
    """Turn what a user wrote into a reference.

    Args:
        given: Text ([Note: plugin text]), a number (``32``), a mapping with ``name`` and optionally ``distribution``
            and ``options``, or an instance of a plugin.
        where: The argument, for messages.

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
        return PluginRef(name=str(given))
    if isinstance(given, Mapping):
        return _parse_mapping(given, where)
    if isinstance(given, type):
        raise RequestError(
            f"{where} was given a class",
            where=where,
            got=given.__name__,
            instead=f"an instance: {where}={given.__name__}(...)",
        )
    if isinstance(given, Sequence | set | frozenset):
        raise _not_understood(given, where)
    return PluginRef(name=type(given).__name__, instance=given)


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
                where=f"{where}={text!r}",
                got=item,
                instead="options as name=value, separated by commas",
            )
        if key in options:
            raise RequestError(
                f"{where} has the option {key!r} twice",
                where=where,
                got=text,
                instead=f"{key}=value once",
            )
        options[key] = _parse_value(value.strip())
    return PluginRef(name=name, distribution=distribution or None, options=options)


def _parse_mapping(given: Mapping[Any, Any], where: str) -> PluginRef:
    unknown = [key for key in given if key not in {"name", "distribution", "options"}]
    name, distribution, options = (
        given.get("name"),
        given.get("distribution"),
        given.get("options", {}),
    )
    if (
        unknown
        or not (isinstance(name, str) and _NAME.fullmatch(name))
        or not (distribution is None or (isinstance(distribution, str) and _NAME.fullmatch(distribution)))
        or not (isinstance(options, Mapping) and all(isinstance(key, str) for key in options))
    ):
        raise RequestError(
            f"{where} can't be understood",
            where=where,
            got=repr(given),
            instead='a mapping such as {"name": "ddp", "options": {"static_graph": True}}',
        )
    return PluginRef(name=name, distribution=distribution, options=dict(options))


def _parse_devices(given: Any) -> int | str | tuple[int, ...]:
    if isinstance(given, int | str) and not isinstance(given, bool):
        return given
    if isinstance(given, Sequence) and all(isinstance(one, int) and not isinstance(one, bool) for one in given):
        return tuple(given)
    raise RequestError(
        "devices can't be understood",
        where="devices",
        got=repr(given),
        instead='a count (devices=2), indices (devices=[0, 1] or "0,1"), -1 or "auto" for all',
    )


def _listed(given: Any) -> list[Any]:
    if given is None:
        return []
    return list(given) if isinstance(given, list | tuple) else [given]


def _split(text: str) -> list[str]:
    """Split at commas that are outside quotes and brackets."""
    parts, depth, quoted, start, escaped = [], 0, False, 0, False
    for index, char in enumerate(text):
        if quoted:
            quoted = char != '"' or escaped
            escaped = char == "\\" and not escaped
        elif char == '"':
            quoted = True
        elif char in "[{":
            depth += 1
        elif char in "]}":
            depth -= 1
        elif char == "," and depth <= 0:
            parts.append(text[start:index])
            start = index + 1
    return [*parts, text[start:]]


def _parse_value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _value_text(value: Any) -> str:
    if not isinstance(value, str):
        return json.dumps(value)
    plain = value == value.strip() and _split(value) == [value] and '"' not in value
    return value if plain and isinstance(_parse_value(value), str) else json.dumps(value)


def _not_understood(given: object, where: str) -> RequestError:
    return RequestError(
        f"{where} can't be understood",
        where=where,
        got=repr(given),
        instead=f'a name ({where}="name", {where}="name:option=value"), a mapping, or an instance of a plugin',
    )
