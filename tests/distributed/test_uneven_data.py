"""Ranks with different numbers of batches: training by ``fabric.join``, exact evaluation, and the loop for sharding."""

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fabric_core import Fabric
from fabric_core.conformance.pool import RankPool
from fabric_core.errors import MisuseError, SetupError


@pytest.fixture(scope="module")
def three_ranks() -> Iterator[RankPool]:
    """Give three ranks."""
    with RankPool(3) as pool:
        yield pool


def _net(features: int = 3, *, norm: bool = False) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        layers: list[nn.Module] = [nn.Linear(features, 4), nn.Tanh(), nn.Linear(4, 1)]
        return nn.Sequential(*layers[:1], nn.BatchNorm1d(4), *layers[1:]) if norm else nn.Sequential(*layers)


def _data(count: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(count)
    return TensorDataset(torch.randn(count, 3, generator=generator), torch.arange(count))


def _flat(model: nn.Module) -> torch.Tensor:
    whole = [one.full_tensor() if hasattr(one, "full_tensor") else one for one in model.parameters()]
    return torch.cat([one.detach().flatten() for one in whole])


pytestmark = pytest.mark.sampled(0.4)

# Training by fabric.join


def _join(lengths: list[int], accumulate: int, models: int) -> dict[str, Any]:
    """Train rounds of another number on each rank, and then two together; Adam's state decides over the last ones."""
    with Fabric(accelerator="cpu", strategy="ddp", devices=len(lengths)) as fabric:
        fabric.launch()
        nets = [fabric.setup(net := _net(), torch.optim.Adam(net.parameters(), lr=0.1)) for _ in range(models)]

        def train(batches: int) -> None:
            for number in range(batches):
                x = torch.full((2, 3), float(fabric.global_rank + number))
                last = (number + 1) % accumulate == 0 or number + 1 == batches
                for model, optimizer in nets:
                    with fabric.no_backward_sync(model, enabled=not last):
                        fabric.backward(model(x).square().mean())
                    if last:
                        optimizer.step()
                        optimizer.zero_grad()

        filters = list(warnings.filters)
        with fabric.join(*(model for model, _ in nets)):
            train(lengths[fabric.global_rank])
        assert warnings.filters == filters
        joined = [_flat(model) for model, _ in nets]
        train(2)
        return {"joined": joined, "after": [_flat(model) for model, _ in nets], "left": fabric.all_reduce(1.0).item()}


def _reference(lengths: list[int], accumulate: int) -> torch.Tensor:
    """Give what the join leaves: each round the sum of those that still train, divided by the number of ranks."""
    net = _net()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
    for number in range(max(lengths)):
        active = [rank for rank, length in enumerate(lengths) if number < length]
        for rank in active:
            (net(torch.full((2, 3), float(rank + number))).square().mean() / len(lengths)).backward()
        if (number + 1) % accumulate == 0 or number + 1 == max(lengths):
            optimizer.step()
            optimizer.zero_grad()
    return _flat(net)


@pytest.mark.parametrize(
    ("lengths", "accumulate", "models"),
    [([5, 3], 1, 1), ([0, 3], 1, 2), ([4, 4], 1, 1), ([6, 2], 2, 1), ([2, 5, 3], 1, 2), ([3, 1, 3], 1, 1)],
)
def test_join_trains_as_the_mean_over_all_ranks(
    lengths: list[int], accumulate: int, models: int, two_ranks: RankPool, three_ranks: RankPool
) -> None:
    """All ranks have the model of one process whose gradients are the ranks' sum, and train on together from there."""
    results = (two_ranks if len(lengths) == 2 else three_ranks).run(_join, lengths, accumulate, models)
    expected = _reference(lengths, accumulate)
    for result in results:
        for joined in result["joined"]:
            torch.testing.assert_close(joined, expected, rtol=1e-4, atol=1e-5)
        for after, first in zip(result["after"], results[0]["after"], strict=True):
            assert torch.equal(after, first)
        assert result["left"] == 1.0


def _refused(strategy: str, options: dict[str, Any]) -> str:
    with Fabric(accelerator="cpu", strategy=strategy, devices=2, **options) as fabric:
        fabric.launch()
        model = fabric.setup(_net())
        try:
            with fabric.join(model):
                return "let through"
        except (MisuseError, SetupError) as error:
            return str(error)


@pytest.mark.parametrize(
    ("strategy", "options", "text"),
    [
        ("fsdp", {}, "uneven-data.md"),
        ("ddp", {"precision": "16-mixed"}, "uneven-data.md"),
        ("ddp", {"check": True}, "Fabric(check=False)"),
    ],
)
def test_join_says_where_it_cannot(strategy: str, options: dict[str, Any], text: str, two_ranks: RankPool) -> None:
    """Sharding, loss scaling and the checked mode need the same calls on every rank; the error says what to do."""
    for message in two_ranks.run(_refused, strategy, options):
        assert text in message


def test_join_of_one_process_is_nothing() -> None:
    """The same script runs on one device; a model that was not set up is refused there too."""
    with Fabric(accelerator="cpu", devices=1) as fabric:
        model = fabric.setup(_net())
        with fabric.join(model):
            fabric.backward(model(torch.ones(1, 3)).sum())
        with pytest.raises(TypeError, match="not set up"):
            fabric.join(_net())  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="no model"):
            fabric.join()


