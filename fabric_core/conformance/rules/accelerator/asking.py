"""Rules for accelerators: what they say of a machine and of themselves."""

from typing import Any, Final

import torch

from fabric_core._torch import DispatchMode
from fabric_core.conformance.bench import Bench, Place
from fabric_core.conformance.rule import Broken, Table

TABLE: Final = Table("accelerator")

_START_METHODS: Final = frozenset({"spawn", "fork", "forkserver"})


class _Recorder(DispatchMode):
    """Records tensor operations: no question about devices needs one."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def _ask(plugin: Any) -> None:
    plugin.is_available()
    plugin.device_count()
    plugin.supports(torch.float32)
    plugin.device_type  # noqa: B018 - asked
    plugin.process_group_backend  # noqa: B018 - asked
    if plugin.is_available():
        plugin.devices(plugin.parse_devices("auto"))


def _starts(place: Place) -> tuple[list[str], bool]:
    with _Recorder() as recorder:
        _ask(place.plugin())
    return recorder.seen, torch.cuda.is_initialized()


@TABLE.rule(
    "ACC-101",
    "`is_available` gives a bool and never raises.",
    reason="The automatic choice asks every accelerator, on machines without the hardware or its driver too.",
    advice="catch what the driver raises, and return False",
)
def _available(bench: Bench) -> None:
    answer = bench.plugin().is_available()
    if not isinstance(answer, bool):
        raise Broken(f"it gives {answer!r}")


@TABLE.rule(
    "ACC-102",
    "No question starts a device: availability, count, types, backend, parsing and naming run no tensor operation.",
    reason="A process that has started a device can't fork, and holds memory on it.",
    advice="ask the driver's management library instead of making a tensor; start devices in setup_device",
    inside=False,
)
def _asking_starts_nothing(bench: Bench) -> None:
    seen, started = bench.fresh(_starts)
    if seen or started:
        raise Broken(f"asking ran {', '.join(seen[:3]) or 'a driver call that started a device'}")


@TABLE.rule(
    "ACC-103",
    "`device_count` gives a whole number of at least zero, and the same one again.",
    reason="The plan counts processes by it on every rank.",
    advice="count the visible devices, and catch what the driver raises",
)
def _count(bench: Bench) -> None:
    plugin = bench.plugin()
    counts = [plugin.device_count(), plugin.device_count()]
    if counts[0] != counts[1] or isinstance(counts[0], bool) or not isinstance(counts[0], int) or counts[0] < 0:
        raise Broken(f"it gives {counts[0]!r}, then {counts[1]!r}")


@TABLE.rule(
    "ACC-104",
    "It is available exactly where it has a device.",
    reason="An accelerator that is chosen and has no device fails later, with a worse message.",
    advice="let is_available and device_count ask the same source",
)
def _available_means_devices(bench: Bench) -> None:
    plugin = bench.plugin()
    if plugin.is_available() != (plugin.device_count() > 0):
        raise Broken(f"available: {plugin.is_available()}, devices: {plugin.device_count()}")


@TABLE.rule(
    "ACC-113",
    "Its device type is one that PyTorch knows.",
    reason="It becomes a `torch.device`, an autocast's argument and a mesh's type.",
    advice='give the name alone, as in "cuda"; a private backend is renamed before',
)
def _device_type(bench: Bench) -> None:
    name = bench.plugin().device_type
    try:
        known = torch.device(name).type == name
    except (RuntimeError, TypeError) as error:
        raise Broken(f"PyTorch refuses {name!r}: {error}") from error
    if not known:
        raise Broken(f"{name!r} is a device, not a type")


@TABLE.rule(
    "ACC-124",
    "The start methods that it declares are among spawn, fork and forkserver, and at least one.",
    reason="A launcher chooses among them.",
    advice="name those that multiprocessing knows",
)
def _start_methods(bench: Bench) -> None:
    declared = bench.declared.get("start_methods", frozenset())
    if not declared or not declared <= _START_METHODS:
        raise Broken(f"it declares {sorted(declared)}")


TABLE.untested(
    "ACC-125",
    "A device that the parent has used stays usable in a child started by each declared start method.",
    reason="A training may use a device before it launches. The kit doesn't leave devices in such a state.",
    advice="take the start method out of the capabilities",
)
