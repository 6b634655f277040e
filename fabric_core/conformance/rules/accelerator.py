"""Rules for accelerators."""

from collections.abc import Sequence
from typing import Any, Final

import torch

from fabric_core._torch import DispatchMode
from fabric_core.conformance import cases, snapshot
from fabric_core.conformance.bench import Bench, Place
from fabric_core.conformance.rule import Broken, Level, Table
from fabric_core.errors import DeviceError

TABLE: Final = Table("accelerator")

_FLOATS: Final = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_MEMORY: Final = ("allocated", "peak", "total")
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


def _use(place: Place) -> str | None:
    """Compute on the device between setting it up and tearing it down."""
    plugin = place.plugin()
    device = plugin.devices(plugin.parse_devices(1))[0]
    plugin.setup_device(device)
    x = torch.ones(4, 4, device=device)
    y = x @ x
    plugin.synchronize(device)
    plugin.teardown()
    return None if y.sum().item() == 64.0 else f"a product of ones gives {y.tolist()}"


@TABLE.rule(
    "ACC-114",
    "After `setup_device` its device computes.",
    reason="It is the one thing that an accelerator is for.",
    advice="select and start the device in setup_device",
    needs=("available",),
    inside=False,
)
def _computes(bench: Bench) -> None:
    fault = bench.fresh(_use)
    if fault:
        raise Broken(fault)


def _tear(place: Place, times: str) -> None:
    plugin = place.plugin()
    if times == "unused":
        plugin.teardown()
        return
    device = plugin.devices(plugin.parse_devices(1))[0]
    plugin.setup_device(device)
    plugin.teardown()
    plugin.teardown()
    plugin.setup_device(device)
    plugin.synchronize(device)
    plugin.teardown()


@TABLE.rule(
    "ACC-115",
    "`teardown` may be called without `setup_device`.",
    reason="What failed half-way is torn down too; an error then would hide the cause.",
    advice="let teardown check what there is to release",
)
def _teardown_unused(bench: Bench) -> None:
    bench.run(_tear, "unused")


@TABLE.rule(
    "ACC-116",
    "`teardown` may be called twice, and the device can be set up again after it.",
    reason="A Fabric may be torn down twice, and another one follows in the same process.",
    advice="forget what was released, and acquire it again in setup_device",
    needs=("available",),
)
def _teardown_twice(bench: Bench) -> None:
    bench.run(_tear, "twice")


def _group(place: Place) -> str | None:
    import torch.distributed as dist

    plugin = place.plugin()
    device = plugin.devices(plugin.parse_devices(1))[0]
    plugin.setup_device(device)
    try:
        dist.init_process_group(plugin.process_group_backend, store=dist.HashStore(), rank=0, world_size=1)
        for where in (torch.device("cpu"), device):
            dist.all_reduce(torch.ones(1, device=where))
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        return f"{plugin.process_group_backend!r}: {error}"
    finally:
        plugin.teardown()
    return None


@TABLE.rule(
    "ACC-117",
    "Its process group's backend reduces tensors on its device and on the CPU.",
    reason="Gradients travel on the device, objects and checkpoints on the CPU.",
    advice='name both, as in "cpu:gloo,cuda:nccl"',
    needs=("available",),
    inside=False,
)
def _backend(bench: Bench) -> None:
    fault = bench.fresh(_group)
    if fault:
        raise Broken(fault)


@TABLE.rule(
    "ACC-118",
    "`supports` gives a bool for every type, and True for float32.",
    reason="The plan asks it before a precision is chosen.",
    advice="return dtype in {...}",
)
def _supports(bench: Bench) -> None:
    plugin = bench.plugin()
    for dtype in (*_FLOATS, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn):
        if not isinstance(plugin.supports(dtype), bool):
            raise Broken(f"supports({dtype}) gives {plugin.supports(dtype)!r}")
    if not plugin.supports(torch.float32):
        raise Broken("it doesn't support float32")


def _multiply(place: Place, dtypes: list[torch.dtype]) -> list[str]:
    """Say which types the device can't multiply in."""
    plugin = place.plugin()
    device = plugin.devices(plugin.parse_devices(1))[0]
    plugin.setup_device(device)
    faults = []
    for dtype in dtypes:
        try:
            x = torch.full((2, 2), 2, device=device, dtype=dtype)
            right = bool(((x @ x).to(torch.complex64) == 8).all())
        except (RuntimeError, TypeError):
            right = False
        if not right:
            faults.append(str(dtype))
    plugin.teardown()
    return faults


