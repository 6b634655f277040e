"""Two DDP ranks on half batches train as one process does on the whole batch."""

import torch
from torch import nn

from fabric_core import Fabric
from fabric_core.conformance.pool import RankPool


def _train(strategy: str, devices: int) -> list[torch.Tensor]:
    with Fabric(accelerator="cpu", strategy=strategy, devices=devices) as fabric:
        fabric.launch()
        torch.manual_seed(7)
        model = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 3)).double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        generator = torch.Generator().manual_seed(3)
        x = torch.randn(10, 8, 5, generator=generator, dtype=torch.float64)
        y = torch.randn(10, 8, 3, generator=generator, dtype=torch.float64)
        wrapped, stepper = fabric.setup(model, optimizer)
        for inputs, targets in zip(x, y, strict=True):
            own = slice(fabric.global_rank, None, devices)
            loss = nn.functional.mse_loss(wrapped(inputs[own]), targets[own])
            fabric.backward(loss)
            stepper.step()
            stepper.zero_grad()
        return [parameter.detach().clone() for parameter in model.parameters()]


def test_two_ranks_equal_one_process(two_ranks: RankPool) -> None:
    """In float64 the parameters agree to 1e-12 after ten steps with momentum."""
    alone = _train("single_device", 1)
    for rank in two_ranks.run(_train, "ddp", 2):
        for mine, reference in zip(rank, alone, strict=True):
            torch.testing.assert_close(mine, reference, rtol=0, atol=1e-12)
