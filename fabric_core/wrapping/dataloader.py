"""The wrapped data loader: its batches come on the device, and each rank reads its own part."""

import copy
import sys
from collections.abc import Callable, Iterator, Mapping, Sized
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

from fabric_core.contracts import map_tensors
from fabric_core.errors import CheckpointError, SetupError
from fabric_core.randomness import derived, kept, random_state, seed_sources, set_random_state
from fabric_core.wrapping.sampler import DividedSampler, UnrepeatedSampler

__all__ = ["FabricDataLoader", "seed_apart", "shard", "to_device"]

_END: Final = object()


class FabricDataLoader(DataLoader[Any]):
    """A data loader that was set up. Everything but iteration and state is the original's.

    [Note: epochs] Each iteration is an epoch, and samplers that shuffle by epoch are told its number. A number that the
    user set on the sampler since the last iteration wins, and counting goes on from it.

    Args:
        loader: The loader, as the strategy and the wrappers made it.
        device: Where batches go; ``None`` leaves them.
        original: The user's own loader.
        stream: Which of several streams of random numbers the items draw from, where this process makes them itself;
            ``None`` is the process's own.
    """

    _fabric_inner: Any
    _fabric_device: torch.device | None
    _fabric_original: Any
    _fabric_stream: int | None
    _fabric_epoch: int
    _fabric_told: int
    _fabric_yielded: int
    _fabric_random: dict[str, Any]
    _fabric_resume: Mapping[str, Any] | None

    def __init__(self, loader: Any, device: torch.device | None, original: Any, stream: int | None = None) -> None:
        # Not `DataLoader.__init__`: it would make a second set of samplers, workers and checks.
        epoch = next((sampler.epoch for sampler in _epoch_samplers(loader) if _counts(sampler)), 0)
        self.__dict__.update(
            _fabric_inner=loader,
            _fabric_device=device,
            _fabric_original=original,
            _fabric_stream=stream,
            _fabric_epoch=epoch,
            _fabric_told=epoch,
            _fabric_yielded=0,
            _fabric_random={},
            _fabric_resume=None,
        )

    @property
    def dataloader(self) -> Any:
        """The user's own loader."""
        return self._fabric_original

    @property
    def device(self) -> torch.device | None:
        """Where batches go."""
        return self._fabric_device

    def __len__(self) -> int:
        """Count the batches of this rank."""
        return len(self._fabric_inner)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Give this epoch's batches, on the device; from the middle, where ``load_state_dict`` said so."""
        own, inner = self.__dict__, self._fabric_inner
        resume, own["_fabric_resume"] = self._fabric_resume, None
        skipped = 0
        if resume is not None:
            own.update(_fabric_epoch=resume["epoch"])
            skipped = resume["batches"]
        else:
            changed = [one.epoch for one in _epoch_samplers(inner) if _counts(one) and one.epoch != self._fabric_told]
            own.update(_fabric_epoch=changed[0] if changed else self._fabric_epoch + bool(self._fabric_yielded))
        for sampler in _epoch_samplers(inner):
            sampler.set_epoch(self._fabric_epoch)
        own.update(_fabric_told=self._fabric_epoch, _fabric_yielded=skipped)
        if resume is None or "loader" in resume or not skipped:
            own["_fabric_random"] = _random_state(inner)
            batches = _begun(inner, self._fabric_stream)
        else:
            own["_fabric_random"] = dict(resume["random"])
            batches = _skipped(inner, self._fabric_stream, skipped, resume["random"])
        return self._fabric_counted(self._fabric_placed(batches))

    def _fabric_placed(self, batches: Iterator[Any]) -> Iterator[Any]:
        device = self._fabric_device
        if device is None:
            return batches
        # A loader with a state of its own must not be ahead of what its user has seen.
        if _has_streams(device) and not _stateful(self._fabric_inner):
            return _prefetched(batches, device)
        return (to_device(batch, device) for batch in batches)

    def _fabric_counted(self, batches: Iterator[Any]) -> Iterator[Any]:
        own = self.__dict__
        for batch in batches:
            own["_fabric_yielded"] += 1
            yield batch
        own["_fabric_epoch"] += 1
        own["_fabric_yielded"] = 0

    def state_dict(self) -> dict[str, Any]:
        """Give the place in the data: epoch, batches read, and what the order depends on."""
        state: dict[str, Any] = {"epoch": self._fabric_epoch, "batches": self._fabric_yielded}
        seeds = _seeds(self._fabric_inner)
        if seeds:
            state["seeds"] = seeds
        if _stateful(self._fabric_inner):
            return {**state, "loader": self._fabric_inner.state_dict()}
        return {**state, "random": dict(self._fabric_random) if self._fabric_yielded else {}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next iteration go on where ``state_dict`` was asked.

        A loader with a state of its own goes there by itself. For any other, the epoch's order is drawn again and the
        batches that were read are read again and dropped; what else draws random numbers is left as it is.

        Raises:
            CheckpointError: It is no state of this sort of loader.
        """
        stateful = _stateful(self._fabric_inner)
        wanted = {"epoch", "batches", "loader" if stateful else "random"}
        if set(state) - {"seeds"} != wanted:
            raise CheckpointError(
                "this is no state of such a data loader",
                where="load_state_dict",
                got=", ".join(map(str, state)),
                instead=f"the state of the same sort of loader: {', '.join(sorted(wanted))}",
            )
        for sampler, seed in zip(_seeded(self._fabric_inner), state.get("seeds", ()), strict=False):
            sampler.seed = seed
        if stateful:
            self._fabric_inner.load_state_dict(state["loader"])
        self.__dict__["_fabric_resume"] = state

    def __getattr__(self, name: str) -> Any:
        return getattr(self._fabric_inner, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._fabric_inner, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self._fabric_inner, name)

    def __dir__(self) -> list[str]:
        """Name the original's attributes and the wrapper's own."""
        return sorted({*dir(self._fabric_inner), "dataloader", "device", "state_dict", "load_state_dict"})

    def __repr__(self) -> str:
        """Show the original."""
        return f"FabricDataLoader({self._fabric_inner!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle and copy with the place in the data."""
        return _rebuild, (dict(self.__dict__),)


def _rebuild(own: dict[str, Any]) -> FabricDataLoader:
    wrapped = FabricDataLoader.__new__(FabricDataLoader)
    wrapped.__dict__.update(own)
    return wrapped


def _shown(name: str) -> property:
    return property(lambda self: getattr(self._fabric_inner, name))


# What DataLoader's class has would be found on the wrapper, before `__getattr__` is asked.
for _name in list(vars(DataLoader)):
    if not _name.startswith("__") and _name not in vars(FabricDataLoader):
        setattr(FabricDataLoader, _name, _shown(_name))


def to_device(data: Any, device: torch.device) -> Any:
    """Move every tensor of a nested value, and every object that has a method ``to``.

    What is there already is the very same object. A tensor in pinned memory is copied without waiting.
    """

    def move(tensor: torch.Tensor) -> torch.Tensor:
        return tensor if tensor.device == device else tensor.to(device, non_blocking=tensor.is_pinned())

    def move_object(value: Any) -> Any:
        to = None if isinstance(value, type) else getattr(value, "to", None)
        return to(device) if callable(to) else value

    return map_tensors(data, move, move_object)


def _has_streams(device: torch.device) -> bool:
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator is not None and accelerator.type == device.type


def _prefetched(batches: Iterator[Any], device: torch.device) -> Iterator[Any]:
    """Copy the next batch on a stream of its own while the current one is computed with."""
    stream = torch.Stream(device)

    def fetch() -> Any:
        batch = next(batches, _END)
        if batch is _END:
            return _END
        # The copy may take memory that an earlier batch released, so what used that batch must be through with it.
        # Only this keeps every object safe, whatever tensors it hides.
        stream.wait_stream(torch.accelerator.current_stream(device))
        with stream:
            return to_device(batch, device)

    upcoming = fetch()
    while upcoming is not _END:
        torch.accelerator.current_stream(device).wait_stream(stream)
        ready, upcoming = upcoming, fetch()
        yield ready


def _stateful(loader: Any) -> bool:
    return callable(getattr(loader, "state_dict", None)) and callable(getattr(loader, "load_state_dict", None))


def _samplers(loader: Any) -> list[Any]:
    """Give the samplers of a loader, each once."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    found = (getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None))
    return list({id(sampler): sampler for sampler in found if sampler is not None}.values())


def _epoch_samplers(loader: Any) -> list[Any]:
    return [sampler for sampler in _samplers(loader) if callable(getattr(sampler, "set_epoch", None))]


def _seeded(loader: Any) -> list[DistributedSampler[Any]]:
    """Give the samplers that read a part of an order that follows a seed."""
    return [one for one in _samplers(loader) if isinstance(one, DistributedSampler)]


def _seeds(loader: Any) -> list[int]:
    return [one.seed for one in _seeded(loader)]


def _counts(sampler: Any) -> bool:
    return isinstance(getattr(sampler, "epoch", None), int)


def _generators(loader: Any) -> list[torch.Generator]:
    found = [getattr(one, "generator", None) for one in (loader, *_samplers(loader))]
    return list({id(one): one for one in found if isinstance(one, torch.Generator)}.values())


def _random_state(loader: Any) -> dict[str, Any]:
    """Give what an epoch that begins now will be drawn from."""
    state = random_state()
    state.pop("device", None)
    return {"sources": state, "generators": [generator.get_state() for generator in _generators(loader)]}


def _begun(loader: Any, stream: int | None) -> Iterator[Any]:
    """Begin an epoch.

    Args:
        loader: The loader.
        stream: As for ``FabricDataLoader``.
    """
    if stream is None:
        return iter(loader)
    seed = derived(int(torch.empty((), dtype=torch.int64).random_().item()), stream)
    return _drawn_apart(iter(loader), seed)


def _drawn_apart(batches: Iterator[Any], seed: int) -> Iterator[Any]:
    """Let the making of batches draw from random numbers of its own."""
    state: dict[str, Any] | None = None
    while True:
        with kept():
            if state is None:
                seed_sources(seed)
            else:
                set_random_state(state)
            batch = next(batches, _END)
            state = random_state()
            state.pop("device", None)
        if batch is _END:
            return
        yield batch


def _skipped(loader: Any, stream: int | None, count: int, random: Mapping[str, Any]) -> Iterator[Any]:
    """Begin an epoch as it was begun before, and pass over its first batches."""
    with kept():
        set_random_state(random["sources"])
        for generator, state in zip(_generators(loader), random["generators"], strict=True):
            generator.set_state(state)
        batches = _begun(loader, stream)
        for _ in range(count):
            if next(batches, _END) is _END:
                raise CheckpointError(
                    f"the epoch ends before batch {count}, where the state was saved",
                    where="load_state_dict of a data loader",
                    instead="the same data, batch size and number of ranks as when it was saved",
                )
    return batches


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
    if _seeded(loader):
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
    repeating = [one for one in _seeded(loader) if type(one) is DistributedSampler and not one.drop_last]
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
