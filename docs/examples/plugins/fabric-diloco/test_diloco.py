"""The strategy ``diloco``, on two ranks."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fabric_core import Fabric
from fabric_core.conformance import RankPool, suite

# An outer optimizer that goes to the mean and no further: then ranks that see the same data train as one, which is what
# the kit compares with one process.
test_rules = suite("strategy", "diloco", options={"sync_every": 1, "outer_lr": 1.0, "outer_momentum": 0.0})

STRATEGY = "diloco:sync_every=3,outer_lr=0.5,outer_momentum=0.8"


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
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


def _weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([one.detach().flatten() for one in model.parameters()]).clone()


def _set_up(fabric: Fabric) -> tuple[nn.Module, Any, Any]:
    fabric.launch()
    model = _model()
    wrapped, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=0.1))
    return model, wrapped, optimizer


def _train(fabric: Fabric, model: Any, optimizer: Any, steps: range) -> None:
    for step in steps:
        x, y = _batch(step, fabric.global_rank)
        optimizer.zero_grad()
        fabric.backward(nn.functional.mse_loss(model(x), y))
        optimizer.step()


def _trained(steps: int) -> torch.Tensor:
    with Fabric(accelerator="cpu", devices=2, strategy=STRATEGY) as fabric:
        model, wrapped, optimizer = _set_up(fabric)
        _train(fabric, wrapped, optimizer, range(steps))
        return _weights(model)


def _by_hand(rounds: int) -> torch.Tensor:
    """Train both ranks' models in one process, by the paper's algorithm over flat vectors."""
    models = [_model(), _model()]
    inner = [torch.optim.AdamW(model.parameters(), lr=0.1) for model in models]
    start = _weights(models[0])
    momentum = torch.zeros_like(start)
    for turn in range(rounds):
        for rank, (model, optimizer) in enumerate(zip(models, inner, strict=True)):
            for step in range(3 * turn, 3 * turn + 3):
                x, y = _batch(step, rank)
                optimizer.zero_grad()
                nn.functional.mse_loss(model(x), y).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
        gradient = start - torch.stack([_weights(model) for model in models]).mean(0)
        momentum = gradient if turn == 0 else 0.8 * momentum + gradient
        start = start - 0.5 * (gradient + 0.8 * momentum)
        for model in models:
            with torch.no_grad():
                for one, part in zip(
                    model.parameters(),
                    start.split([one.numel() for one in model.parameters()]),  # type: ignore[no-untyped-call]
                    strict=True,
                ):
                    one.copy_(part.view_as(one))
    return start


def test_it_is_the_paper_s_algorithm(ranks: RankPool) -> None:
    """After each third step both ranks have what the algorithm gives, written in plain PyTorch."""
    first, second = ranks.run(_trained, 9)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, _by_hand(3))


def test_between_outer_steps_ranks_train_by_themselves(ranks: RankPool) -> None:
    """One step after the third, they differ."""
    first, second = ranks.run(_trained, 4)
    assert not torch.allclose(first, second)


def _resumed(path: str) -> torch.Tensor:
    with Fabric(accelerator="cpu", devices=2, strategy=STRATEGY) as fabric:
        _, wrapped, optimizer = _set_up(fabric)
        _train(fabric, wrapped, optimizer, range(3))
        fabric.save(path, {"model": wrapped})
    with Fabric(accelerator="cpu", devices=2, strategy=STRATEGY) as fabric:
        model, wrapped, optimizer = _set_up(fabric)
        inner = [_weights(model)]
        fabric.load(path, {"model": wrapped})
        inner.append(_weights(model))
        with torch.no_grad():
            for one in model.parameters():
                one.sub_(0.1 * (fabric.global_rank + 1))  # an inner step that needs no state
        for _ in range(3):
            fabric.strategy.optimizer_step(optimizer.optimizer, lambda: None)
        return torch.stack([*inner, _weights(model)])


def test_the_outer_momentum_survives_a_checkpoint(ranks: RankPool, tmp_path: Path) -> None:
    """The second outer step is made with the momentum of the first."""
    (fresh, loaded, after), _ = ranks.run(_resumed, str(tmp_path / "checkpoint"))
    first = (fresh - loaded) / (0.5 * 1.8)  # the outer gradient of the first round: momentum and gradient are one
    second = torch.full_like(first, 0.15)  # the mean of 0.1 and 0.2
    expected = loaded - 0.5 * (second + 0.8 * (0.8 * first + second))
    torch.testing.assert_close(after, expected)


def _saved_between(path: str) -> tuple[torch.Tensor, torch.Tensor]:
    with Fabric(accelerator="cpu", devices=2, strategy=STRATEGY) as fabric:
        model, wrapped, optimizer = _set_up(fabric)
        _train(fabric, wrapped, optimizer, range(3))
        there = _weights(model)
        _train(fabric, wrapped, optimizer, range(3, 5))
        fabric.save(path, {"model": wrapped})
        fabric.load(path, {"model": wrapped})
        return there, _weights(model)


def test_what_is_saved_is_where_the_outer_optimizer_is(ranks: RankPool, tmp_path: Path) -> None:
    """Two steps past an outer step, the file holds the model as it was then."""
    for there, loaded in ranks.run(_saved_between, str(tmp_path / "checkpoint")):
        assert torch.equal(there, loaded)
