"""A wrapped loader is the original, but for where its batches come and which part of the data it reads."""

import collections
import copy
import dataclasses
import pickle
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
)
from torchdata.stateful_dataloader import StatefulDataLoader

from fabric_core import Fabric, FabricDataLoader, Strategy
from fabric_core.collectives import Collectives, SingleProcess
from fabric_core.contracts import PrecisionPolicy, StrategyCapabilities, World
from fabric_core.errors import CheckpointError, SetupError

pytestmark = pytest.mark.filterwarnings("ignore:'set_vital':UserWarning")  # torchdata calls it


class Part(Strategy):
    """One process that says it reads the second of two parts."""

    capabilities = StrategyCapabilities(max_world_size=1)

    def connect(self, world: World, policy: PrecisionPolicy) -> Collectives:
        return SingleProcess()

    def data_shard(self) -> tuple[int, int]:
        return 1, 2


class Numbers(Dataset[int]):
    def __init__(self, count: int = 10) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> int:
        return index


DATA = Numbers()


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(5))


class Own(DataLoader[int]):
    """A user's loader with an argument of its own, which it doesn't even keep under its name."""

    def __init__(self, data: Any, flavour: str, **given: Any) -> None:
        super().__init__(data, **given)
        self.taste = flavour.upper()

    def describe(self) -> str:
        return f"{self.taste} of {len(self)}"


class OwnBatches(Sampler[list[int]]):
    def __iter__(self) -> Iterator[list[int]]:
        return iter([[0, 1], [2]])

    def __len__(self) -> int:
        return 2


def values(batches: Any) -> list[int]:
    """Give all numbers of all batches, in order."""
    return [int(number) for batch in batches for number in torch.as_tensor(batch).flatten()]


def load(data: Any = None, **given: Any) -> DataLoader[Any]:
    """Give a loader of ten numbers, two in a batch."""
    return DataLoader(Numbers() if data is None else data, **{"batch_size": 2, **given})


@pytest.fixture
def fabric(in_memory: dict[str, Any]) -> Fabric:
    """Give a Fabric that reads all data."""
    return Fabric(**in_memory)


@pytest.fixture
def half(in_memory: dict[str, Any]) -> Fabric:
    """Give a Fabric that reads the second of two parts."""
    return Fabric(**{**in_memory, "strategy": Part()})


# What it is


def test_it_is_a_data_loader(fabric: Fabric) -> None:
    """Its class says so, its attributes are the original's, also those that a subclass adds; writes reach it."""
    original = Own(Numbers(), "sweet", batch_size=3, drop_last=True)
    loader: Any = fabric.setup_dataloaders(original)
    assert isinstance(loader, FabricDataLoader)
    assert isinstance(loader, DataLoader)
    assert loader.dataloader is original
    assert loader.device == torch.device("cpu")
    for name in (
        "dataset",
        "batch_size",
        "sampler",
        "batch_sampler",
        "num_workers",
        "collate_fn",
        "drop_last",
        "taste",
    ):
        assert getattr(loader, name) is getattr(original, name)
    assert loader.multiprocessing_context is None
    assert loader.describe() == "SWEET of 3"
    assert len(loader) == 3
    loader.note = 1
    assert original.note == 1
    del loader.note
    assert not hasattr(original, "note")
    with pytest.raises(ValueError, match="batch_size attribute should not be set"):
        loader.batch_size = 4
    assert set(dir(original)) <= set(dir(loader))


def test_one_or_a_list_comes_back(fabric: Fabric) -> None:
    """As many as were given."""
    assert isinstance(fabric.setup_dataloaders(load()), FabricDataLoader)
    assert [len(one) for one in fabric.setup_dataloaders(load(), load(batch_size=5))] == [5, 2]


def test_any_iterable_can_be_one(half: Fabric) -> None:
    """What is no ``DataLoader`` is read as it is, and only its batches are moved."""
    loader: Any = half.setup_dataloaders([torch.ones(1), torch.zeros(1)])
    assert values(loader) == values(loader) == [1, 0]
    assert len(loader) == 2


def test_without_a_device_batches_are_left(fabric: Fabric) -> None:
    """``move_to_device=False`` gives the very objects of the loader."""
    batches = [object()]
    assert list(fabric.setup_dataloaders(batches, move_to_device=False)) == batches