# Evaluation


def _loaders(count: int, options: dict[str, Any]) -> list[int]:
    with Fabric(accelerator="cpu", strategy="ddp", devices=options.pop("ranks")) as fabric:
        fabric.launch()
        loader = fabric.setup_dataloaders(DataLoader(_data(count), **options), repeat_samples=False)
        assert len(loader) == len(list(loader))
        return [int(one) for _, numbers in loader for one in numbers]


@pytest.mark.parametrize("shuffle", [False, True, "sampler"])
@pytest.mark.parametrize(("ranks", "count", "batch"), [(2, 7, 2), (2, 2, 1), (3, 10, 3), (3, 8, 1)])
def test_each_sample_is_read_once(
    ranks: int, count: int, batch: int, shuffle: Any, two_ranks: RankPool, three_ranks: RankPool
) -> None:
    """``repeat_samples=False`` divides without repeating; parts differ by one at most."""
    options: dict[str, Any] = {"ranks": ranks, "batch_size": batch}
    if shuffle == "sampler":
        options["sampler"] = torch.utils.data.SubsetRandomSampler(range(count))
    else:
        options["shuffle"] = shuffle
    parts = (two_ranks if ranks == 2 else three_ranks).run(_loaders, count, options)
    assert sorted(number for part in parts for number in part) == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def _bad_loaders() -> list[str]:
    found = []
    with Fabric(accelerator="cpu", strategy="ddp", devices=2) as fabric:
        fabric.launch()
        sampler: Any = torch.utils.data.DistributedSampler(_data(3), 2, fabric.global_rank)
        for loader in (DataLoader(_data(1)), DataLoader(_data(3), sampler=sampler)):
            with contextlib.suppress(SetupError):
                fabric.setup_dataloaders(loader)
            try:
                fabric.setup_dataloaders(loader, repeat_samples=False)
            except SetupError as error:
                found.append(str(error))
    return found


def test_what_repeats_or_leaves_a_rank_without_data_is_refused(two_ranks: RankPool) -> None:
    """Fewer samples than ranks, and PyTorch's own sampler, which repeats, are errors on every rank."""
    for errors in two_ranks.run(_bad_loaders):
        assert "can't share 1 without repeating any" in errors[0]
        assert "own DistributedSampler repeats" in errors[1]


