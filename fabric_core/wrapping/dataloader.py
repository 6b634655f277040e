"""The wrapped data loader: its batches come on the device, and each rank reads its own part."""

from collections.abc import Iterator, Mapping
from typing import Any, Final

import torch
from torch.utils.data import (
    DataLoader,
)

from fabric_core.contracts import map_tensors
from fabric_core.errors import CheckpointError
from fabric_core.randomness import derived, kept, random_state, seed_sources, set_random_state
from fabric_core.wrapping.dividing import dividing_samplers, samplers_of

__all__ = ["FabricDataLoader", "to_device"]

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
        for sampler, seed in zip(dividing_samplers(self._fabric_inner), state.get("seeds", ()), strict=False):
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


def _epoch_samplers(loader: Any) -> list[Any]:
    return [sampler for sampler in samplers_of(loader) if callable(getattr(sampler, "set_epoch", None))]


def _seeds(loader: Any) -> list[int]:
    return [one.seed for one in dividing_samplers(loader)]


def _counts(sampler: Any) -> bool:
    return isinstance(getattr(sampler, "epoch", None), int)


def _generators(loader: Any) -> list[torch.Generator]:
    found = [getattr(one, "generator", None) for one in (loader, *samplers_of(loader))]
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
