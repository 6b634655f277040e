"""Tokens per second of a 124 M-parameter transformer in bf16 on one GPU: by hand, here, and with Lightning Fabric.

Each strategy at world size 1, DDP and FSDP with NCCL. The contestants take turns in one process. On a machine without a
GPU it says so and ends; ``--device cpu`` runs it there all the same, on a model of a few thousand parameters, to see
that it runs.
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
import torch.distributed as dist
from _rounds import table
from _transformer import Block, Transformer, hand_ddp, hand_fsdp
from torch import nn

FULL, SMALL = (768, 12, 25_600), (32, 2, 64)
"""Width, depth and vocabulary; the first has 124 M parameters."""
Step = Callable[[torch.Tensor], None]


def step_of(model: Any, optimizer: Any, backward: Callable[[torch.Tensor], Any], context: Callable[[], Any]) -> Step:
    """Make one training step."""

    def step(tokens: torch.Tensor) -> None:
        with context():
            logits = model(tokens)
        backward(nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten()))
        optimizer.step()
        optimizer.zero_grad()

    return step


def by_hand(strategy: str, device: torch.device, size: tuple[int, int, int]) -> Step:
    """Plain PyTorch."""
    model: nn.Module = Transformer(*size).to(device)
    context: Callable[[], Any] = lambda: torch.autocast(device.type, torch.bfloat16)  # noqa: E731
    if strategy == "ddp":
        model = hand_ddp(model)
    elif strategy == "fsdp":
        model, context = hand_fsdp(model, device.type, torch.bfloat16), contextlib.nullcontext
    return step_of(model, torch.optim.AdamW(model.parameters(), fused=True), torch.autograd.backward, context)


def by_fabric(kind: Any, strategy: Any, device: torch.device, size: tuple[int, int, int]) -> Step:
    """This project, or Lightning Fabric."""
    fabric = kind(accelerator=device.type, strategy=strategy, devices=1, precision="bf16-mixed")
    fabric.launch()
    model = fabric.setup_module(Transformer(*size))
    optimizer = fabric.setup_optimizers(torch.optim.AdamW(model.parameters(), fused=True))
    return step_of(model, optimizer, fabric.backward, contextlib.nullcontext)


def contestants(device: torch.device, size: tuple[int, int, int]) -> dict[tuple[str, str], Step]:
    """Set up everyone on one device; gives their steps by strategy and by who made them."""
    from fabric_core import Fabric

    steps: dict[tuple[str, str], Step] = {}
    for strategy in ("single_device", "ddp", "fsdp"):
        steps[strategy, "by hand"] = by_hand(strategy, device, size)
        steps[strategy, "here"] = by_fabric(Fabric, strategy, device, size)
    if importlib.util.find_spec("lightning") is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from lightning.fabric import Fabric as Lightning
            from lightning.fabric.strategies.ddp import DDPStrategy
            from lightning.fabric.strategies.fsdp import FSDPStrategy

            theirs: dict[str, Any] = {"single_device": "auto", "ddp": DDPStrategy(gradient_as_bucket_view=True)}
            if device.type == "cuda":  # it has no other FSDP, and FSDP1, which that is, no CPU
                theirs["fsdp"] = FSDPStrategy(auto_wrap_policy={Block})
            for strategy, given in theirs.items():
                steps[strategy, "Lightning"] = by_fabric(Lightning, given, device, size)
    return steps


def measure(device: torch.device, size: tuple[int, int, int], tokens: torch.Tensor, rounds: int, turn: int) -> str:
    """Take turns; gives a table."""
    wait: Callable[[], None] = torch.accelerator.synchronize if device.type != "cpu" else lambda: None
    steps = contestants(device, size)
    names = list(steps)
    times: dict[tuple[str, str], list[float]] = {name: [] for name in names}
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
    for strategy, who in sorted(names, key=lambda name: [one for one, _ in names].index(name[0])):
        own, hand = times[strategy, who], times[strategy, "by hand"]
        ratio = statistics.median(h / t for h, t in zip(hand, own, strict=True))
        rows.append((strategy, who, f"{tokens.numel() / statistics.median(own):.0f}", f"{ratio:.3f}"))
    return table(f"A training step in bf16 on {device.type}", ("strategy", "", "tokens/s", "of by hand"), rows)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--time", type=int, default=1024)
    given = parser.parse_args()
    if given.device == "cuda" and torch.cuda.device_count() == 0:
        print("bench_gpu_step: needs a CUDA device, and this machine has none.")
        return
    device = torch.device("cuda", 0) if given.device == "cuda" else torch.device("cpu")
    size = FULL if given.device == "cuda" else SMALL
    tokens = torch.randint(size[2], (given.batch, given.time), device=device)
    backend = "cpu:gloo,cuda:nccl" if given.device == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        print(measure(device, size, tokens, given.rounds, given.steps))
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
