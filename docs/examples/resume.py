"""Stop a training anywhere, and go on to the same end, bit for bit.

python resume.py --steps 20 --stop 8 --folder run  # stops
python resume.py --steps 20 --folder run           # goes on
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fabric_core import Fabric


def main() -> None:
    """Train with shuffled data and dropout, and say a sum over the parameters."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--strategy", default="auto")
    parser.add_argument("--devices", default="1")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--stop", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("run"))
    asked = parser.parse_args()

    x = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
    with Fabric(accelerator="cpu", strategy=asked.strategy, devices=asked.devices) as fabric:
        fabric.launch()
        fabric.seed_everything(1)
        bare = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.2), nn.Linear(16, 1))
        model, optimizer = fabric.setup(bare, torch.optim.AdamW(bare.parameters(), lr=1e-2))
        loader = fabric.setup_dataloaders(DataLoader(TensorDataset(x, x.sum(1, True)), batch_size=5, shuffle=True))
        # The loader's state is where it is in its epoch; every rank's random numbers are kept.
        state: dict[str, Any] = {
            "model": model,
            "optimizer": optimizer,
            "loader": loader,
            "random": fabric.random_state,
            "step": 0,
        }
        if (asked.folder / "state").exists():
            fabric.load(asked.folder / "state", state)
        while state["step"] < asked.steps:
            for inputs, targets in loader:
                fabric.backward((model(inputs) - targets).square().mean())
                optimizer.step()
                optimizer.zero_grad()
                state["step"] += 1
                if state["step"] == asked.stop:
                    fabric.save(asked.folder / "state", state)
                    return
                if state["step"] == asked.steps:
                    break
        whole = sum(one.detach().double().sum().item() for one in bare.parameters())
        fabric.print(f"after {state['step']} steps: {whole:.15f}")


if __name__ == "__main__":
    main()
