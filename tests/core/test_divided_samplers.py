"""Any sampler is divided over ranks: each draws the same order, and takes its part."""

import random
from collections.abc import Iterator
from itertools import count, islice
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from fabric_core.wrapping.dividing import shard

DATA: Any = list(range(100))


class Drawing(Sampler[int]):
    """Draws from a source of random numbers."""

    def __init__(self, draw: Any, holds: Any = None) -> None:
        self.draw = draw
        self.holds = holds

    def __iter__(self) -> Iterator[int]:
        for _ in range(len(self)):
            yield self.draw(self.holds)

    def __len__(self) -> int:
        return 20


class Buckets(Sampler[list[int]]):
    """Batches of its own making, in another order each time."""

    def __iter__(self) -> Iterator[list[int]]:
        for start in torch.randperm(5).tolist():
            yield [10 * start, 10 * start + 1]

    def __len__(self) -> int:
        return 5


SAMPLERS: dict[str, Any] = {
    "subset": lambda: SubsetRandomSampler(range(11)),
    "weighted": lambda: WeightedRandomSampler([1.0] * 100, 20),
    "replacement": lambda: RandomSampler(DATA, replacement=True),
    "fewer": lambda: RandomSampler(DATA, num_samples=14),
    "more": lambda: RandomSampler(DATA, num_samples=140),
    "generator": lambda: WeightedRandomSampler([1.0] * 100, 20, generator=torch.Generator().manual_seed(3)),
    "list": lambda: [3, 1, 2],
    "other source": lambda: SequentialSampler(range(3)),
    "python": lambda: Drawing(lambda _: random.randrange(100)),  # noqa: S311 - no secret
    "numpy": lambda: Drawing(lambda _: int(np.random.randint(100))),  # noqa: NPY002
    "python's own": lambda: Drawing(lambda own: own.randrange(100), random.Random()),  # noqa: S311
    "numpy's own": lambda: Drawing(lambda own: int(own.integers(100)), np.random.default_rng()),
    "numpy's old own": lambda: Drawing(lambda own: int(own.randint(100)), np.random.RandomState()),
}


def parts(make: Any, count: int = 2, seed: int = 7, **given: Any) -> list[DataLoader[Any]]:
    """Divide a loader as each rank would, ranks being seeded differently."""
    divided = []
    for rank in range(count):
        _seed(1000 + rank)
        divided.append(shard(DataLoader(DATA, **make(), **given), rank, count, lambda _: seed))
    return divided


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - what samplers draw from
    torch.manual_seed(seed)


def numbers(loader: Any) -> list[int]:
    """Give all numbers of all batches, in order."""
    return [int(one) for batch in loader for one in torch.as_tensor(batch).flatten()]


