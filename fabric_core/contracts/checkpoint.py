"""The contract of a checkpoint format: writes and reads a state tree."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from fabric_core.contracts._spec import Plugin
from fabric_core.contracts.capabilities import CheckpointCapabilities
from fabric_core.markers import behaviour

__all__ = ["Checkpoint"]


class Checkpoint(Plugin, ABC):
    """Writes and reads a state tree: nested dicts of tensors and plain values.

    A checkpoint is there whole or not at all. Reading one runs no code.

    Kept are every tensor's values bit for bit (infinities and the bits of a NaN too), its type and its shape, and plain
    values, numbers for keys and tuples. Not kept need be strides, devices, ``requires_grad`` and
    views. Tensors that shared memory come back equal, shared or apart;
    those that did not share it never do, however equal they are.
    """

    kind = "checkpoint"

    capabilities: ClassVar[CheckpointCapabilities] = CheckpointCapabilities()
    """What the format declares."""

    @behaviour
    @abstractmethod
    def recognises(self, path: Path) -> bool:
        """Say whether what lies at the path looks like this format. Never raises, reads little."""

    @behaviour
    @abstractmethod
    def write(self, path: Path, tree: Mapping[str, Any]) -> None:
        """Write a state tree; on rank 0 alone, or on every rank at once where ``sharded`` is declared.

        Raises:
            CheckpointError: It can't be written, or holds what ``read`` would need code for; what lay at the path
                before is still there.
        """

    @behaviour
    def outline(self, path: Path) -> dict[str, Any]:
        """Say what a checkpoint holds: its tree, whose tensors may be on the meta device.

        Raises:
            CheckpointError: As for ``read``.
        """
        return self.read(path, None)

    @behaviour
    @abstractmethod
    def read(self, path: Path, into: Mapping[str, Any] | None) -> dict[str, Any]:
        """Read a state tree; on every rank.

        Args:
            path: Where it lies.
            into: The tree to fill where ``sharded`` is declared: its tensors say which parts this rank needs, and are
                filled in place. What it lacks is read whole; ``None`` reads everything, whole.

        Raises:
            CheckpointError: There is nothing, or it is damaged, or it needs code to be read.
        """