class Names(NamedTuple):
    x: Any
    y: Any


@dataclasses.dataclass(frozen=True)
class Record:
    x: Any
    name: str


class Movable:
    """Knows by itself how to move."""

    def __init__(self) -> None:
        self.at: list[torch.device] = []

    def to(self, device: torch.device) -> "Movable":
        moved = Movable()
        moved.at = [*self.at, device]
        return moved


def test_every_tensor_of_a_batch_moves(fabric: Fabric) -> None:
    """In dicts, lists, tuples, named tuples, dataclasses and registered containers, and objects with a ``to``."""
    x = torch.ones(1, device="meta")
    batch = {
        "list": [x, 1, "text", None],
        "named": Names(x, (x,)),
        "record": Record(x, "r"),
        "ordered": collections.OrderedDict(a=x),
        "movable": Movable(),
        "packed": nn.utils.rnn.pack_sequence([torch.ones(2, 1)]),
        "kept": {3},
    }
    moved = fabric.setup_dataloaders([batch])
    moved.__dict__["_fabric_device"] = torch.device("meta")
    (result,) = moved
    assert result["list"][0] is x
    assert result["movable"].at == [torch.device("meta")]
    assert result["packed"].data.device.type == "meta"
    assert result["packed"].batch_sizes.device.type == "cpu"
    moved.__dict__["_fabric_device"] = torch.device("cpu")
    batch = {"tensor": torch.ones(1), "kept": {3}, "named": Names(torch.ones(1), 2)}
    assert next(iter(fabric.setup_dataloaders([batch]))) is batch


# Which part it reads


