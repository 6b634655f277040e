"""Cross-validate: a model for each fold, all in one launch, and an exact mean over ranks.

python k_fold.py --strategy ddp --devices 2
"""

import argparse

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset, TensorDataset

from fabric_core import Fabric

FOLDS = 3


def main() -> None:
    """Train on all folds but one, judge by that one, and do so for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--strategy", default="auto")
    parser.add_argument("--devices", default="1")
    parser.add_argument("--epochs", type=int, default=3)
    asked = parser.parse_args()

    draw = torch.Generator().manual_seed(0)
    x = torch.randn(300, 8, generator=draw)
    data = TensorDataset(x, (x[:, 0] * x[:, 1] > 0).long())
    folds = torch.randperm(len(data), generator=draw).chunk(FOLDS)

    with Fabric(strategy=asked.strategy, devices=asked.devices) as fabric:
        fabric.launch()
        rates = []
        for held in range(FOLDS):
            fabric.seed_everything(held)
            bare = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2))
            model, optimizer = fabric.setup(bare, torch.optim.Adam(bare.parameters(), lr=1e-2))
            rest = torch.cat([fold for index, fold in enumerate(folds) if index != held])
            loader = fabric.setup_dataloaders(DataLoader(Subset(data, rest.tolist()), batch_size=20, shuffle=True))
            for _ in range(asked.epochs):
                for inputs, labels in loader:
                    fabric.backward(F.cross_entropy(model(inputs), labels))
                    optimizer.step()
                    optimizer.zero_grad()
            # Each rank judges every so-manieth sample: none is counted twice, and none is left out.
            inputs, labels = fabric.to_device(data[folds[held][fabric.global_rank :: fabric.world_size]])
            with torch.no_grad():
                right = (model(inputs).argmax(dim=1) == labels).sum()
            rates.append(fabric.all_reduce(right, reduce_op="sum").item() / len(folds[held]))
            fabric.print(f"fold {held}: {rates[-1]:.3f}")
        fabric.print(f"mean: {sum(rates) / FOLDS:.3f}")


if __name__ == "__main__":
    main()
