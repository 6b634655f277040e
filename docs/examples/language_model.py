"""Train a small language model, character by character, on the text of Python's own help.

python language_model.py --strategy ddp --devices 2 --precision bf16-mixed
"""

import argparse
from pydoc_data.topics import topics

import torch
from torch import nn
from torch.nn import functional as F

from fabric_core import Fabric

CONTEXT = 64


class LanguageModel(nn.Module):
    """A decoder of two blocks: ``(batch, time)`` of characters -> ``(batch, time, characters)`` of scores."""

    def __init__(self, characters: int, width: int = 64) -> None:
        super().__init__()
        self.embed = nn.Embedding(characters, width)
        self.place = nn.Embedding(CONTEXT, width)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(2)
        )
        self.head = nn.Linear(width, characters)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Score what comes next."""
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], device=x.device)
        h = self.embed(x) + self.place(torch.arange(x.shape[1], device=x.device))
        for block in self.blocks:
            h = block(h, src_mask=mask, is_causal=True)
        scores: torch.Tensor = self.head(h)
        return scores


def main() -> None:
    """Train, and say how the loss falls."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--strategy", default="auto")
    parser.add_argument("--devices", default="1")
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--steps", type=int, default=300)
    asked = parser.parse_args()

    text = "".join(topics.values())
    characters = sorted(set(text))
    data = torch.tensor([characters.index(one) for one in text[:200_000]])

    with Fabric(strategy=asked.strategy, devices=asked.devices, precision=asked.precision) as fabric:
        fabric.launch()
        fabric.seed_everything(1)
        bare = LanguageModel(len(characters))
        model, optimizer = fabric.setup(bare, torch.optim.AdamW(bare.parameters(), lr=3e-3))
        draw = torch.Generator().manual_seed(fabric.global_rank)  # each rank reads other places
        for step in range(asked.steps):
            starts = torch.randint(len(data) - CONTEXT - 1, (16,), generator=draw)
            batch = fabric.to_device(torch.stack([data[start : start + CONTEXT + 1] for start in starts]))
            scores = model(batch[:, :-1])
            loss = F.cross_entropy(scores.flatten(0, 1), batch[:, 1:].flatten())
            fabric.backward(loss)
            fabric.clip_gradients(model, optimizer, max_norm=1.0)
            optimizer.step()
            optimizer.zero_grad()
            if step % 10 == 0 or step + 1 == asked.steps:
                fabric.print(f"step {step}: loss {fabric.all_reduce(loss.detach()).item():.3f}")


if __name__ == "__main__":
    main()
