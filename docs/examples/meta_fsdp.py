"""Make a model on the meta device, and let FSDP allocate each rank's shards alone.

python meta_fsdp.py --devices 2
"""

import argparse

import torch
from torch import nn

from fabric_core import Fabric
from fabric_plugins.strategies import FSDPStrategy


def main() -> None:
    """Train a model that is never whole on any rank."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--steps", type=int, default=50)
    asked = parser.parse_args()

    # Each of these blocks is gathered for its own computation only.
    strategy = FSDPStrategy(auto_wrap_policy=["TransformerEncoderLayer"])
    with Fabric(strategy=strategy, devices=asked.devices) as fabric:
        fabric.launch()
        fabric.seed_everything(1)
        with fabric.init_module(empty_init=True):
            bare = nn.Sequential(
                *(nn.TransformerEncoderLayer(32, 4, 64, 0.0, batch_first=True) for _ in range(3)), nn.Linear(32, 1)
            )
        model = fabric.setup_module(bare)
        optimizer = fabric.setup_optimizers(torch.optim.AdamW(model.parameters(), lr=1e-3))
        draw = torch.Generator().manual_seed(fabric.global_rank)
        for step in range(asked.steps):
            x = fabric.to_device(torch.randn(8, 5, 32, generator=draw))
            loss = (model(x)[..., 0] - x.mean(dim=-1)).square().mean()
            fabric.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            if step % 10 == 0 or step + 1 == asked.steps:
                fabric.print(f"step {step}: loss {fabric.all_reduce(loss.detach()).item():.3f}")


if __name__ == "__main__":
    main()
