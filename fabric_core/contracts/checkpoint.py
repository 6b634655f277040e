"""The contract of a checkpoint format: writes and reads a state tree."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Final

import torch

from fabric_core.collectives import Collectives
from fabric_core.contracts._spec import Plugin
from fabric_core.contracts.capabilities import CheckpointCapabilities
from fabric_core.errors import CheckpointError
from fabric_core.markers import behaviour

__all__ = ["ABOUT", "Checkpoint"]

ABOUT: Final = "fabric.about"
"""The entry of a tree that says what a checkpoint is of: plan, world and versions, as plain values.

A format may keep it elsewhere, such as in a manifest; then ``describe`` gives it and ``read`` leaves it out.
"""


class Checkpoint(Plugin, ABC):
    """Writes and reads a state tree: nested dicts, lists and tuples of tensors and plain values.

    A checkpoint is there whole or not at all. Reading one runs no code, and opens nothing outside of it. One whose
    bytes have changed since it was written is damaged: a format keeps checksums. A path is a ``pathlib.Path``; where
    ``remote`` is declared it may also be the text of a URL, such as ``"s3://bucket/name"``, at which everything goes as
    at a path; a scheme that the format doesn't know raises ``NotInstalledError``.

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
    def recognises(self, path: Any) -> bool:
        """Say whether what lies at the path looks like this format. Never raises, reads little."""

    @behaviour
    @abstractmethod
    def write(self, path: Any, tree: Mapping[str, Any]) -> None:
        """Write a state tree, by one process alone.

        Raises:
            CheckpointError: It can't be written, or has an entry, which the error names, that ``read`` would not give
                back, or need code for; what lay at the path before is still there.
        """

    @behaviour
    def write_sharded(self, path: Any, tree: Mapping[str, Any], collectives: Collectives) -> None:
        """Write a state tree by all ranks at once, each its own parts; needed where ``sharded`` is declared.

        Args:
            path: Where to; the same on every rank.
            tree: The same keys on every rank; a ``DTensor`` is written in parts, anything else as rank 0 has it.
            collectives: Those of all ranks, which nothing else uses meanwhile.

        Raises:
            CheckpointError: As for ``write``, and on every rank where one failed; of keys that aren't the same it names
                one.
        """
        raise NotImplementedError

    @behaviour
    def outline(self, path: Any) -> dict[str, Any]:
        """Say what a checkpoint holds: its tree, whose tensors may be on the meta device.

        Raises:
            CheckpointError: As for ``read``.
        """
        return self.read(path, None)

    @behaviour
    def check(self, path: Any, into: Mapping[str, Any] | None) -> None:
        """Make sure that ``read`` with the same arguments would give what was written; changes nothing.

        It is called where ``read`` fills tensors in place, so that a damaged checkpoint is found before.

        Raises:
            CheckpointError: As for ``read``.
        """

    @behaviour
    @abstractmethod
    def read(self, path: Any, into: Mapping[str, Any] | None) -> dict[str, Any]:
        """Read a state tree; on every rank.

        Args:
            path: Where it lies.
            into: The tree to fill where ``sharded`` is declared: its tensors say which parts this rank needs, and are
                filled in place; one on the meta device is not needed, and stays so. What it lacks is read whole;
                ``None`` reads everything, whole.

        Raises:
            CheckpointError: There is nothing, or it is damaged, or it needs code to be read.
        """

    @behaviour
    def read_trusted(self, path: Any) -> dict[str, Any]:
        """Read everything, pickled objects included, whose code runs: for a file that the user trusts.

        Leave it as it is where the format recognises no file that may hold objects.

        Raises:
            CheckpointError: There is nothing, or it is damaged.
        """
        return self.read(path, None)

    @behaviour
    def tensors(self, path: Any) -> Iterator[tuple[tuple[Any, ...], torch.Tensor]]:
        """Give the tensors one after another, whole, each with its key path through the tree; for tools.

        Raises:
            CheckpointError: As for ``read``.
        """
        yield from walk_tensors(self.read(path, None))

    @behaviour
    def describe(self, path: Any) -> dict[str, Any]:
        """Give what the checkpoint says about itself: at least the entry ``ABOUT``, where it has one; empty otherwise.

        Raises:
            CheckpointError: As for ``read``.
        """
        about = self.outline(path).get(ABOUT)
        return {} if about is None else {ABOUT: about}

    @behaviour
    def names_beside(self, path: Any) -> list[str]:
        """List the names in the folder of a path, for ``folder/latest`` and ``keep=``; none where there is no folder.

        Raises:
            CheckpointError: The folder can't be listed.
        """
        folder = Path(path).parent
        try:
            return sorted(one.name for one in folder.iterdir()) if folder.is_dir() else []
        except OSError as error:
            raise CheckpointError(f"the folder can't be listed: {error}", where=str(folder)) from error

    @behaviour
    def remove(self, path: Any) -> None:
        """Delete a checkpoint that this format recognises, and nothing else.

        Raises:
            CheckpointError: It is no checkpoint of this format, or can't be deleted.
        """
        raise CheckpointError("this format can't delete checkpoints", where=str(path), got=type(self).__name__)


def walk_tensors(tree: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], torch.Tensor]]:
    """Give every tensor of nested mappings, lists and tuples with its key path."""
    if isinstance(tree, torch.Tensor):
        yield above, tree
    elif isinstance(tree, Mapping):
        for name, value in tree.items():
            yield from walk_tensors(value, (*above, name))
    elif isinstance(tree, list | tuple):
        for index, value in enumerate(tree):
            yield from walk_tensors(value, (*above, index))
