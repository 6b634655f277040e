"""The strategy ``local_sgd``, on two ranks."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from fabric_local_sgd import LocalSGDStrategy
from torch import nn

from fabric_core import Fabric
from fabric_core.conformance import RankPool, suite

test_rules = suite("strategy", "local_sgd", options={"sync_every": 2})

LR = 0.1


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankPool]:
    """Give two ranks."""
    with RankPool(2) as pool:
        yield pool


def _batch(step: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(4, 3, generator=generator), torch.randn(4, 1, generator=generator)


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(3, 1)


def _step(fabric: Fabric, model: Any, optimizer: Any, step: int) -> None:
    x, y = _batch(step, fabric.global_rank)
    optimizer.zero_grad()
    fabric.backward(nn.functional.mse_loss(model(x), y))
    optimizer.step()


def _weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([one.detach().flatten() for one in model.parameters()]).clone()


def _trained(strategy: str, steps: int) -> tuple[list[torch.Tensor], int]:
    """Train; give the weights after each step, and how often ranks communicated meanwhile."""
    with Fabric(accelerator="cpu", devices=2, strategy=strategy) as fabric:
        fabric.launch()
        model = _model()
        wrapped, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=LR))
        seen = []
        with patch.object(dist, "all_reduce", side_effect=dist.all_reduce) as counted:
            for step in range(steps):
                _step(fabric, wrapped, optimizer, step)
                seen.append(_weights(model))
        return seen, counted.call_count


def _by_hand(rank: int, steps: int, sync_every: int) -> list[torch.Tensor]:
    """Train both ranks' models in one process, by plain PyTorch; give one rank's weights after each step."""
    models = [_model(), _model()]
    seen = []
    for step in range(steps):
        for index, model in enumerate(models):
            x, y = _batch(step, index)
            model.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()  # type: ignore[no-untyped-call]
            with torch.no_grad():
                for one in model.parameters():
                    if one.grad is not None:
                        one.sub_(LR * one.grad)
        if (step + 1) % sync_every == 0:
            with torch.no_grad():
                for first, second in zip(*(model.parameters() for model in models), strict=True):
                    first.copy_((first + second) / 2)
                    second.copy_(first)
        seen.append(_weights(models[rank]))
    return seen


def test_models_are_averaged_every_few_steps(ranks: RankPool) -> None:
    """Each step ends where plain PyTorch ends, and ranks agree after every third step and only there."""
    (first, _), (second, _) = ranks.run(_trained, "local_sgd:sync_every=3", 7)
    for rank, got in enumerate((first, second)):
        torch.testing.assert_close(got, _by_hand(rank, 7, 3))
    agree = [torch.equal(one, other) for one, other in zip(first, second, strict=True)]
    assert agree == [False, False, True, False, False, True, False]


def test_it_communicates_so_many_times_less(ranks: RankPool) -> None:
    """Twelve steps need one message each where every step averages, and one in four where every fourth does."""
    counts = [ranks.run(_trained, f"local_sgd:sync_every={every}", 12)[0][1] for every in (1, 4)]
    assert counts == [12, 3]


def test_a_warm_up_trains_as_ddp(ranks: RankPool) -> None:
    """While gradients are averaged, parameters are those that DDP trains; after it, the ranks differ."""
    (first, _), (second, _) = ranks.run(_trained, "local_sgd:warmup_steps=3,sync_every=4", 5)
    (ddp, _), _ = ranks.run(_trained, "ddp", 5)
    torch.testing.assert_close(first[:3], ddp[:3])
    torch.testing.assert_close(second[:3], ddp[:3])
    assert not torch.equal(first[3], second[3])


def _accumulated(_: str) -> torch.Tensor:
    with Fabric(accelerator="cpu", devices=2, strategy="local_sgd:warmup_steps=9") as fabric:
        fabric.launch()
        model = _model()
        wrapped = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=LR))[0]
        with fabric.no_backward_sync(wrapped):
            x, y = _batch(0, fabric.global_rank)
            fabric.backward(nn.functional.mse_loss(wrapped(x), y))
        assert model.weight.grad is not None
        return torch.as_tensor(model.weight.grad)


def test_a_warm_up_can_accumulate(ranks: RankPool) -> None:
    """Inside ``no_backward_sync`` each rank keeps its own gradients."""
    first, second = ranks.run(_accumulated, "")
    assert not torch.allclose(first, second)


def _resumed(path: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    def fresh(fabric: Fabric) -> tuple[nn.Module, Any, Any]:
        model = _model()
        wrapped, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9))
        return model, wrapped, optimizer

    with Fabric(accelerator="cpu", devices=2, strategy="local_sgd:sync_every=3") as fabric:
        fabric.launch()
        model, wrapped, optimizer = fresh(fabric)
        for step in range(4):
            _step(fabric, wrapped, optimizer, step)
        fabric.save(path, {"model": wrapped, "optimizer": optimizer})
        mean = fabric.all_reduce(_weights(model))
    with Fabric(accelerator="cpu", devices=2, strategy=LocalSGDStrategy(sync_every=3)) as fabric:
        fabric.launch()
        model, wrapped, optimizer = fresh(fabric)
        fabric.load(path, {"model": wrapped, "optimizer": optimizer})
        loaded = _weights(model)
        for step in range(4, 6):
            _step(fabric, wrapped, optimizer, step)
        return mean, loaded, _weights(model)


def test_the_counter_and_the_average_survive_a_checkpoint(ranks: RankPool, tmp_path: Path) -> None:
    """What is saved is the average, and two steps after the fourth comes the next averaging."""
    (mean, loaded, first), (_, _, second) = ranks.run(_resumed, str(tmp_path / "checkpoint"))
    torch.testing.assert_close(loaded, mean)
    assert torch.equal(first, second)
