"""The wrapped data loader: its batches come on the device, and each rank reads its own part."""

from collections.abc import Iterator, Sized
from typing import Any

import torch
from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

from fabric_core.contracts import map_tensors
from fabric_core.errors import SetupError

__all__ = ["FabricDataLoader"]


class FabricDataLoader:
    """A data loader that was set up. Everything but iteration is the original's.

    Args:
        loader: The loader, as the strategy and the wrappers made it.
        device: Where batches go; ``None`` leaves them.
    """

    def __init__(self, loader: Any, device: torch.device | None) -> None:
        self.__dict__.update(_fabric_inner=loader, _fabric_device=device, _fabric_epoch=0)

    @property
    def device(self) -> torch.device | None:
        """Where batches go."""
        device: torch.device | None = self.__dict__["_fabric_device"]
        return device

    def __len__(self) -> int:
        """Count the batches of this rank."""
        return len(self.__dict__["_fabric_inner"])

    def __iter__(self) -> Iterator[Any]:
        """Give this epoch's batches, on the device."""
        own = self.__dict__
        inner, device = own["_fabric_inner"], own["_fabric_device"]
        for sampler in (
            getattr(inner, "sampler", None),
            getattr(getattr(inner, "batch_sampler", None), "sampler", None),
        ):
            if sampler is not None and hasattr(sampler, "set_epoch"):
                sampler.set_epoch(own["_fabric_epoch"])
        own["_fabric_epoch"] += 1
        for batch in inner:
            yield batch if device is None else to_device(batch, device)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_fabric_inner"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.__dict__["_fabric_inner"], name, value)


def to_device(data: Any, device: torch.device) -> Any:
    """Move every tensor of a nested value; what is there already is the very same object."""
    return map_tensors(data, lambda tensor: tensor.to(device, non_blocking=tensor.is_pinned()))


def shard(loader: Any, index: int, count: int) -> Any:
    """Make a loader read one of several parts of its data.

    Raises:
        SetupError: It can't be rebuilt with another sampler.
    """
    if count == 1 or not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return loader
    if isinstance(loader.sampler, DistributedSampler):
        return loader
    if not isinstance(loader.sampler, RandomSampler | SequentialSampler) or not isinstance(loader.dataset, Sized):
        raise SetupError(
            f"a loader with the sampler {type(loader.sampler).__name__} can't be divided over {count} ranks",
            where="setup_dataloaders",
            instead="give it a sampler that reads one rank's part, and use_distributed_sampler=False",
        )
    sampler: DistributedSampler[Any] = DistributedSampler(
        loader.dataset,
        num_replicas=count,
        rank=index,
        shuffle=isinstance(loader.sampler, RandomSampler),
        drop_last=loader.drop_last,
    )
    return DataLoader(
        loader.dataset,
        batch_size=loader.batch_size,
        sampler=sampler,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        drop_last=loader.drop_last,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=loader.generator,
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers,
    )
