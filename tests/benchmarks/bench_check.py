"""What `Fabric(check=True)` adds to a training step, under `ddp` and `fsdp`.

Two ranks on the CPU, one thread each. Steps with and without the checked mode take turns in the same two processes; a
pair is one of each, one after the other. A step's time is the slower rank's; its work is the CPU time of both ranks,
which other programs on the machine disturb less. Numbers are medians over the pairs.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time

import torch
import torch.distributed as dist
from _rounds import table
from _transformer import Transformer
from bench_strategies import BATCH, DEPTH, TIME, VOCABULARY, WIDTH, Step, step_of

from fabric_core import Fabric

_TWO_RANKS = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
_HEAD = ("step", "ms", "checked, times", "checked, ms more", "CPU ms of both", "checked, times")


def _step(strategy: str, width: int, depth: int, *, check: bool) -> Step:
    fabric = Fabric(accelerator="cpu", strategy=strategy, devices=2, check=check)
    fabric.launch()
    model = fabric.setup(Transformer(width, depth, VOCABULARY))
    optimizer = fabric.setup_optimizers(torch.optim.AdamW(model.parameters()))
    return step_of(model, optimizer, fabric.backward)


def _measure(step: Step, tokens: torch.Tensor) -> tuple[float, float]:
    dist.barrier()
    wall, work = time.perf_counter(), time.process_time()
    step(tokens)
    spent = torch.tensor([time.perf_counter() - wall, time.process_time() - work]) * 1e3
    slower, both = spent.clone(), spent.clone()
    dist.all_reduce(slower, dist.ReduceOp.MAX)
    dist.all_reduce(both, dist.ReduceOp.SUM)
    return slower[0].item(), both[1].item()


def worker(pairs: int) -> None:
    """Measure in one of two ranks, and print on the first."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    tokens = torch.randint(VOCABULARY, (BATCH, TIME), generator=torch.Generator().manual_seed(dist.get_rank()))
    rows = []
    for strategy in ("ddp", "fsdp"):
        for title, width, depth in (("small model", 32, 1), ("4 blocks of width 256", WIDTH, DEPTH)):
            steps = [_step(strategy, width, depth, check=check) for check in (False, True)]
            found: list[list[tuple[float, float]]] = [[], []]
            for pair in range(pairs + 3):
                for which in (0, 1) if pair % 2 else (1, 0):
                    one = _measure(steps[which], tokens)
                    if pair >= 3:
                        found[which].append(one)
            plain, checked = ([[one[kind] for one in side] for kind in (0, 1)] for side in found)
            ratios = [[b / a for a, b in zip(plain[kind], checked[kind], strict=True)] for kind in (0, 1)]
            more = statistics.median(b - a for a, b in zip(plain[0], checked[0], strict=True))
            rows.append(
                [
                    f"{strategy}, {title}",
                    f"{statistics.median(plain[0]):.1f}",
                    f"{statistics.median(ratios[0]):.2f}",
                    f"{more:.1f}",
                    f"{statistics.median(plain[1]):.1f}",
                    f"{statistics.median(ratios[1]):.2f}",
                ]
            )
    if dist.get_rank() == 0:
        print(table("What the checked mode costs, two ranks", _HEAD, rows))
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    """Start two ranks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=60)
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        worker(arguments.pairs)
    else:
        subprocess.run([*_TWO_RANKS, __file__, *sys.argv[1:]], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


if __name__ == "__main__":
    main()
