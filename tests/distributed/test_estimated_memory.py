"""What a strategy says that a rank will hold is what it holds after a step."""

from typing import Any

import pytest
import torch
from torch import nn

from fabric_core import Fabric
from fabric_core.conformance.pool import RankPool
from fabric_core.contracts import MemoryEstimate, PrecisionPolicy, ProcessInfo
from fabric_core.errors import MisuseError
from fabric_plugins.strategies import ModelParallelStrategy


def _model() -> nn.Module:
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(2)]
    return nn.Sequential(nn.Linear(3, 8), nn.Sequential(*blocks), nn.BatchNorm1d(8), nn.Linear(8, 5))


def _size(tensors: Any) -> int:
    own = [one.to_local() if hasattr(one, "to_local") else one for one in tensors]
    return sum(one.numel() * one.element_size() for one in own)


def _train(strategy: str, devices: int) -> tuple[MemoryEstimate, tuple[int, int, int]]:
    """Ask before the launch, and count after a step."""
    with Fabric(accelerator="cpu", strategy=strategy, devices=devices) as fabric:
        alone = _model()
        optimizer = torch.optim.AdamW(alone.parameters())
        torch.autograd.backward(alone(torch.ones(4, 3)).sum())
        optimizer.step()
        info = ProcessInfo(world_size=devices, local_world_size=devices)
        said = fabric.strategy.estimate_memory(info, fabric.precision.policy, alone, optimizer)
        fabric.launch()
        model, stepper = fabric.setup(bare := _model(), torch.optim.AdamW(bare.parameters()))
        fabric.backward(model(torch.ones(4, 3)).sum())
        stepper.step()
        parameters = list(model.parameters())
        gradients = _size(one.grad for one in parameters if one.grad is not None)
        state = _size(value for one in stepper.state.values() for value in one.values())
        return said, (_size((*parameters, *model.buffers())), gradients, state)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_ranks_hold_what_was_said(strategy: str, two_ranks: RankPool) -> None:
    """To the byte, but for the last row of what two ranks divide unevenly, which is counted for each."""
    rows = 4 * (8 + 1) * (4 if strategy == "fsdp" else 0)
    for said, (parameters, gradients, state) in two_ranks.run(_train, strategy, 2):
        assert 0 <= said.parameters - parameters <= rows
        assert 0 <= said.gradients - gradients <= rows
        assert 0 <= said.optimizer - state <= 2 * rows


def test_one_process_holds_what_was_said() -> None:
    """To the byte."""
    said, held = _train("single_device", 1)
    assert (said.parameters, said.gradients, said.optimizer) == held
    assert (said.in_flight, said.gradients_stay) == (0, False)


def test_who_divides_and_does_not_say_is_an_error() -> None:
    """What a function of the user's leaves on a rank isn't known before it ran."""
    model = _model()
    strategy = ModelParallelStrategy(parallelize_fn=print)
    with pytest.raises(MisuseError, match="ModelParallelStrategy doesn't say what a rank will hold"):
        strategy.estimate_memory(ProcessInfo(), PrecisionPolicy(), model, torch.optim.SGD(model.parameters()))
