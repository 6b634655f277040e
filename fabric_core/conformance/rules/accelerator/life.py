"""Rules for accelerators: how a device is set up, and torn down."""

from typing import Final

from fabric_core.conformance import snapshot
from fabric_core.conformance.bench import Bench, Place
from fabric_core.conformance.rule import Broken, Table

TABLE: Final = Table("accelerator")


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
