"""Learn by acting: an actor and a critic, whose ranks each play games of their own.

python reinforcement.py --strategy ddp --devices 2
"""

import argparse

import torch
from torch import nn

from fabric_core import Fabric

LENGTH = 8


def play(actor: nn.Module, draw: torch.Generator, games: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Walk on a line towards +3 or -3, whichever the game names.

    Returns:
        What was seen, ``(time, games, 2)``; what was done, ``(time, games)``; and the rewards, ``(time, games)``.
    """
    goal = 6.0 * torch.randint(0, 2, (games,), generator=draw) - 3
    place = torch.zeros(games)
    seen, done, rewards = [], [], []
    for _ in range(LENGTH):
        seen.append(torch.stack([place, goal], dim=1))
        with torch.no_grad():
            chances = actor(seen[-1]).softmax(dim=-1).cpu()
        done.append(torch.multinomial(chances, 1, generator=draw)[:, 0])
        place = place + 2 * done[-1] - 1
        rewards.append(-(place - goal).abs())
    return torch.stack(seen), torch.stack(done), torch.stack(rewards)


def main() -> None:
    """Train both, and say how the rewards rise."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--strategy", default="auto")
    parser.add_argument("--devices", default="1")
    parser.add_argument("--steps", type=int, default=150)
    asked = parser.parse_args()

    with Fabric(accelerator="cpu", strategy=asked.strategy, devices=asked.devices) as fabric:
        fabric.launch()
        fabric.seed_everything(1)
        acts = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 2))
        values = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 1))
        actor, a_optimizer = fabric.setup(acts, torch.optim.Adam(acts.parameters(), lr=1e-2))
        critic, c_optimizer = fabric.setup(values, torch.optim.Adam(values.parameters(), lr=1e-2))
        draw = torch.Generator().manual_seed(fabric.global_rank)
        for step in range(asked.steps):
            seen, done, rewards = play(actor, draw, games=32)
            returns = rewards.flip(0).cumsum(0).flip(0)
            guessed = critic(seen).squeeze(-1)
            fabric.backward((guessed - returns).square().mean(), model=critic)
            c_optimizer.step()
            c_optimizer.zero_grad()

            advantage = returns - guessed.detach()
            chosen = actor(seen).log_softmax(dim=-1).gather(-1, done[..., None])[..., 0]
            fabric.backward(-(chosen * advantage / advantage.std()).mean(), model=actor)
            a_optimizer.step()
            a_optimizer.zero_grad()
            if step % 25 == 0 or step + 1 == asked.steps:
                fabric.print(f"step {step}: reward {fabric.all_reduce(rewards.mean()).item():.3f}")


if __name__ == "__main__":
    main()
