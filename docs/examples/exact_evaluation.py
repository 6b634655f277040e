"""Evaluate over ranks exactly: every sample counts once, although their number doesn't divide.

python exact_evaluation.py --strategy ddp --devices 2
"""

import argparse

import torch
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from fabric_core import Fabric

SAMPLES = 101


def main() -> None:
    """Say the loss over all samples, the same number on any number of processes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--strategy", default="auto")
    parser.add_argument("--devices", default="1")
    asked = parser.parse_args()

    draw = torch.Generator().manual_seed(0)
    x = torch.randn(SAMPLES, 4, generator=draw, dtype=torch.float64)
    data = TensorDataset(x, x.sum(dim=1, keepdim=True))

    with Fabric(strategy=asked.strategy, devices=asked.devices) as fabric:
        fabric.launch()
        fabric.seed_everything(1)
        model = fabric.setup(nn.Linear(4, 1).double())
        # A sampler that divides pads each rank's share to one length, by samples that then count twice; shares of
        # unequal length are made here, and run without a collective until the end.
        mine = Subset(data, range(fabric.global_rank, SAMPLES, fabric.world_size))
        loader = fabric.setup_dataloaders(DataLoader(mine, batch_size=8), use_distributed_sampler=False)
        total = torch.zeros(2, dtype=torch.float64, device=fabric.device)  # the sum of losses, and of samples
        with torch.no_grad():
            for inputs, targets in loader:
                total += torch.stack([(model(inputs) - targets).square().sum(), total.new_tensor(len(inputs))])
        loss, count = fabric.all_reduce(total, reduce_op="sum").tolist()
        fabric.print(f"{count:.0f} samples, loss {loss / count:.12f}")


if __name__ == "__main__":
    main()