def _evaluate(count: int, ranks: int) -> tuple[float, float, torch.Tensor]:
    """Train a little with batch normalization, and evaluate as docs/how-to/uneven-data.md says."""
    with Fabric(accelerator="cpu", strategy="ddp" if ranks > 1 else "auto", devices=ranks) as fabric:
        fabric.launch()
        net = _net(norm=True)
        model, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=0.1))
        for _ in range(2):
            fabric.backward(model(torch.full((4, 3), float(fabric.global_rank))).square().mean())
            optimizer.step()
            optimizer.zero_grad()
        statistics = fabric.broadcast([one.clone() for one in net.buffers()])
        loader = fabric.setup_dataloaders(DataLoader(_data(count), batch_size=2), repeat_samples=False)
        model.eval()
        loss, seen = torch.zeros(()), torch.zeros(())
        with torch.no_grad():
            for x, _ in loader:
                loss += model(x).square().sum()
                seen += len(x)
        loss, seen = fabric.all_reduce((loss, seen), reduce_op="sum")
        # One process with the same parameters and rank 0's statistics.
        alone = _net(norm=True)
        alone.load_state_dict(net.state_dict())
        for one, value in zip(alone.buffers(), statistics, strict=True):
            one.copy_(value)
        with torch.no_grad():
            return loss.item(), seen.item(), alone.eval()(_data(count).tensors[0]).square().sum()


@pytest.mark.parametrize(("ranks", "count"), [(2, 7), (2, 5), (3, 10)])
def test_an_evaluation_is_exact(ranks: int, count: int, two_ranks: RankPool, three_ranks: RankPool) -> None:
    """Sums over ranks with different numbers of batches are those of one process, with batch normalization too."""
    for loss, seen, expected in (two_ranks if ranks == 2 else three_ranks).run(_evaluate, count, ranks):
        assert seen == count
        assert loss == pytest.approx(expected.item(), rel=1e-5)


# What works under every strategy


def _gathered(strategy: str, ranks: int, count: int, batch: int) -> list[int]:
    with Fabric(accelerator="cpu", strategy=strategy, devices=ranks) as fabric:
        fabric.launch()
        model = fabric.setup(_net())
        loader = fabric.setup_dataloaders(DataLoader(_data(count), batch_size=batch))
        found = []
        with torch.no_grad():
            for x, number in loader:
                model(x)
                found.append(fabric.all_gather(number).T.flatten())  # (ranks, batch) -> the order of the data
        return [int(one) for one in torch.cat(found)[:count]]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize(("ranks", "count", "batch"), [(2, 7, 2), (3, 10, 2)])
def test_gathered_results_come_in_order_and_can_be_cut(
    strategy: str, ranks: int, count: int, batch: int, two_ranks: RankPool, three_ranks: RankPool
) -> None:
    """What ranks computed on equally many batches, gathered and cut, is once for each sample, in the data's order."""
    for found in (two_ranks if ranks == 2 else three_ranks).run(_gathered, strategy, ranks, count, batch):
        assert found == list(range(count))


def rounds(fabric: Fabric, loader: Any) -> Iterator[tuple[Any, bool]]:
    """Give every rank as many batches: one that has none left gets its last one again, and ``False``."""
    batches, batch = iter(loader), None
    while True:
        following = next(batches, None)
        if not fabric.all_reduce(float(following is not None), reduce_op="max"):
            return
        batch = batch if following is None else following
        yield batch, following is not None


def _rounds(strategy: str, ranks: int, count: int) -> torch.Tensor:
    with Fabric(accelerator="cpu", strategy=strategy, devices=ranks) as fabric:
        fabric.launch()
        net = _net()
        model, optimizer = fabric.setup(net, torch.optim.Adam(net.parameters(), lr=0.1))
        loader = fabric.setup_dataloaders(DataLoader(_data(count), batch_size=2), repeat_samples=False)
        for (x, _), mine in rounds(fabric, loader):
            seen = fabric.all_reduce(float(len(x) * mine), reduce_op="sum")
            loss = model(x).square().sum() * mine
            fabric.backward(loss / seen * fabric.world_size)
            optimizer.step()
            optimizer.zero_grad()
        return _flat(model)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize(("ranks", "count"), [(2, 7), (2, 5), (3, 10)])
def test_rounds_train_as_one_process(
    strategy: str, ranks: int, count: int, two_ranks: RankPool, three_ranks: RankPool
) -> None:
    """A rank without a batch repeats its last one with a loss of zero; each sample counts once, as in one process."""
    net = _net()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
    for x in _data(count).tensors[0].split(2 * ranks):
        net(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for found in (two_ranks if ranks == 2 else three_ranks).run(_rounds, strategy, ranks, count):
        torch.testing.assert_close(found, _flat(net), rtol=1e-4, atol=1e-5)
