"""Rules for accelerators: which devices a user's words mean."""

from collections.abc import Sequence
from typing import Any, Final

import torch

from fabric_core.conformance import cases
from fabric_core.conformance.bench import Bench
from fabric_core.conformance.rule import Broken, Table
from fabric_core.errors import DeviceError

TABLE: Final = Table("accelerator")


def _parsed(plugin: Any, spec: Any) -> list[int] | None:
    """Parse; ``None`` where it is refused as it should be."""
    try:
        found: list[int] = plugin.parse_devices(spec)
    except DeviceError:
        return None
    except Exception as error:
        raise Broken(f"parse_devices({spec!r}) raises {error!r}, and no DeviceError") from error
    return found


@TABLE.rule(
    "ACC-105",
    "`parse_devices` is total: it gives indices or raises DeviceError, whatever is written.",
    reason="A user's mistake must come back as a message that says what to write instead.",
    advice="end in fabric_core.contracts.parse_device_indices, or raise DeviceError for everything else",
    examples=cases.devices,
    count=60,
)
def _parsing_is_total(bench: Bench, spec: Any) -> None:
    _parsed(bench.plugin(), spec)


@TABLE.rule(
    "ACC-106",
    "`parse_devices` gives a list of at least one index, none negative, each once.",
    reason="Each index becomes a process with a device of its own.",
    advice="refuse zero devices, negative indices and doubles with DeviceError",
    examples=cases.devices,
    count=60,
)
def _parsing_gives_indices(bench: Bench, spec: Any) -> None:
    found = _parsed(bench.plugin(), spec)
    if found is None:
        return
    whole = isinstance(found, list) and all(type(index) is int and index >= 0 for index in found)
    if not whole or not found or len(set(found)) != len(found):
        raise Broken(f"parse_devices({spec!r}) gives {found!r}")


@TABLE.rule(
    "ACC-107",
    "`parse_devices` is idempotent: what it gives parses to itself, whatever was parsed before.",
    reason="The plan's indices are parsed again on every rank, and the automatic choice asks for others before.",
    advice="take a list of indices as it is, in its order, and keep nothing",
    examples=cases.devices,
    count=40,
)
def _parsing_is_idempotent(bench: Bench, spec: Any) -> None:
    plugin = bench.plugin()
    for other in ("auto", 1, [1, 0], "no device"):
        _parsed(plugin, other)
    found = _parsed(plugin, spec)
    if found != _parsed(bench.plugin(), spec):
        raise Broken(f"parse_devices({spec!r}) gives {found!r} after others, and another answer alone")
    if found is not None and _parsed(plugin, found) != found:
        raise Broken(f"parse_devices({spec!r}) gives {found!r}, which parses to {_parsed(plugin, found)!r}")


@TABLE.rule(
    "ACC-108",
    "A value written as text means the same as the value.",
    reason="A command line and a configuration file only have text.",
    advice='read "2" as 2 and "0,1" as [0, 1]',
)
def _text_means_value(bench: Bench) -> None:
    plugin = bench.plugin()
    pairs: tuple[tuple[str, Any], ...] = (("1", 1), ("-1", -1), ("0,", [0]), ("0", 0), ("0,0", [0, 0]))
    for text, value in pairs:
        if _parsed(plugin, text) != _parsed(plugin, value):
            raise Broken(f"{text!r} gives {_parsed(plugin, text)!r}, {value!r} gives {_parsed(plugin, value)!r}")


@TABLE.rule(
    "ACC-109",
    '`"auto"` and -1 mean every device there is.',
    reason="Both are what a user writes who wants the whole machine.",
    advice="give the indices 0 to device_count() - 1 for both",
)
def _all_devices(bench: Bench) -> None:
    plugin = bench.plugin()
    every = list(range(plugin.device_count())) or None
    for spec in ("auto", -1):
        if _parsed(plugin, spec) != every:
            raise Broken(f"{spec!r} gives {_parsed(plugin, spec)!r}, and there are {plugin.device_count()}")


@TABLE.rule(
    "ACC-110",
    "Zero, negative, doubled and unreadable devices, booleans and None are refused.",
    reason="Each is a mistake; taken silently it trains on other devices than was meant.",
    advice="raise DeviceError for them",
)
def _refuses(bench: Bench) -> None:
    plugin = bench.plugin()
    wrong: Sequence[Any] = (0, "0", -2, [], [0, 0], [-1], "x", "", True, None, 1.5)
    taken = [spec for spec in wrong if _parsed(plugin, spec) is not None]
    if taken:
        raise Broken(f"taken: {', '.join(map(repr, taken))}")


@TABLE.rule(
    "ACC-111",
    "Indices stay in the user's order.",
    reason="The order decides which rank gets which device.",
    advice="don't sort, and don't go through a set",
)
def _order(bench: Bench) -> None:
    found = _parsed(bench.plugin(), [1, 0])
    if found not in (None, [1, 0]):
        raise Broken(f"[1, 0] gives {found!r}")


@TABLE.rule(
    "ACC-112",
    "`devices` gives one `torch.device` of its type for each index, in order, and always the same.",
    reason="A process trains on the device at its local rank.",
    advice="return [torch.device(self.device_type, index) for index in indices]",
)
def _devices(bench: Bench) -> None:
    plugin = bench.plugin()
    indices = _parsed(plugin, "auto") or []
    none, found = plugin.devices([]), plugin.devices(indices)
    if none:
        raise Broken(f"no index gives {none!r}")
    if len(found) != len(indices) or any(type(one) is not torch.device for one in found):
        raise Broken(f"{indices} gives {found!r}")
    if any(one.type != plugin.device_type for one in found) or found != plugin.devices(indices):
        raise Broken(f"{indices} gives {found!r}, and its type is {plugin.device_type!r}")
    if any(one.index not in {None, index} for one, index in zip(found, indices, strict=True)):
        raise Broken(f"{indices} gives {found!r}")
