"""What a training step takes in memory: 400 MB of parameters, AdamW, two processes on the CPU.

Each contestant runs in fresh processes under ``torchrun``. The number is the larger of the two processes' peak resident
memory, interpreter and PyTorch included. glibc is told to give freed memory back (``MALLOC_MMAP_THRESHOLD_``): by
itself it keeps what FSDP frees after every block, by hand or not, until the peak is DDP's.
"""

import argparse
import contextlib
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from _rounds import table
from _transformer import Transformer, hand_ddp, hand_fsdp

_TWO_RANKS = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
VOCABULARY = 256
# Each with what it is compared with. PyTorch's DDP keeps gradients and buckets apart unless told otherwise.
CONTESTANTS = {
    "plain ddp, PyTorch's defaults": "plain ddp",
    "plain ddp": "plain ddp",
    "ddp": "plain ddp",
    "plain fsdp": "plain fsdp",
    "fsdp": "plain fsdp",
}


def step(contestant: str, width: int, depth: int) -> None:
    """Train two steps in one rank, and write the peak to the file that ``PEAKS`` names a folder for."""
    torch.set_num_threads(1)
    by_hand, sharded = "by hand" in contestant, contestant.startswith("fsdp")
    with contextlib.ExitStack() as stack:
        if by_hand:
            dist.init_process_group("gloo")
            stack.callback(dist.destroy_process_group)
            with torch.device("meta" if sharded else "cpu"):
                raw = Transformer(width, depth, VOCABULARY)
            model = hand_fsdp(raw) if sharded else hand_ddp(raw, views="defaults" not in contestant)
            optimizer = torch.optim.AdamW(model.parameters())
        else:
            from fabric_core import Fabric

            fabric = stack.enter_context(Fabric(accelerator="cpu", strategy=contestant, devices=2))
            fabric.launch()
            with fabric.init_module(empty_init=sharded):
                raw = Transformer(width, depth, VOCABULARY)
            model = fabric.setup(raw)
            optimizer = fabric.setup_optimizers(torch.optim.AdamW(model.parameters()))
        for _ in range(2):
            loss = model(torch.zeros(1, 8, dtype=torch.long)).square().mean()
            if by_hand:
                loss.backward()
            else:
                fabric.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        Path(os.environ["PEAKS"], os.environ["RANK"]).write_text(str(peak))


def measure(contestant: str, width: int, depth: int) -> float:
    """Give the larger peak of two ranks, in MiB."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [*_TWO_RANKS, __file__, "--contestant", contestant, "--width", str(width), "--depth", str(depth)],
            env={**os.environ, "PEAKS": folder, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "131072"},
            check=True,
        )
        return max(float(path.read_text()) for path in Path(folder).iterdir())


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--contestant", choices=list(CONTESTANTS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--width", type=int, default=512, help="of the blocks")
    parser.add_argument("--depth", type=int, default=32, help="how many blocks")
    given = parser.parse_args()
    width, depth = given.width, given.depth
    if given.contestant:
        step(given.contestant, width, depth)
        return
    with torch.device("meta"):
        size = sum(one.numel() * one.element_size() for one in Transformer(width, depth, VOCABULARY).parameters())
    peaks: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
    for _ in range(given.rounds):
        for name in CONTESTANTS:
            peaks[name].append(measure(name, width, depth))
    found = {name: statistics.median(values) for name, values in peaks.items()}
    rows = [
        (
            name,
            f"{value:.0f}",
            f"{value / found[next(iter(CONTESTANTS))]:.3f}",
            f"{value / found['ddp']:.3f}",
            f"{value / found[CONTESTANTS[name]]:.3f}",
        )
        for name, value in found.items()
    ]
    title = f"Peak resident memory per process, {size / 1e6:.0f} MB of parameters in {depth} blocks, AdamW, 2 processes"
    print(table(title, ("strategy", "MiB", "of DDP's defaults", "of `ddp`", "of the same in plain PyTorch"), rows))


if __name__ == "__main__":
    main()
