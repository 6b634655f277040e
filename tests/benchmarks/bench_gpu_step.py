"""Tokens per second of a 124 M-parameter transformer in bf16 on one GPU: by hand, here, and with Lightning Fabric.

The contestants take turns in one process. On a machine without a GPU it says so and ends.
"""

import argparse
import contextlib
import importlib.util
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from _rounds import table
from _transformer import Transformer
from torch import nn

WIDTH, DEPTH, VOCABULARY, TIME = 768, 12, 25_600, 1024
Step = Callable[[torch.Tensor], None]


def step_of(model: Any, optimizer: Any, backward: Callable[[torch.Tensor], Any], autocast: Any) -> Step:
    """Make one training step."""

    def step(tokens: torch.Tensor) -> None:
        with autocast():
            logits = model(tokens)
        backward(nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten()))
        optimizer.step()
        optimizer.zero_grad()

    return step


def contestants(device: torch.device, size: tuple[int, int, int]) -> dict[str, Step]:
    """Set up everyone on one device."""
    from fabric_core import Fabric

    kinds: dict[str, Any] = {"here": Fabric}
    if importlib.util.find_spec("lightning") is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from lightning.fabric import Fabric as Lightning
        kinds["Lightning"] = Lightning
    model = Transformer(*size).to(device)
    steps = {
        "by hand": step_of(
            model,
            torch.optim.AdamW(model.parameters(), fused=True),
            torch.autograd.backward,
            lambda: torch.autocast(device.type, torch.bfloat16),
        )
    }
    for name, kind in kinds.items():
        fabric = kind(accelerator=device.type, devices=1, precision="bf16-mixed")
        wrapped, optimizer = fabric.setup(raw := Transformer(*size), torch.optim.AdamW(raw.parameters(), fused=True))
        steps[name] = step_of(wrapped, optimizer, fabric.backward, contextlib.nullcontext)
    return steps


def measure(device: torch.device, size: tuple[int, int, int], tokens: torch.Tensor, rounds: int, turn: int) -> str:
    """Take turns; gives a table."""
    wait: Callable[[], None] = torch.accelerator.synchronize if torch.accelerator.is_available() else lambda: None
    steps = contestants(device, size)
    names = list(steps)
    times: dict[str, list[float]] = {name: [] for name in names}
    for round_ in range(rounds + 1):
        first = round_ % len(names)
        for name in names[first:] + names[:first]:
            wait()
            start = time.perf_counter()
            for _ in range(turn):
                steps[name](tokens)
            wait()
            if round_ > 0:
                times[name].append((time.perf_counter() - start) / turn)
    rows = []
    for name in names:
        ratio = statistics.median(h / t for h, t in zip(times["by hand"], times[name], strict=True))
        rows.append((name, f"{tokens.numel() / statistics.median(times[name]):.0f}", f"{ratio:.3f}"))
    return table(f"A training step in bf16 on {device.type}", ("", "tokens/s", "of by hand"), rows)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--batch", type=int, default=8)
    given = parser.parse_args()
    if torch.cuda.device_count() == 0:
        print("bench_gpu_step: needs a CUDA device, and this machine has none.")
        return
    device = torch.device("cuda", 0)
    tokens = torch.randint(VOCABULARY, (given.batch, TIME), device=device)
    print(measure(device, (WIDTH, DEPTH, VOCABULARY), tokens, given.rounds, 10))


if __name__ == "__main__":
    main()
