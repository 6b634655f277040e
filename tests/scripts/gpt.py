# mypy: ignore-errors
"""Pretrains a small GPT: accumulation, clipping, a schedule, loggers, throughput, and going on from a checkpoint.

Written as for Lightning Fabric; ``switch.py`` says which library it runs on: ``python gpt.py FOLDER DEVICES``.
"""

import math
import sys
import time
from pathlib import Path

import torch
from switch import (
    CSVLogger,
    Fabric,
    TensorBoardLogger,
    ThroughputMonitor,
    is_wrapped,
    measure_flops,
    rank_zero_only,
    seed_everything,
)
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

BLOCK, WORDS, WIDTH, ACCUMULATE = 16, 32, 32, 2


class Text(Dataset):
    """Sequences in which each word follows from the two before it."""

    def __init__(self, length=64):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        words = [index % WORDS, (index * 7) % WORDS]
        for _ in range(BLOCK - 1):
            words.append((words[-1] + 3 * words[-2] + 1) % WORDS)
        words = torch.tensor(words)
        return words[:BLOCK], words[1 : BLOCK + 1]


class Block(nn.Module):
    """Attention and a perceptron, each with a way round it."""

    def __init__(self):
        super().__init__()
        self.before, self.between = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.perceptron = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x):
        batch, length, width = x.shape
        parts = self.attention(self.before(x)).view(batch, length, 3, 4, width // 4)
        q, k, v = (part.transpose(1, 2) for part in parts.unbind(2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(batch, length, width))
        return x + self.perceptron(self.between(x))


class GPT(nn.Module):
    """Words in, scores of the next words out."""

    def __init__(self):
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, WIDTH), nn.Embedding(BLOCK, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WORDS, bias=False)

    def forward(self, words):
        x = self.words(words) + self.places(torch.arange(words.shape[1], device=words.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    def score(self, words, targets):
        return F.cross_entropy(self(words).flatten(0, 1), targets.flatten())


@torch.no_grad()
def validate(fabric, model, loader):
    model.eval()
    losses = torch.stack([model.score(words, targets) for words, targets in loader])
    model.train()
    return fabric.all_reduce(losses.mean(), reduce_op="mean")


def train(fabric, folder, epochs, checkpoint=None):
    with fabric.init_module():
        model = GPT()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95))
    model, optimizer = fabric.setup(model, optimizer)
    model.mark_forward_method("score")
    assert is_wrapped(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 * (1 + math.cos(step / 20)))
    loader, held_out = fabric.setup_dataloaders(
        DataLoader(Text(), batch_size=8 // fabric.world_size, shuffle=True),
        DataLoader(Text(16), batch_size=8 // fabric.world_size),
    )
    state = {"model": model, "optimizer": optimizer, "schedule": schedule, "step": 0, "epoch": 0}
    if checkpoint is not None:
        fabric.load(checkpoint, state)
    with torch.device("meta"):
        idle = GPT()
        words = torch.zeros(1, BLOCK, dtype=torch.long)
    flops = measure_flops(idle, lambda: idle(words), lambda y: y.sum())
    monitor = ThroughputMonitor(fabric, window_size=2)
    begin, samples = time.perf_counter(), 0
    for epoch in range(state["epoch"], epochs):
        for index, (words, targets) in enumerate(loader):
            accumulating = (index + 1) % ACCUMULATE != 0
            with fabric.no_backward_sync(model, enabled=accumulating):
                loss = F.cross_entropy(model(words).flatten(0, 1), targets.flatten())
                fabric.backward(loss / ACCUMULATE)
            samples += len(words)
            if accumulating:
                continue
            norm = fabric.clip_gradients(model, optimizer, max_norm=1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            state["step"] += 1
            mean = fabric.all_reduce(loss.detach(), reduce_op="mean")
            fabric.log_dict({"loss": mean, "norm": norm, "rate": schedule.get_last_lr()[0]}, step=state["step"])
            fabric.print(f"step {state['step']} loss {mean.item():.6f} norm {norm.item():.5f}")
            monitor.update(
                time=time.perf_counter() - begin, batches=state["step"], samples=samples, flops=flops * len(words)
            )
            monitor.compute_and_log(step=state["step"])
        fabric.log("held_out", value := validate(fabric, model, held_out), step=state["step"])
        fabric.print(f"epoch {epoch} held out {value.item():.6f}")
        state["epoch"] = epoch + 1
        fabric.save(folder / f"epoch-{epoch}.ckpt", state)
    return state["step"]


@rank_zero_only
def report(folder):
    lines = (Path(folder) / "metrics.csv").read_text().splitlines()
    print(f"{sum(',' in line for line in lines) > 4} rows, columns {'loss' in lines[0]} {'held_out' in lines[0]}")


def main():
    folder, devices = Path(sys.argv[1]), int(sys.argv[2])
    loggers = [CSVLogger(folder, name="csv", flush_logs_every_n_steps=1), TensorBoardLogger(folder, name="events")]
    fabric = Fabric(accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto", loggers=loggers)
    fabric.launch()
    fabric.seed_everything(11)
    fabric.logger.log_metrics({"start": 0.0}, 0)
    fabric.print(f"steps {train(fabric, folder, epochs=2)}")
    fabric.barrier()
    seed_everything(12)
    fabric.print("again from the first epoch")
    fabric.print(f"steps {train(fabric, folder, epochs=2, checkpoint=folder / 'epoch-0.ckpt')}")
    fabric.print(sorted(fabric.load(folder / "epoch-1.ckpt")))
    for logger in fabric.loggers:
        logger.save()
    report(fabric.logger.log_dir)


if __name__ == "__main__":
    main()
