"""Learn to learn (MAML): start where one step on a few points of a task leads far; each rank draws tasks of its own.

The loss of the outer loop depends on gradients of the inner one, which a strategy must not average: the tasks differ
between ranks. So all of it runs inside ``no_backward_sync``, and the script averages what comes out.

python meta_learning.py --strategy ddp --devices 2
"""

import argparse
import math

import torch
from torch import nn
from torch.func import functional_call

from fabric_core import Fabric

RATE, TASKS, POINTS = 0.05, 8, 10


def draw_task(draw: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw a wave and look at it: ``(points, 1)`` places, the first half to adapt on, and its heights there."""
    height = 1 + torch.rand(1, generator=draw)
    shift = math.pi / 2 * torch.rand(1, generator=draw)
    x = 6 * torch.rand(2 * POINTS, 1, generator=draw) - 3
    return x, height * torch.sin(x + shift)


def main() -> None:
    """Train, and say how small the loss is after one step of adapting."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--strategy", default="auto")
    parser.add_argument("--devices", default="1")
    parser.add_argument("--steps", type=int, default=200)
    asked = parser.parse_args()

    with Fabric(accelerator="cpu", strategy=asked.strategy, devices=asked.devices) as fabric:
        fabric.launch()
        fabric.seed_everything(1)
        net = nn.Sequential(nn.Linear(1, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 1))
        model, optimizer = fabric.setup(net, torch.optim.Adam(net.parameters(), lr=2e-3))
        draw = torch.Generator().manual_seed(0)
        for step in range(asked.steps):
            losses = []
            for number in range(TASKS):
                x, y = draw_task(draw)
                if number % fabric.world_size != fabric.global_rank:
                    continue  # another rank's; drawn all the same, so that the tasks don't depend on the ranks
                with fabric.no_backward_sync(model):
                    before = dict(net.named_parameters())
                    inner = (model(x[:POINTS]) - y[:POINTS]).square().mean()
                    slopes = torch.autograd.grad(inner, list(before.values()), create_graph=True)
                    after = {name: p - RATE * slope for (name, p), slope in zip(before.items(), slopes, strict=True)}
                    loss = (functional_call(net, after, (x[POINTS:],)) - y[POINTS:]).square().mean()
                    fabric.backward(loss * fabric.world_size / TASKS)
                losses.append(loss.detach())
            for parameter in net.parameters():
                parameter.grad = fabric.all_reduce(parameter.grad)
            optimizer.step()
            optimizer.zero_grad()
            if step % 20 == 0 or step + 1 == asked.steps:
                fabric.print(f"step {step}: loss {fabric.all_reduce(torch.stack(losses).mean()).item():.3f}")


if __name__ == "__main__":
    main()