@pytest.mark.parametrize("shuffle", [False, True])
def test_one_process_keeps_the_loader(fabric: Fabric, shuffle: bool) -> None:
    """Where the strategy divides nothing, the original itself is read."""
    original = load(shuffle=shuffle)
    assert fabric.setup_dataloaders(original).sampler is original.sampler
    assert sorted(values(fabric.setup_dataloaders(original))) == list(range(10))


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("kind", [DataLoader, Own, StatefulDataLoader])
def test_a_part_keeps_everything_but_the_sampler(half: Fabric, kind: Any, shuffle: bool, drop_last: bool) -> None:
    """Class, its own arguments, batch size, shuffling, ``drop_last`` and generator stay; the user's loader does too."""
    generator = torch.Generator()
    given = {"flavour": "salt"} if kind is Own else {}
    original = kind(Numbers(11), **given, batch_size=2, shuffle=shuffle, drop_last=drop_last, generator=generator)
    sampler = original.sampler
    loader: Any = half.setup_dataloaders(original)
    assert type(loader.__dict__["_fabric_inner"]) is kind
    assert isinstance(loader.sampler, DistributedSampler)
    assert (loader.sampler.num_replicas, loader.sampler.rank, loader.sampler.shuffle) == (2, 1, shuffle)
    assert loader.sampler.drop_last is drop_last
    assert loader.batch_sampler.sampler is loader.sampler
    assert type(loader.batch_sampler) is type(original.batch_sampler)
    assert (loader.batch_size, loader.drop_last, loader.generator) == (2, drop_last, generator)
    assert loader.collate_fn is original.collate_fn
    assert original.sampler is sampler
    assert original.batch_sampler.sampler is sampler
    reference: DistributedSampler[int] = DistributedSampler(
        Numbers(11), 2, 1, shuffle=shuffle, drop_last=drop_last, seed=generator.initial_seed() if shuffle else 0
    )
    expected = list(reference)
    assert values(loader) == expected[: len(expected) // 2 * 2 if drop_last else None]
    if kind is Own:
        assert loader.describe().startswith("SALT of")


def test_workers_and_single_samples_are_kept(half: Fabric) -> None:
    """A part is read by as many workers as before; without batches only the sampler is another one."""
    loader: Any = half.setup_dataloaders(load(num_workers=1, persistent_workers=True, prefetch_factor=3))
    assert (loader.num_workers, loader.persistent_workers, loader.prefetch_factor) == (1, True, 3)
    assert values(loader) == values(loader) == [1, 3, 5, 7, 9]
    original = load(num_workers=1, persistent_workers=True)
    assert values(original) == list(range(10))
    assert values(half.setup_dataloaders(original)) == [1, 3, 5, 7, 9]
    single = half.setup_dataloaders(load(batch_size=None))
    assert single.batch_sampler is None
    assert values(single) == [1, 3, 5, 7, 9]


def test_plain_batches_over_a_plain_order_are_divided(half: Fabric) -> None:
    """A batch sampler of PyTorch's own class is made anew over the part."""
    data = Numbers()
    loader: Any = half.setup_dataloaders(DataLoader(data, batch_sampler=BatchSampler(SequentialSampler(data), 3, True)))
    assert [batch.tolist() for batch in loader] == [[1, 3, 5]]


def test_what_reads_a_part_already_is_left(half: Fabric) -> None:
    """A distributed sampler, an iterable dataset and ``use_distributed_sampler=False`` come through untouched."""
    data = Numbers()
    sampler: DistributedSampler[int] = DistributedSampler(data, 2, 0, shuffle=False)
    for original in (
        load(data, sampler=sampler),
        DataLoader(data, batch_sampler=BatchSampler(sampler, 2, False)),
        load(Stream()),
    ):
        assert half.setup_dataloaders(original).__dict__["_fabric_inner"] is original
    original = load(data, sampler=SubsetRandomSampler([1, 2]))
    loader: Any = half.setup_dataloaders(original, use_distributed_sampler=False)
    assert sorted(values(loader)) == [1, 2]


class Renaming(DataLoader[int]):
    def __init__(self, *args: Any, **given: Any) -> None:
        super().__init__(*args, **given)
        self.also = self.sampler


def test_samplers_that_can_not_be_replaced_are_refused(half: Fabric) -> None:
    """Nothing is guessed: the error says what to write."""
    with pytest.raises(SetupError, match="use_distributed_sampler=False"):
        half.setup_dataloaders(Renaming(Numbers()))


# Epochs


def test_each_iteration_is_an_epoch(half: Fabric) -> None:
    """The sampler is told the number, so that every epoch has another order."""
    loader: Any = half.setup_dataloaders(load(Numbers(100), shuffle=True))
    first, second = values(loader), values(loader)
    assert loader.sampler.epoch == 1
    assert first != second
    assert sorted(first) != sorted(second)


def test_an_epoch_that_the_user_set_wins(half: Fabric) -> None:
    """Counting goes on from it."""
    loader: Any = half.setup_dataloaders(load(shuffle=True))
    epochs = []
    for wanted in (None, 7, None, 3, None):
        if wanted is not None:
            loader.sampler.set_epoch(wanted)
        values(loader)
        epochs.append(loader.sampler.epoch)
    assert epochs == [0, 7, 8, 3, 4]


def test_an_epoch_set_before_setup_is_where_it_begins(fabric: Fabric) -> None:
    """A sampler of the user's own that was moved to an epoch begins there."""
    data = Numbers()
    sampler: DistributedSampler[int] = DistributedSampler(data, 2, 0)
    sampler.set_epoch(5)
    loader: Any = fabric.setup_dataloaders(load(data, sampler=sampler))
    values(loader)
    assert sampler.epoch == 5
    values(loader)
    assert sampler.epoch == 6


def test_an_epoch_that_was_broken_off_counts(half: Fabric) -> None:
    """After a ``break`` the next iteration is the next epoch; an iterator that gave nothing is none."""
    loader: Any = half.setup_dataloaders(load(shuffle=True))
    iter(loader)
    next(iter(loader))
    assert loader.sampler.epoch == 0
    values(loader)
    assert loader.sampler.epoch == 1


def test_a_batch_sampler_is_told_too(fabric: Fabric) -> None:
    """One that wants to know the epoch is told, wherever it sits."""

    class Telling(OwnBatches):
        def __init__(self) -> None:
            self.told: list[int] = []

        def set_epoch(self, epoch: int) -> None:
            self.told.append(epoch)

    sampler = Telling()
    loader: Any = fabric.setup_dataloaders(DataLoader(Numbers(), batch_sampler=sampler))
    values(loader)
    values(loader)
    assert sampler.told == [0, 1]


# Going on in the middle


def _kinds() -> dict[str, Any]:
    return {
        "plain": lambda: load(Numbers(20)),
        "shuffled": lambda: load(Numbers(20), shuffle=True),
        "generator": lambda: load(Numbers(20), shuffle=True, generator=torch.Generator().manual_seed(5)),
        "own generator": lambda: load(
            data := Numbers(20), sampler=RandomSampler(data, generator=torch.Generator().manual_seed(6))
        ),
        "workers": lambda: load(Numbers(20), shuffle=True, num_workers=1),
        "stateful": lambda: StatefulDataLoader(Numbers(20), batch_size=2, shuffle=True),
        "stateful workers": lambda: StatefulDataLoader(Numbers(20), batch_size=2, shuffle=True, num_workers=1),
        "iterable": lambda: load(Stream(), batch_size=1),
    }


@pytest.mark.parametrize("kind", _kinds())
@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("position", [(0, 0), (0, 2), (1, 3), (1, 0)])
def test_it_resumes_in_the_middle_of_an_epoch(
    fabric: Fabric, half: Fabric, kind: str, sharded: bool, position: tuple[int, int]
) -> None:
    """Another loader that loads the state gives the rest of the epoch, and then the same next epoch."""
    make = _kinds()[kind]
    epoch, count = position
    torch.manual_seed(1)
    loader = (half if sharded else fabric).setup_dataloaders(make())
    for _ in range(epoch):
        values(loader)
    batches = iter(loader) if count else None
    seen = [next(batches) for _ in range(count)] if batches else []
    state = pickle.loads(pickle.dumps(loader.state_dict()))  # noqa: S301 - made right here
    random = torch.get_rng_state()
    rest = values(batches) if batches else []
    after = values(loader)

    torch.manual_seed(99)
    other = (half if sharded else fabric).setup_dataloaders(make())
    other.load_state_dict(state)
    torch.set_rng_state(random)
    if count:
        assert values(other) == rest
        assert len(seen) == count
    if "generator" not in kind and (count or kind != "stateful"):
        assert values(other) == after


def test_a_state_from_elsewhere_is_refused(fabric: Fabric) -> None:
    """The wrong sort of state, and one from longer data, say so."""
    plain, stateful = fabric.setup_dataloaders(load(), StatefulDataLoader(Numbers(), batch_size=2))
    iterator = iter(plain)
    next(iterator)
    with pytest.raises(CheckpointError, match="no state of such a data loader"):
        stateful.load_state_dict(plain.state_dict())
    long = fabric.setup_dataloaders(load(Numbers(40)))
    batches = iter(long)
    for _ in range(15):
        next(batches)
    plain.load_state_dict(long.state_dict())
    with pytest.raises(CheckpointError, match="ends before batch 15"):
        iter(plain)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])  # noqa: S301
