"""A run that may be killed at any step and started again, as docs/how-to/resume-exactly.md says.

python _resumed_run.py STRATEGY DEVICES PRECISION WORKERS CHECKPOINT RESULT KILL_AT
"""

import os
import random
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from fabric_core import Fabric
from fabric_plugins.precisions import Float16MixedPrecision

EPOCHS = 3
ACCUMULATE = 2
STEPS_OF_TWO = 9
"""Steps of the whole run, where two processes share the data."""


class Noisy(Dataset[torch.Tensor]):
    """Items that are augmented at random, from three sources."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> torch.Tensor:
        noise = torch.rand(4) + float(np.random.rand()) + random.random()  # noqa: NPY002, S311 - what users draw from
        return torch.full((4,), index / 24) + 0.1 * noise


class Abandoned(Exception):  # noqa: N818 - it stands for a process that was killed
    """The run ends here, as if it were killed."""


def fabric_of(strategy: str, devices: int, precision: str) -> Fabric:
    """Make the Fabric of a run; its loss scale changes soon and often."""
    chosen: Any = Float16MixedPrecision(init_scale=2.0**8, growth_interval=2) if precision == "16-mixed" else precision
    return Fabric(accelerator="cpu", strategy=strategy, devices=devices, precision=chosen)


def train(fabric: Fabric, path: Path, workers: int, kill_at: int | None, *, process: bool = False) -> list[Any]:
    """Train, and go on where a checkpoint is; gives the loss of every batch of this run, and what was trained."""
    fabric.seed_everything(7 + fabric.global_rank)
    torch.set_num_threads(1)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 1))
    model, optimizer = fabric.setup(net, torch.optim.AdamW(net.parameters(), lr=0.02))
    loader = fabric.setup_dataloaders(DataLoader(Noisy(), batch_size=2, shuffle=True, num_workers=workers))
    state: dict[str, Any] = {
        "model": model,
        "optimizer": optimizer,
        "loader": loader,
        "random": fabric.random_state,
        "epoch": 0,
        "batches": 0,
    }
    if path.exists():
        fabric.load(path, state)
    losses, steps = [], 0
    for epoch in range(state["epoch"], EPOCHS):
        state["epoch"] = epoch
        for batch in loader:
            state["batches"] += 1
            last = state["batches"] % ACCUMULATE == 0
            with fabric.no_backward_sync(model, enabled=not last):
                loss = model(batch).square().mean()
                fabric.backward(loss / ACCUMULATE)
            losses.append((state["batches"], loss.item()))
            if last:
                optimizer.step()
                optimizer.zero_grad()
                fabric.save(path, state)
                steps += 1
                if steps == kill_at:
                    if process:
                        os.kill(os.getpid(), signal.SIGKILL)
                    raise Abandoned
    whole = [one.full_tensor() if hasattr(one, "full_tensor") else one for one in net.parameters()]
    return [losses, [one.detach().tolist() for one in whole], fabric.precision.state_dict()]


def main() -> None:
    """Run as a script of its own, which is killed for good."""
    strategy, devices, precision, workers, path, result, kill_at = sys.argv[1:]
    with fabric_of(strategy, int(devices), precision) as fabric:
        fabric.launch()
        rank = fabric.global_rank
        got = train(fabric, Path(path), int(workers), int(kill_at) if rank == 0 else None, process=True)
        torch.save(got, f"{result}.{rank}")


if __name__ == "__main__":
    main()
