"""Run a method other than ``forward`` through the strategy: ``generate`` of a model whose parameters lie in shards.

python inference.py --strategy fsdp --devices 2
"""

import argparse
from typing import Any

import torch
from torch import nn

from fabric_core import Fabric


class Speaker(nn.Module):
    """Scores the next of ten words, and goes on by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 16)
        self.head = nn.Linear(16, 10)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        """``(batch, time) -> (batch, time, 10)``."""
        scores: torch.Tensor = self.head(self.embed(words))
        return scores

    def generate(self, words: torch.Tensor, count: int) -> torch.Tensor:
        """Go on from the words, ``(batch, time)``, by ``count`` likeliest ones."""
        for _ in range(count):
            words = torch.cat([words, self(words)[:, -1:].argmax(dim=-1)], dim=1)
        return words


def main() -> None:
    """Teach it to count, and let it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--strategy", default="auto")
    parser.add_argument("--devices", default="1")
    parser.add_argument("--steps", type=int, default=60)
    asked = parser.parse_args()

    with Fabric(strategy=asked.strategy, devices=asked.devices) as fabric:
        fabric.launch()
        fabric.seed_everything(1)
        bare = Speaker()
        model: Any
        model, optimizer = fabric.setup(bare, torch.optim.Adam(bare.parameters(), lr=0.1))
        words = fabric.to_device(torch.arange(10).repeat(4, 1))
        for _ in range(asked.steps):
            scores = model(words[:, :-1])
            fabric.backward(nn.functional.cross_entropy(scores.flatten(0, 1), words[:, 1:].flatten()))
            optimizer.step()
            optimizer.zero_grad()
        model.mark_forward_method("generate")
        model.eval()
        with torch.no_grad():
            said = model.generate(words[:1, :1], 9)
        fabric.print("said:", *said[0].tolist())


if __name__ == "__main__":
    main()