@TABLE.rule(
    "ACC-119",
    "It computes in every type that it says it supports.",
    reason="A precision that the plan let through must not fail in the first step.",
    advice="take the types out of supports",
    needs=("available",),
)
def _supported_works(bench: Bench) -> None:
    plugin = bench.plugin()
    every = (*_FLOATS, torch.int64, torch.float8_e4m3fn, torch.complex64, torch.bool)
    faults = bench.run(_multiply, [dtype for dtype in every if plugin.supports(dtype)])[0]
    if faults:
        raise Broken(f"it says that it supports {', '.join(faults)}, and can't multiply in it")


@TABLE.rule(
    "ACC-120",
    "It supports every floating-point type of 16 bits and more in which it computes.",
    reason="What is refused for nothing is a precision that users can't have.",
    advice="add the types to supports",
    level=Level.SHOULD,
    needs=("available",),
)
def _unsupported_fails(bench: Bench) -> None:
    plugin = bench.plugin()
    refused = [dtype for dtype in _FLOATS if not plugin.supports(dtype)]
    works = set(map(str, refused)) - set(bench.run(_multiply, refused)[0])
    if works:
        raise Broken(f"it computes in {', '.join(sorted(works))}, and says that it doesn't")


def _peaks(place: Place) -> dict[str, float | None]:
    plugin = place.plugin()
    device = plugin.devices(plugin.parse_devices(1))[0]
    plugin.setup_device(device)
    peaks = {str(dtype): plugin.peak_flops(device, dtype) for dtype in (*_FLOATS, torch.int64)}
    plugin.teardown()
    return peaks


def _stats(place: Place) -> tuple[dict[Any, Any], dict[Any, Any]]:
    """Ask before a large tensor is made, and as long as it is there."""
    plugin = place.plugin()
    device = plugin.devices(plugin.parse_devices(1))[0]
    plugin.setup_device(device)
    before = dict(plugin.memory_stats(device))
    held = torch.ones(_BYTES, dtype=torch.uint8, device=device)
    after = dict(plugin.memory_stats(device))
    del held
    plugin.teardown()
    return before, after


_BYTES: Final = 2**27


@TABLE.rule(
    "ACC-121",
    "`memory_stats` gives bytes under `allocated`, `peak` and `total`, which agree with each other, and follow what is "
    "allocated.",
    reason="Users compare the numbers between kinds of hardware, and plan by them.",
    advice="leave out what isn't known; give whole bytes, of the time of the call",
    needs=("available",),
    inside=False,
)
def _memory(bench: Bench) -> None:
    before, stats = bench.run_apart(_stats)[0]
    if not set(stats) <= set(_MEMORY) or any(type(value) is not int or value < 0 for value in stats.values()):
        raise Broken(f"it gives {stats!r}")
    known = [stats[name] for name in _MEMORY if name in stats]
    if known != sorted(known):
        raise Broken(f"they contradict each other: {stats!r}")
    for name in ("allocated", "peak"):
        if name in stats and stats[name] - before.get(name, 0) < _BYTES // 2:
            raise Broken(f"after {_BYTES} bytes more {name} goes from {before.get(name)} to {stats[name]}")


@TABLE.rule(
    "ACC-122",
    "`peak_flops` gives a positive number or None, for every type.",
    reason="It is what a measured throughput is divided by.",
    advice="give FLOP/s as a float, and None for a device or type that isn't known",
    needs=("available",),
)
def _flops(bench: Bench) -> None:
    peaks = bench.run(_peaks)[0]
    wrong = {name: peak for name, peak in peaks.items() if peak is not None and not (peak > 0 and peak < float("inf"))}
    if wrong:
        raise Broken(f"it gives {wrong!r}")


def _setting_up(place: Place) -> list[str]:
    plugin = place.plugin()
    device = plugin.devices(plugin.parse_devices(1))[0]
    before = snapshot.take()
    plugin.setup_device(device)
    changed = [name for name in snapshot.differences(before) if name not in {"started devices", "threads"}]
    plugin.teardown()
    return changed


@TABLE.rule(
    "ACC-123",
    "`setup_device` leaves PyTorch's settings alone: types, random numbers, modes.",
    reason="A script's results must not depend on what was set behind its back.",
    advice="make such a setting an option of a precision or of the user's script",
    needs=("available",),
)
def _settings(bench: Bench) -> None:
    changed = bench.run(_setting_up)[0]
    if changed:
        raise Broken(f"it changes {', '.join(changed)}")


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
