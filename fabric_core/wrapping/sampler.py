"""Divides any sampler over ranks."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, Final

import numpy as np
import torch
from torch.utils.data import DistributedSampler

__all__ = ["DividedSampler", "UnrepeatedSampler"]

_CHUNK: Final = 4096
"""How many indices are drawn at once: an endless sampler is not drawn to its end."""
_SEEDS: Final = 2**32
"""NumPy's legacy state takes seeds below this."""


class UnrepeatedSampler(DistributedSampler[Any]):
    """PyTorch's ``DistributedSampler``, but the first parts may be longer by one, and no element is repeated."""

    def __init__(self, dataset: Any, num_replicas: int, rank: int, **options: Any) -> None:
        super().__init__(dataset, num_replicas, rank, **options)
        self.total_size = len(dataset)
        self.num_samples = len(range(rank, self.total_size, num_replicas))


class DividedSampler(DistributedSampler[Any]):
    """One rank's part of what a sampler draws: indices, or batches of them.

    Every rank draws the whole order from one seed, and takes every ``num_replicas``-th element. The seed reaches all
    that a sampler can draw from: PyTorch's, NumPy's and Python's own random numbers, and the generators that are
    attributes of the sampler. Each is put back after each draw, so that ranks may be seeded differently, and draw other
    numbers in between.

    Args:
        sampler: What draws indices or batches; left as it is.
        num_replicas: How many parts there are.
        rank: Which part this is.
        drop_last: Leave out what doesn't divide evenly; else the first elements are repeated, with ``repeat``.
        seed: The same on every rank; each epoch adds its number.
        repeat: Make the parts equally long.
    """

    def __init__(
        self, sampler: Any, num_replicas: int, rank: int, *, drop_last: bool, seed: int, repeat: bool = True
    ) -> None:
        # Not `DistributedSampler.__init__`: it wants a data set whose length is known.
        self.sampler = sampler
        self.dataset = sampler
        self.num_replicas = num_replicas
        self.rank = rank
        self.drop_last = drop_last
        self.repeat = repeat
        self.shuffle = False
        self.seed = seed
        self._epoch = 0

    @property
    def epoch(self) -> int:  # type: ignore[override] # a plain attribute there
        """The number that is added to the seed; the sampler's own, where it counts epochs itself."""
        own = getattr(self.sampler, "epoch", None)
        return own if isinstance(own, int) else self._epoch

    def set_epoch(self, epoch: int) -> None:
        """Take the number of the next epoch, and tell the sampler."""
        self._epoch = epoch
        tell = getattr(self.sampler, "set_epoch", None)
        if callable(tell):
            tell(epoch)

    def __len__(self) -> int:
        """Count the elements of this part."""
        whole, rest = divmod(len(self.sampler), self.num_replicas)
        if not self.repeat:
            return whole + (self.rank < rest)
        return whole if self.drop_last or not rest else whole + 1

    def __iter__(self) -> Iterator[Any]:
        """Draw this part."""
        first: list[Any] = []
        part: list[Any] = []
        for element in self._drawn():
            if len(first) < self.num_replicas:
                first.append(element)
            part.append(element)
            if len(part) == self.num_replicas:
                yield part[self.rank]
                part = []
        if not self.repeat:
            yield from part[self.rank : self.rank + 1]
        elif part and not self.drop_last:
            while len(part) < self.num_replicas:
                part.extend(first[: self.num_replicas - len(part)])
            yield part[self.rank]

    def _drawn(self) -> Iterator[Any]:
        """Draw the whole order, which is the same on every rank."""
        sources = _sources(self.sampler)
        states: list[Any] = []
        seed = (self.seed + self.epoch) % _SEEDS
        with _kept(sources):
            for source in sources:
                source.seed(seed)
            drawn = iter(self.sampler)
            states = [source.state() for source in sources]
        while True:
            with _kept(sources):
                for source, state in zip(sources, states, strict=True):
                    source.restore(state)
                chunk = list(islice(drawn, _CHUNK))
                states = [source.state() for source in sources]
            if not chunk:
                return
            yield from chunk


class _Source:
    """Something that random numbers are drawn from."""

    def __init__(
        self, state: Callable[[], Any], restore: Callable[[Any], object], seed: Callable[[int], object]
    ) -> None:
        self.state = state
        self.restore = restore
        self.seed = seed


def _sources(sampler: Any) -> list[_Source]:
    """Give what a sampler can draw from: the global sources, and its own."""
    found = [
        _Source(torch.get_rng_state, torch.set_rng_state, torch.default_generator.manual_seed),
        _Source(np.random.get_state, np.random.set_state, np.random.seed),
        _Source(random.getstate, random.setstate, random.seed),
    ]
    holders = (sampler, getattr(sampler, "sampler", None))
    own = [one for holder in holders for one in getattr(holder, "__dict__", {}).values()]
    for one in {id(one): one for one in own}.values():
        if isinstance(one, torch.Generator):
            found.append(_Source(one.get_state, one.set_state, one.manual_seed))
        elif isinstance(one, np.random.Generator):
            found.append(_numpy_source(one))
        elif isinstance(one, np.random.RandomState):
            found.append(_Source(one.get_state, one.set_state, one.seed))
        elif isinstance(one, random.Random):
            found.append(_Source(one.getstate, one.setstate, one.seed))
    return found


def _numpy_source(generator: np.random.Generator) -> _Source:
    bits: Any = generator.bit_generator

    def restore(state: Any) -> None:
        bits.state = state

    return _Source(lambda: bits.state, restore, lambda seed: restore(type(bits)(seed).state))


@contextmanager
def _kept(sources: list[_Source]) -> Iterator[None]:
    """Put every source back at the end."""
    states = [source.state() for source in sources]
    try:
        yield
    finally:
        for source, state in zip(sources, states, strict=True):
            source.restore(state)
