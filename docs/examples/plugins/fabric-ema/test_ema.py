"""The wrapper ``ema`` equals an average by plain PyTorch, bit for bit, whole and in shards."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fabric_ema import EMAWrapper
from torch import nn
from torch.distributed.tensor import DTensor

from fabric_core import Fabric
from fabric_core.conformance import RankPool, suite

test_rules = suite("wrapper", "ema")

DECAY = 0.9


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankPool]:
    """Give two ranks."""
    with RankPool(2) as pool:
        yield pool


def _model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


def ema(fabric: Fabric) -> EMAWrapper:
    """Give the only wrapper."""
    (wrapper,) = fabric.wrappers.values()
    assert isinstance(wrapper, EMAWrapper)
    return wrapper


def _weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: (one.full_tensor() if isinstance(one, DTensor) else one).detach().clone()
        for name, one in model.named_parameters()
    }


def _step(fabric: Fabric, model: Any, optimizer: Any, step: int) -> None:
    x = torch.randn(4, 4, generator=torch.Generator().manual_seed(10 * step + fabric.global_rank))
    optimizer.zero_grad()
    fabric.backward(model(x).square().mean())
    optimizer.step()


def _trained(strategy: str) -> tuple[bool, bool, bool]:
    with Fabric(accelerator="cpu", devices=2, strategy=strategy, wrappers=[f"ema:decay={DECAY}"]) as fabric:
        fabric.launch()
        model = _model()
        wrapped, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=0.1))
        expected = _weights(model)
        for step in range(5):
            _step(fabric, wrapped, optimizer, step)
            for name, one in _weights(model).items():
                expected[name].lerp_(one, 1 - DECAY)
        own = _weights(model)
        x = torch.ones(1, 4)
        with ema(fabric).averaged(fabric, wrapped):
            inside = _weights(model)
            bare = _model()
            bare.load_state_dict(expected)
            same = torch.allclose(wrapped(x), bare(x))
        equal = all(torch.equal(inside[name], expected[name]) for name in expected)
        back = all(torch.equal(one, own[name]) for name, one in _weights(model).items())
        return equal, same, back


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_it_equals_the_average_written_by_hand(ranks: RankPool, strategy: str) -> None:
    """Inside the context the model has the average, after it its own weights."""
    assert ranks.run(_trained, strategy) == [(True, True, True)] * 2


def _saved(first: str, second: str, path: str) -> bool:
    averages = []  # type: ignore[var-annotated]
    for strategy in (first, second):
        with Fabric(accelerator="cpu", devices=2, strategy=strategy, wrappers=[EMAWrapper(decay=DECAY)]) as fabric:
            fabric.launch()
            model = _model(seed=len(averages))
            wrapped, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
            if averages:
                fabric.load(path, {"model": wrapped, "optimizer": optimizer})
            else:
                _step(fabric, wrapped, optimizer, 0)
                fabric.save(path, {"model": wrapped, "optimizer": optimizer})
            with ema(fabric).averaged(fabric, wrapped):
                averages.append(_weights(model))
    one, other = averages
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("pair", [("ddp", "ddp"), ("ddp", "fsdp"), ("fsdp", "ddp")], ids="-".join)
def test_averages_travel_with_checkpoints(ranks: RankPool, pair: tuple[str, str], tmp_path: Path) -> None:
    """From one strategy to another, too."""
    assert ranks.run(_saved, *pair, str(tmp_path / "checkpoint")) == [True, True]


def test_each_model_has_its_own() -> None:
    """Two models, whose optimizers step in turn."""
    with Fabric(accelerator="cpu", devices=1, wrappers=["ema:decay=0.5"]) as fabric:
        models = [_model(0), _model(1)]
        pairs = [fabric.setup(one, torch.optim.SGD(one.parameters(), lr=0.1)) for one in models]
        starts = [_weights(one) for one in models]
        _step(fabric, *pairs[0], 0)
        with ema(fabric).averaged(fabric, pairs[1][0]):
            assert all(torch.equal(one, starts[1][name]) for name, one in _weights(models[1]).items())
        own = _weights(models[0])
        with ema(fabric).averaged(fabric, pairs[0][0]):
            for name, one in _weights(models[0]).items():
                torch.testing.assert_close(one, (own[name] + starts[0][name]) / 2)


def test_a_skipped_step_leaves_the_average() -> None:
    """Where the precision skips a step on gradients that overflowed, nothing moves."""
    with Fabric(accelerator="cpu", devices=1, precision="16-mixed", wrappers=["ema:decay=0.5"]) as fabric:
        model = nn.Linear(2, 1)
        wrapped, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
        start = _weights(model)
        fabric.backward(wrapped(torch.ones(1, 2)).sum() * float("inf"))
        optimizer.step()
        with ema(fabric).averaged(fabric, wrapped):
            assert all(torch.equal(one, start[name]) for name, one in _weights(model).items())
