"""The contract of an accelerator: a kind of hardware."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar, Final

import torch

from fabric_core.contracts._spec import Plugin
from fabric_core.contracts.capabilities import AcceleratorCapabilities
from fabric_core.errors import DeviceError
from fabric_core.markers import behaviour

__all__ = ["Accelerator", "DeviceSpec"]

DeviceSpec = int | str | Sequence[int]
"""How a user names devices: ``"auto"``, ``-1`` (all), a count, indices, or either as text (``"2"``, ``"0,2"``)."""


_ALL: Final = -1

MOST_DEVICES: Final = 65_536
"""More devices, or processes, than this are on no machine."""

_SHOWN: Final = 200
"""How many characters of what was given an error shows."""


class Accelerator(Plugin, ABC):
    """A kind of hardware: which devices there are, and everything that depends on their type.

    Nobody else names a device type: what depends on hardware asks here.
    """

    kind = "accelerator"

    capabilities: ClassVar[AcceleratorCapabilities] = AcceleratorCapabilities()
    """What the accelerator declares."""

    @property
    @abstractmethod
    def device_type(self) -> str:
        """The type of its devices, as ``torch.device`` names it."""

    @property
    @abstractmethod
    def process_group_backend(self) -> str:
        """The process group's backend for its devices, as ``torch.distributed.init_process_group`` takes it.

        It has a part for the CPU too, so that objects and checkpoints can travel.
        """

    @behaviour
    @abstractmethod
    def is_available(self) -> bool:
        """Say whether its devices can be used here. Never raises, and never starts a device."""

    @behaviour
    @abstractmethod
    def device_count(self) -> int:
        """Count the devices that this process can see. Never raises, and never starts a device.

        The count of an accelerator whose devices are as many as one asks for is what ``"auto"`` means for it.
        """

    @behaviour
    def is_started(self) -> bool:
        """Say whether this process has used a device in a way that a process forked from it couldn't. Starts none."""
        return False

    @behaviour
    def parse_devices(self, spec: DeviceSpec) -> list[int]:
        """Turn a user's words into device indices.

        Args:
            spec: The devices of this node, as the user named them.

        Returns:
            At least one index, in the user's order, each once.

        Raises:
            DeviceError: The devices are absent, doubled, negative or zero, or the words can't be parsed.
        """
        return parse_device_indices(spec, self.device_count(), where=f"devices of {type(self).__name__}")

    @behaviour
    @abstractmethod
    def devices(self, indices: Sequence[int]) -> list[torch.device]:
        """Give the device of each index. Starts no device."""

    @behaviour
    def setup_device(self, device: torch.device) -> None:
        """Make ready the device that this process trains on; called once, in the process that uses it."""

    @behaviour
    @abstractmethod
    def supports(self, dtype: torch.dtype) -> bool:
        """Say whether a model trains in a type here: matrix products and their gradients run. Starts no device."""

    @behaviour
    def synchronize(self, device: torch.device) -> None:
        """Wait until the device has done all that was asked of it."""

    @behaviour
    def memory_stats(self, device: torch.device) -> Mapping[str, int]:
        """Give the memory in use now, in bytes, under ``allocated``, ``peak`` and ``total``, as far as known."""
        return {}

    @behaviour
    def peak_flops(self, device: torch.device, dtype: torch.dtype) -> float | None:
        """Give the device's dense arithmetic peak for a type, in FLOP/s; ``None`` where it isn't known."""
        return None

    @behaviour
    def teardown(self) -> None:
        """Release what ``setup_device`` acquired. May be called again, and without ``setup_device``."""


def parse_device_indices(spec: DeviceSpec, count: int, *, where: str, unbounded: bool = False) -> list[int]:
    """Turn a user's words into indices of devices that are numbered from 0.

    Args:
        spec: ``"auto"`` or ``-1`` for all, a count, indices, or either as text.
        count: How many devices there are.
        where: The place that an error names.
        unbounded: There are as many as one asks for, and ``count`` is only what ``"auto"`` means.

    Raises:
        DeviceError: The devices are absent, doubled, negative or zero, or the words can't be parsed.
    """

    def refuse(what: str) -> DeviceError:
        shown = repr(spec)
        return DeviceError(
            what,
            where=where,
            got=shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}...",
            instead='a count (devices=2), indices (devices=[0, 1] or "0,1"), -1 or "auto" for all'
            + ("" if unbounded else f"; there {'is' if count == 1 else 'are'} {count}"),
        )

    there = f"there {'is' if count == 1 else 'are'} {count}"
    parsed = _words(spec)
    if parsed is None:
        raise refuse("devices can't be parsed")
    if isinstance(parsed, list):
        faults = (
            (not parsed, "at least one device is needed"),
            (len(set(parsed)) != len(parsed), "a device is named twice"),
            (min(parsed, default=0) < 0, "a device index can't be negative"),
            (max(parsed, default=0) >= count and not unbounded, f"a device isn't there: {there}"),
            (max(parsed, default=0) >= MOST_DEVICES, f"no machine has more than {MOST_DEVICES:,} devices"),
        )
    else:
        faults = (
            (parsed == 0, "at least one device is needed"),
            (parsed < _ALL, "the number of devices can't be negative"),
            (parsed == _ALL and count == 0, "no device is there"),
            (parsed > count and not unbounded, f"{parsed} devices were asked for, and {there}"),
            (parsed > MOST_DEVICES, f"no machine runs more than {MOST_DEVICES:,} processes"),
        )
    for found, what in faults:
        if found:
            raise refuse(what)
    if isinstance(parsed, list):
        return parsed
    return list(range(count if parsed == _ALL else parsed))


def _words(spec: object) -> int | list[int] | None:
    """Read a count, or indices; ``None`` where it is neither."""
    if isinstance(spec, str):
        if spec.strip().lower() == "auto":
            return _ALL
        try:
            return [int(part) for part in spec.split(",") if part.strip()] if "," in spec else int(spec)
        except ValueError:
            return None
    if isinstance(spec, int) and not isinstance(spec, bool):
        return spec
    if isinstance(spec, Sequence) and all(isinstance(one, int) and not isinstance(one, bool) for one in spec):
        return list(spec)
    return None
