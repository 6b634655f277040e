"""``fabric.init_module(empty_init=True)`` where models are whole: memory without values, until something fills it."""

from typing import Any

import pytest
import torch
from torch import nn

from fabric_core import Fabric
from fabric_core.conformance.pool import RankPool


def _model() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Embedding(5, 4), nn.LSTM(4, 2))


def _empty(strategy: str, devices: int) -> dict[str, Any]:
    with Fabric(accelerator="cpu", strategy=strategy, devices=devices) as fabric:
        fabric.launch()
        before = torch.get_rng_state()
        with fabric.init_module(empty_init=True):
            model = _model()
        drawn = not torch.equal(before, torch.get_rng_state())
        buffers = {name: value.tolist() for name, value in model.named_buffers()}
        wrapped = fabric.setup(model)
        weights = wrapped.state_dict()
        after = torch.get_rng_state()
        nn.Linear(3, 4)
        return {
            "drawn": drawn,
            "buffers": buffers,
            "same on all ranks": all(
                torch.equal(one.nan_to_num(), fabric.broadcast(one).nan_to_num()) for one in weights.values()
            ),
            "later ones draw": not torch.equal(after, torch.get_rng_state()),
        }


@pytest.mark.parametrize(("strategy", "devices"), [("single_device", 1), ("ddp", 2)])
def test_nothing_is_drawn(strategy: str, devices: int, two_ranks: RankPool) -> None:
    """No random number is used, buffers have their values, ranks start alike, and afterwards all is as before."""
    seen = two_ranks.run(_empty, strategy, devices) if devices > 1 else [_empty(strategy, devices)]
    expected = {name: value.tolist() for name, value in _model().named_buffers()}
    assert seen == [
        {"drawn": False, "buffers": expected, "same on all ranks": True, "later ones draw": True} for _ in seen
    ]
