"""Divides the data of a loader over ranks: the order of its elements, and what its items draw at random."""

import copy
import sys
from collections.abc import Callable, Sized
from typing import Any, Final

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

from fabric_core.errors import SetupError
from fabric_core.randomness import derived, seed_sources
from fabric_core.wrapping.sampler import DividedSampler, UnrepeatedSampler

__all__ = ["dividing_samplers", "samplers_of", "seed_apart", "shard"]


def samplers_of(loader: Any) -> list[Any]:
    """Give the samplers of a loader, each once."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    found = (getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None))
    return list({id(sampler): sampler for sampler in found if sampler is not None}.values())


def dividing_samplers(loader: Any) -> list[DistributedSampler[Any]]:
    """Give the samplers that read a part of an order that follows a seed."""
    return [one for one in samplers_of(loader) if isinstance(one, DistributedSampler)]


class _SeededWorker:
    """Seeds a worker of a loader as one of this rank, then lets the user's own function run.

    PyTorch has seeded it from the epoch's seed, which every rank may have drawn alike.
    """

    def __init__(self, stream: int, then: Callable[[int], None] | None) -> None:
        self._stream = stream
        self._then = then

    def __call__(self, worker: int) -> None:
        seed_sources(derived(torch.initial_seed(), self._stream))
        if self._then is not None:
            self._then(worker)


def seed_apart(loader: Any, index: int, count: int) -> tuple[Any, int | None]:
    """Let what a loader's items draw at random differ between the parts of the data.

    Args:
        loader: A loader; it is copied where it changes.
        index: Which part it reads.
        count: How many parts there are.

    Returns:
        The loader, and the stream of random numbers for ``FabricDataLoader``.
    """
    if count == 1 or not isinstance(loader, DataLoader):
        return loader, None
    if not loader.num_workers:
        return loader, index
    clone = copy.copy(loader)
    clone.__dict__.update(worker_init_fn=_SeededWorker(index, loader.worker_init_fn), _iterator=None)
    return clone, None


def shard(loader: Any, index: int, count: int, agree: Callable[[int], int], *, repeat: bool = True) -> Any:
    """Make a loader read one of several parts of its data.

    The loader is copied, and only its samplers are other ones, so that its class and whatever it was given are kept.
    One that reads a part already, an iterable dataset, and what is no ``DataLoader``, come back as they are.

    Args:
        loader: The user's loader.
        index: Which part to read.
        count: How many parts there are.
        agree: Gives every rank the number of rank 0. Called where the order is drawn at random.
        repeat: Make the parts equally long, by repeating the first elements; else none is repeated.

    Raises:
        SetupError: It keeps its samplers where they can't be replaced. Or without repeating, a part would have nothing,
            or the loader's own sampler repeats.
    """
    if count == 1 or not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return loader
    if dividing_samplers(loader):
        _check_own_sampler(loader, repeat=repeat)
        return loader
    batch_sampler: Any = loader.batch_sampler
    own_batches = loader.batch_size is None and type(batch_sampler) not in {BatchSampler, type(None)}
    sampler = getattr(batch_sampler, "sampler", None) if loader.batch_size is None and batch_sampler else loader.sampler
    divided = batch_sampler if own_batches else sampler
    part = _part(divided, loader, index, count, agree, repeat=repeat)
    changes: dict[str, Any] = {"_iterator": None}
    if own_batches:
        changes["batch_sampler"] = part
    else:
        changes["sampler"] = part
        if batch_sampler is not None:
            changes["batch_sampler"] = type(batch_sampler)(part, batch_sampler.batch_size, batch_sampler.drop_last)
    olds = (batch_sampler,) if own_batches else (sampler, loader.sampler, batch_sampler)
    attributes = vars(loader)
    kept = [
        name
        for name, value in attributes.items()
        if name not in changes and value is not None and any(value is old for old in olds)
    ]
    if kept or not changes.keys() <= attributes.keys():
        raise SetupError(
            f"{type(loader).__name__} keeps its samplers in other places than a DataLoader does",
            where=f"setup_dataloaders, over {count} ranks",
            got=", ".join(kept) or "a sampler that is no plain attribute",
            instead=_CURE,
        )
    clone = copy.copy(loader)
    # Past `DataLoader.__setattr__`, which refuses to change a loader: this one is new, and nobody has seen it.
    clone.__dict__.update(changes)
    return clone


def _check_own_sampler(loader: DataLoader[Any], *, repeat: bool) -> None:
    """Refuse PyTorch's own sampler of a part, which repeats, where nothing may be repeated; another one may not."""
    repeating = [one for one in dividing_samplers(loader) if type(one) is DistributedSampler and not one.drop_last]
    if repeating and not repeat:
        raise SetupError(
            "the loader's own DistributedSampler repeats samples",
            where="setup_dataloaders(repeat_samples=False)",
            instead="a loader without it, which setup_dataloaders divides",
        )


def _part(
    sampler: Any, loader: DataLoader[Any], index: int, count: int, agree: Callable[[int], int], *, repeat: bool
) -> DistributedSampler[Any]:
    """Divide the order of a loader, which one of its samplers draws.

    What it draws follows the seed of the sampler's own generator, or PyTorch's: rank 0's, for ranks may be seeded
    differently.
    """
    drop_last = bool(getattr(loader if loader.batch_sampler is None else loader.batch_sampler, "drop_last", False))
    repeat = repeat or drop_last  # nothing is repeated then
    if not repeat and isinstance(sampler, Sized) and len(sampler) < count:
        raise SetupError(
            f"{count} ranks can't share {len(sampler)} without repeating any",
            where="setup_dataloaders(repeat_samples=False)",
            got=f"a {type(sampler).__name__} of length {len(sampler)}",
            instead="at least one for each rank, or repeat_samples=True",
        )
    shuffled = _shuffles(sampler, loader.dataset)
    seed = 0
    if shuffled is not False:
        generator = getattr(sampler, "generator", None)
        seed = agree((generator if isinstance(generator, torch.Generator) else torch).initial_seed() % _SEEDS)
    if shuffled is None:
        return DividedSampler(sampler, count, index, drop_last=drop_last, seed=seed, repeat=repeat)
    kind = DistributedSampler if repeat else UnrepeatedSampler
    return kind(loader.dataset, count, index, shuffle=shuffled, drop_last=drop_last, seed=seed)


_SEEDS: Final = 2**62
"""Room for the numbers of epochs below the largest seed."""


_CURE: Final = "a sampler that reads one rank's part (DistributedSampler), or use_distributed_sampler=False"


def _shuffles(sampler: Any, dataset: object) -> bool | None:
    """Say whether a sampler shuffles; ``None`` where its order is neither the dataset's nor a shuffle of all of it."""
    size = len(dataset) if isinstance(dataset, Sized) else None
    if size is None or getattr(sampler, "data_source", None) is not dataset:
        return None
    if type(sampler) is SequentialSampler:
        return False
    if type(sampler) in _random_samplers() and not sampler.replacement and sampler.num_samples == size:
        return True
    return None


def _random_samplers() -> set[Callable[..., Any]]:
    """Give the classes of plain shuffles; a loader of torchdata's has one of its own, with the same attributes."""
    torchdata = sys.modules.get("torchdata.stateful_dataloader.sampler")
    return {RandomSampler} if torchdata is None else {RandomSampler, torchdata.RandomSampler}
