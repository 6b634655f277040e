"""Rules for accelerators: what a device does that is set up."""

from typing import Any, Final

import torch

from fabric_core.conformance.bench import Bench, Place
from fabric_core.conformance.rule import Broken, Table

TABLE: Final = Table("accelerator")

_MEMORY: Final = ("allocated", "peak", "total")


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
