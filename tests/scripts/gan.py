# mypy: ignore-errors
"""Trains two models against each other, each with an optimizer of its own: ``python gan.py FOLDER DEVICES``.

Written as for Lightning Fabric; ``switch.py`` says which library it runs on.
"""

import sys
from pathlib import Path

import torch
from switch import DDPStrategy, Fabric
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset


class Generator(nn.Module):
    """Noise in, points out."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 32), nn.LeakyReLU(0.2), nn.Linear(32, 2))

    def forward(self, noise):
        return self.layers(noise)


class Discriminator(nn.Module):
    """Points in, how real each looks out."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 32), nn.LeakyReLU(0.2), nn.Linear(32, 1))

    def forward(self, points):
        return self.layers(points).squeeze(1)


def points(count=64):
    angles = torch.linspace(0, 6.28, count)
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def main():
    folder, devices = Path(sys.argv[1]), int(sys.argv[2])
    strategy = DDPStrategy(find_unused_parameters=True) if devices > 1 else "auto"
    fabric = Fabric(accelerator="cpu", devices=devices, strategy=strategy, precision="bf16-mixed")
    fabric.launch()
    fabric.seed_everything(5)
    noise = torch.Generator().manual_seed(100 + fabric.global_rank)
    generator, discriminator = Generator(), Discriminator()
    optimizer_g = torch.optim.Adam(generator.parameters(), lr=2e-3, betas=(0.5, 0.999))
    optimizer_d = torch.optim.Adam(discriminator.parameters(), lr=2e-3, betas=(0.5, 0.999))
    generator, optimizer_g = fabric.setup(generator, optimizer_g)
    discriminator = fabric.setup_module(discriminator)
    optimizer_d = fabric.setup_optimizers(optimizer_d)
    loader = fabric.setup_dataloaders(DataLoader(TensorDataset(points()), batch_size=16 // devices, shuffle=True))
    for epoch in range(3):
        if hasattr(loader.sampler, "set_epoch"):
            loader.sampler.set_epoch(epoch)
        for (real,) in loader:
            fake = generator(torch.randn(len(real), 4, generator=noise).to(fabric.device))
            optimizer_d.zero_grad()
            with fabric.autocast():
                loss_d = F.softplus(-discriminator(real)).mean() + F.softplus(discriminator(fake.detach())).mean()
            fabric.backward(loss_d)
            fabric.clip_gradients(discriminator, optimizer_d, clip_val=0.5)
            optimizer_d.step()
            optimizer_g.zero_grad(set_to_none=True)
            discriminator.requires_grad_(False)
            loss_g = F.softplus(-discriminator(fake)).mean()
            fabric.backward(loss_g)
            discriminator.requires_grad_(True)
            optimizer_g.step()
        both = fabric.all_gather(torch.stack([loss_d.detach(), loss_g.detach()])).reshape(-1, 2).mean(0)
        fabric.print(f"epoch {epoch} losses {both[0].item():.4f} {both[1].item():.4f}")
    state = {
        "models": {"generator": generator, "discriminator": discriminator},
        "generator": generator, "discriminator": discriminator, "g": optimizer_g, "d": optimizer_d, "epoch": 3,
    }  # fmt: skip
    del state["models"]
    fabric.save(folder / "gan.ckpt", state, filter={"generator": lambda name, _: "bias" not in name})
    rest = fabric.load(folder / "gan.ckpt", {"discriminator": discriminator, "d": optimizer_d})
    fabric.print(sorted(rest), sorted(rest["generator"]))


if __name__ == "__main__":
    main()
