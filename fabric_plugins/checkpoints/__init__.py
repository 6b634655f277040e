"""Checkpoint formats."""

from typing import TYPE_CHECKING

from fabric_core.lazy import lazy

if TYPE_CHECKING:
    from fabric_plugins.checkpoints.distributed import DistributedCheckpoint
    from fabric_plugins.checkpoints.safetensors import SafetensorsCheckpoint
    from fabric_plugins.checkpoints.single_file import SingleFileCheckpoint

__all__ = ["DistributedCheckpoint", "SafetensorsCheckpoint", "SingleFileCheckpoint"]

__getattr__, __dir__ = lazy(
    __name__,
    {
        "DistributedCheckpoint": "distributed",
        "SafetensorsCheckpoint": "safetensors",
        "SingleFileCheckpoint": "single_file",
    },
)
