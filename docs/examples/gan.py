"""Train a generator against a discriminator: two models, two optimizers, one Fabric.

python gan.py --strategy ddp --devices 2
"""

import argparse

import torch
from torch import nn
from torch.nn import functional as F

from fabric_core import Fabric


def main() -> None:
    """Learn a ring of points, and say how far from it the generated ones are."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--strategy", default="auto")
    parser.add_argument("--devices", default="1")
    parser.add_argument("--steps", type=int, default=600)
    asked = parser.parse_args()

    with Fabric(strategy=asked.strategy, devices=asked.devices) as fabric:
        fabric.launch()
        fabric.seed_everything(1)
        made = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 2))
        judged = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 1))
        generator, g_optimizer = fabric.setup(made, torch.optim.Adam(made.parameters(), lr=1e-3))
        discriminator, d_optimizer = fabric.setup(judged, torch.optim.Adam(judged.parameters(), lr=1e-3))
        draw = torch.Generator().manual_seed(fabric.global_rank)
        for step in range(asked.steps):
            angle = 6.2832 * torch.rand(64, generator=draw)
            real = fabric.to_device(torch.stack([angle.cos(), angle.sin()], dim=1))
            fake = generator(fabric.to_device(torch.randn(64, 2, generator=draw)))

            # The generator's part stays out of the discriminator's pass.
            d_loss = F.softplus(-discriminator(real)).mean() + F.softplus(discriminator(fake.detach())).mean()
            fabric.backward(d_loss, model=discriminator)
            d_optimizer.step()

            # The discriminator gets gradients here too; they are cleared before its next pass.
            fabric.backward(F.softplus(-discriminator(fake)).mean(), model=generator)
            g_optimizer.step()
            g_optimizer.zero_grad()
            d_optimizer.zero_grad()
            if step % 100 == 0 or step + 1 == asked.steps:
                off = (fake.detach().norm(dim=1) - 1).abs().mean()
                fabric.print(f"step {step}: {fabric.all_reduce(off).item():.3f} from the ring")


if __name__ == "__main__":
    main()
