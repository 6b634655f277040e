"""An optimizer that is set up beside a model trains it, or one that was set up before; else it is refused."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from fabric_core import Fabric
from fabric_core.conformance.pool import RankPool
from fabric_core.errors import SetupError


def _foreign(strategy: str) -> Any:
    with Fabric(accelerator="cpu", strategy=strategy, devices=2) as fabric:
        fabric.launch()
        first, second = nn.Linear(2, 2), nn.Linear(2, 2)
        nn.init.zeros_(first.bias)
        copied = torch.optim.SGD(copy.deepcopy(first).parameters(), lr=1.0)
        with pytest.raises(SetupError, match="would train nothing"):
            fabric.setup(first, copied)
        early = torch.optim.SGD(first.parameters(), lr=1.0)
        model = fabric.setup(first)
        # `early` holds what `first` had before it was sharded.
        _, optimizer = fabric.setup(second, early)
        fabric.backward(model(torch.ones(1, 2)).sum())
        optimizer.step()
        bias = fabric.strategy.module_state(first, full=False)["bias"]
        return bias.full_tensor().tolist() if strategy == "fsdp" else bias.tolist()


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_foreign_optimizer_is_refused(strategy: str, two_ranks: RankPool) -> None:
    """One of a copy is refused before the model is set up; one of an earlier model, made before it was, trains it."""
    assert two_ranks.run(_foreign, strategy) == [[-1.0, -1.0]] * 2
