"""Batches, loaders and settings."""

import os
from typing import Any

import torch

from fabric_core.wrapping.dataloader import to_device

__all__ = ["AttributeDict", "move_data_to_device", "suggested_max_num_workers"]


class AttributeDict(dict[str, Any]):
    """A dict whose entries are attributes too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}") from None

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def __delattr__(self, name: str) -> None:
        del self[name]

    def __repr__(self) -> str:
        """Show an entry a line."""
        width = max((len(repr(name)) for name in self), default=0) + 1
        return "\n".join(f"{f'{name!r}:'.ljust(width)} {value!r}" for name, value in self.items())


def move_data_to_device(batch: Any, device: torch.device | str | int) -> Any:
    """Move every tensor of a nested value, and every object that has a method ``to``."""
    return to_device(batch, torch.device(device))


def suggested_max_num_workers(local_world_size: int) -> int:
    """Give the number of workers that each of a node's processes can have for its loaders.

    The cores that this process may use are shared, and one of each process's is left to itself.

    Args:
        local_world_size: The number of processes on this node.

    Raises:
        ValueError: It is less than 1.
    """
    if local_world_size < 1:
        raise ValueError(f"local_world_size must be at least 1, and is {local_world_size}")
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    return max(1, cores // local_world_size - 1)
