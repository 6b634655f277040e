"""Accelerators: kinds of hardware."""

from typing import TYPE_CHECKING

from fabric_core.lazy import lazy

if TYPE_CHECKING:
    from fabric_plugins.accelerators.cpu import CPUAccelerator

__all__ = ["CPUAccelerator"]

__getattr__, __dir__ = lazy(__name__, {"CPUAccelerator": "cpu"})