def test_a_copy_reads_on_its_own(half: Fabric, copied: Any) -> None:
    """A deep copy and a pickled one give the same batches from the same epoch on."""
    loader: Any = half.setup_dataloaders(load(shuffle=True))
    values(loader)
    assert values(copied(loader)) == values(loader)


def test_batches_for_the_processor_take_no_stream(fabric: Fabric, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine that has an accelerator, too."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("meta"))
    assert values(fabric.setup_dataloaders(load())) == list(range(10))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator")
def test_the_next_batch_is_copied_on_a_stream_of_its_own() -> None:
    """On an accelerator batches arrive whole and in order, however long each is computed with."""
    device = torch.accelerator.current_accelerator()
    assert device is not None
    data = torch.arange(64.0).reshape(64, 1).expand(64, 1 << 16).contiguous()
    loader = FabricDataLoader(DataLoader(list(data), batch_size=8, pin_memory=True), device, None)  # type: ignore[arg-type]
    weight = torch.ones(1 << 16, 1 << 10, device=device)
    sums = []
    for batch in loader:
        assert batch.device.type == device.type
        for _ in range(20):
            batch @ weight
        sums.append(batch[:, 0].sum())
        del batch
    assert [int(one) for one in sums] == [int(data[start : start + 8, 0].sum()) for start in range(0, 64, 8)]