@pytest.mark.parametrize("kind", SAMPLERS)
def test_parts_make_up_one_order(kind: str) -> None:
    """Interleaved, the parts of all ranks are what one process would draw from the same seed."""
    loaders = parts(lambda: {"sampler": SAMPLERS[kind]()})
    read = []
    for rank, loader in enumerate(loaders):
        _seed(rank)  # what a rank draws besides changes nothing
        read.append(numbers(loader))
    size = len(SAMPLERS[kind]())
    assert [len(one) for one in read] == [len(loader.sampler) for loader in loaders] == [(size + 1) // 2] * 2  # type: ignore[arg-type]
    whole = [one for pair in zip(*read, strict=True) for one in pair][:size]
    (alone,) = parts(lambda: {"sampler": SAMPLERS[kind]()}, 1)
    part: Any = loaders[0].sampler
    again = type(part)(SAMPLERS[kind](), 1, 0, drop_last=False, seed=7)
    assert whole == list(again)
    assert alone.sampler is not None


@pytest.mark.parametrize("kind", [kind for kind in SAMPLERS if kind not in {"list", "other source"}])
def test_each_epoch_and_seed_has_another_order(kind: str) -> None:
    """The number of the epoch changes the draw, and so does the seed; nothing else does."""
    loader, _ = parts(lambda: {"sampler": SAMPLERS[kind]()})
    sampler: Any = loader.sampler
    first = list(sampler)
    random.random()  # noqa: S311 - what else is drawn in between
    torch.rand(3)
    assert list(sampler) == first
    sampler.set_epoch(1)
    second = list(sampler)
    other = list(parts(lambda: {"sampler": SAMPLERS[kind]()}, seed=8)[0].sampler)
    third = list(parts(lambda: {"sampler": SAMPLERS[kind]()}, seed=9)[0].sampler)
    assert first != second
    assert other != first or third != first


def test_drawing_leaves_the_random_numbers_alone() -> None:
    """Ranks that are seeded differently go on as if nothing had been drawn, in the middle of an epoch too."""
    loader, _ = parts(lambda: {"sampler": SAMPLERS["subset"]()})
    _seed(4)
    expected = [random.random(), float(np.random.rand()), float(torch.rand(1))]  # noqa: NPY002, S311
    _seed(4)
    batches = iter(loader.sampler)
    next(batches)
    drawn = [random.random(), float(np.random.rand()), float(torch.rand(1))]  # noqa: NPY002, S311
    assert drawn == expected


def test_the_user_s_loader_and_sampler_are_as_before() -> None:
    """The loader is copied; its sampler is only read."""
    sampler = SubsetRandomSampler(range(10))
    original: DataLoader[int] = DataLoader(DATA, sampler=sampler, batch_size=2)
    batches = original.batch_sampler
    loader = shard(original, 0, 2, lambda seed: seed)
    assert loader is not original
    assert original.sampler is sampler
    assert original.batch_sampler is batches
    assert loader.batch_size == 2
    assert len(loader) == 3
    assert isinstance(loader.sampler, DistributedSampler)


@pytest.mark.parametrize("drop_last", [False, True])
def test_batches_of_one_s_own_are_divided_whole(drop_last: bool) -> None:
    """Each rank reads whole batches of a batch sampler that is no plain one."""
    loaders = parts(lambda: {"batch_sampler": Buckets()})
    for loader in loaders:
        loader.batch_sampler.drop_last = drop_last  # type: ignore[union-attr]
    read = [[batch.tolist() for batch in loader] for loader in loaders]
    assert [len(one) for one in read] == [len(loader) for loader in loaders] == [2 if drop_last else 3] * 2
    whole = [tuple(batch) for one in read for batch in one]
    assert len(set(whole)) == (4 if drop_last else 5)
    assert all(second == first + 1 for first, second in whole)


def test_a_plain_batch_sampler_over_any_order_is_made_anew() -> None:
    """Its batches keep their size."""
    loaders = parts(lambda: {"batch_sampler": BatchSampler(SubsetRandomSampler(range(12)), 3, False)})
    read = [[batch.tolist() for batch in loader] for loader in loaders]
    assert [[len(batch) for batch in one] for one in read] == [[3, 3], [3, 3]]
    assert sorted(number for one in read for batch in one for number in batch) == list(range(12))


def test_an_endless_sampler_is_divided_as_it_goes() -> None:
    """What has no end is not drawn to it."""

    class Endless(Sampler[int]):
        def __iter__(self) -> Iterator[int]:
            for _ in count():
                yield int(torch.randint(100, ()))

    loaders = parts(lambda: {"sampler": Endless(), "batch_size": None})
    left, right = ([int(one) for one in islice(loader, 5000)] for loader in loaders)
    assert left != right
    again, _ = parts(lambda: {"sampler": Endless(), "batch_size": None})
    assert [int(one) for one in islice(again, 5000)] == left
    with pytest.raises(TypeError):
        len(loaders[0])


def test_a_sampler_that_counts_epochs_itself_is_told() -> None:
    """An epoch set on the user's own sampler counts, and ours reaches it."""

    class Counting(SubsetRandomSampler):
        epoch = 0

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

    sampler = Counting(range(10))
    original: DataLoader[int] = DataLoader(DATA, sampler=sampler)
    part = shard(original, 0, 2, lambda seed: seed).sampler
    first = list(part)
    sampler.set_epoch(3)
    assert part.epoch == 3
    assert list(part) != first
    part.set_epoch(5)
    assert sampler.epoch == 5


def test_the_seed_is_rank_0_s() -> None:
    """What is agreed on is the seed of the sampler's own generator, or PyTorch's."""
    asked: list[int] = []

    def agree(seed: int) -> int:
        asked.append(seed)
        return 5

    torch.manual_seed(42)
    own = torch.Generator().manual_seed(43)
    shuffled = shard(DataLoader(DATA, shuffle=True), 0, 2, agree)
    owned = shard(DataLoader(DATA, sampler=SubsetRandomSampler(range(10), generator=own)), 0, 2, agree)
    shard(DataLoader(DATA), 0, 2, agree)
    assert asked == [42, 43]
    assert shuffled.sampler.seed == owned.sampler.seed == 5


def test_any_seed_and_epoch_will_do() -> None:
    """PyTorch's seeds have 64 bits and epochs have no end; NumPy's take 32 bits."""
    orders = []
    for seed, epoch in ((2**62 - 1, 0), (2**62 - 1, 1), (7, 2**40)):
        sampler: Any = parts(lambda: {"sampler": SAMPLERS["numpy"]()}, seed=seed)[0].sampler
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
        assert list(sampler) == orders[-1]
    assert len({tuple(one) for one in orders}) == 3
