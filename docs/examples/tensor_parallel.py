"""Divide single layers over ranks: each computes a part of every block.

python tensor_parallel.py --devices 2
"""

import argparse
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from fabric_core import Fabric
from fabric_plugins.strategies import ModelParallelStrategy


class Block(nn.Module):
    """A layer up and a layer down, ``(batch, 16) -> (batch, 16)``."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(16, 64)
        self.down = nn.Linear(64, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Add what the layers make of it."""
        y: torch.Tensor = x + self.down(torch.relu(self.up(x)))
        return y


def spread(model: nn.Module, mesh: Any) -> None:
    """Let each rank hold some columns of the way up, and the rows of the way down that belong to them."""
    for block in model.children():
        parallelize_module(block, mesh["tensor_parallel"], {"up": ColwiseParallel(), "down": RowwiseParallel()})


def main() -> None:
    """Train on ranks that all read the same data."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--steps", type=int, default=50)
    asked = parser.parse_args()

    strategy = ModelParallelStrategy(parallelize_fn=spread, tensor_parallel_size=asked.devices)
    with Fabric(strategy=strategy, devices=asked.devices) as fabric:
        fabric.launch()
        fabric.seed_everything(1)
        bare = nn.Sequential(Block(), Block())
        model, optimizer = fabric.setup(bare, torch.optim.AdamW(bare.parameters(), lr=1e-2))
        draw = torch.Generator().manual_seed(0)  # the same numbers on every rank
        for step in range(asked.steps):
            x = fabric.to_device(torch.randn(32, 16, generator=draw))
            loss = (model(x) - x.flip(dims=(1,))).square().mean()
            fabric.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            if step % 10 == 0 or step + 1 == asked.steps:
                fabric.print(f"step {step}: loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
