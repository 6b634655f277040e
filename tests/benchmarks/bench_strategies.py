"""How long a training step takes under `ddp` and `fsdp`, beside the same in plain PyTorch and beside Lightning Fabric.

Two ranks on the CPU, one thread each. All contestants live in the same two processes and take turns, in a new order
each round. A step's time is the slower rank's; its work is the CPU time of both ranks, which other programs on the
machine disturb less. Numbers are medians over rounds.
"""

import argparse
import importlib.util
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from _rounds import table
from _transformer import Transformer, hand_ddp, hand_fsdp
from torch import nn

_TWO_RANKS = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
WIDTH, DEPTH, VOCABULARY, BATCH, TIME = 256, 4, 512, 4, 64
_HEAD = ("strategy", "ms", "times plain PyTorch", "CPU ms of both", "times plain PyTorch")
Step = Callable[[torch.Tensor], None]


def step_of(model: Any, optimizer: Any, backward: Callable[[torch.Tensor], Any]) -> Step:
    """Make one training step."""

    def step(tokens: torch.Tensor) -> None:
        loss = nn.functional.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        backward(loss)
        optimizer.step()
        optimizer.zero_grad()

    return step


def by_hand(wrap: Callable[[nn.Module], nn.Module]) -> Step:
    """Plain PyTorch."""
    model = wrap(Transformer(WIDTH, DEPTH, VOCABULARY))
    return step_of(model, torch.optim.AdamW(model.parameters()), torch.autograd.backward)


def by_fabric(kind: Any, strategy: Any) -> Step:
    """This project, or Lightning Fabric."""
    fabric = kind(accelerator="cpu", strategy=strategy, devices=2)
    fabric.launch()
    model = fabric.setup(Transformer(WIDTH, DEPTH, VOCABULARY))
    optimizer = fabric.setup_optimizers(torch.optim.AdamW(model.parameters()))
    return step_of(model, optimizer, fabric.backward)


def contestants() -> dict[str, Step]:
    """Set up everyone, in the same processes."""
    from fabric_core import Fabric

    steps = {
        "plain ddp": by_hand(hand_ddp),
        "ddp": by_fabric(Fabric, "ddp"),
        "plain fsdp": by_hand(hand_fsdp),
        "fsdp": by_fabric(Fabric, "fsdp"),
    }
    if importlib.util.find_spec("lightning") is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from lightning.fabric import Fabric as Lightning
            from lightning.fabric.strategies.ddp import DDPStrategy
            from lightning.fabric.strategies.model_parallel import ModelParallelStrategy

            steps["ddp, Lightning"] = by_fabric(Lightning, DDPStrategy(gradient_as_bucket_view=True))
            # Its FSDP is FSDP1, which it runs on GPUs alone; FSDP2 is what its users write for this strategy.
            strategy = ModelParallelStrategy(
                lambda model, _mesh: hand_fsdp(model), data_parallel_size=2, tensor_parallel_size=1
            )
            steps["fsdp, Lightning's model_parallel"] = by_fabric(Lightning, strategy)
    return steps


def worker(rounds: int, steps_per_turn: int) -> None:
    """Measure in one of two ranks, and print on the first."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    tokens = torch.randint(VOCABULARY, (BATCH, TIME), generator=torch.Generator().manual_seed(dist.get_rank()))
    steps = contestants()
    names = list(steps)
    walls: dict[str, list[float]] = {name: [] for name in names}
    works: dict[str, list[float]] = {name: [] for name in names}
    for round_ in range(rounds + 1):
        turn = round_ % len(names)
        for name in names[turn:] + names[:turn]:
            dist.barrier()
            wall, work = time.perf_counter(), time.process_time()
            for _ in range(steps_per_turn):
                steps[name](tokens)
            spent = torch.tensor([time.perf_counter() - wall, time.process_time() - work]) / steps_per_turn
            slower, both = spent.clone(), spent.clone()
            dist.all_reduce(slower, dist.ReduceOp.MAX)
            dist.all_reduce(both, dist.ReduceOp.SUM)
            if round_ > 0:
                walls[name].append(slower[0].item())
                works[name].append(both[1].item())
    if dist.get_rank() == 0:
        rows = []
        for name in names:
            hand = f"{name.split(',')[0].split()[0]} by hand"
            rows.append((name, *_compared(walls[name], walls[hand]), *_compared(works[name], works[hand])))
        print(table("A training step, 2 processes on the CPU", _HEAD, rows))
    dist.destroy_process_group()


def _compared(own: list[float], hand: list[float]) -> tuple[str, str]:
    """Give the median in ms, and the median ratio of each round: what slows one down slows its neighbours too."""
    ratio = statistics.median(mine / other for mine, other in zip(own, hand, strict=True))
    return f"{statistics.median(own) * 1e3:.1f}", f"{ratio:.3f}"


def main() -> None:
    """Start two ranks, which measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--steps", type=int, default=5)
    given = parser.parse_args()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        worker(given.rounds, given.steps)
        return
    subprocess.run(
        [*_TWO_RANKS, __file__, "--rounds", str(given.rounds), "--steps", str(given.steps)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=True,
    )


if __name__ == "__main__":
    main()
