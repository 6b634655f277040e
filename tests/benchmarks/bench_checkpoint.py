"""Time that training is blocked by saving 400 MB, memory, bytes on disk; ours beside plain PyTorch, DCP and Lightning.

Each contestant is alone, in turn, over several rounds; the disk is flushed before and within each. Run it with
``python tests/benchmarks/bench_checkpoint.py [--rounds N] [--megabytes N]``; Lightning joins where it is installed.
"""

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn


class _Model(nn.Module):
    def __init__(self, megabytes: int) -> None:
        super().__init__()
        self.layers = nn.ParameterList(torch.randn(1000, 1000) for _ in range(megabytes // 4))


def _flushed(path: Path) -> None:
    for one in [path, *path.rglob("*")] if path.is_dir() else [path]:
        handle = os.open(one, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def _plain(model: nn.Module, path: Path) -> None:
    torch.save({"model": model.state_dict()}, path)
    _flushed(path)


def _dcp(model: nn.Module, path: Path) -> None:
    from torch.distributed.checkpoint.state_dict_saver import save

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save({"model": model.state_dict()}, checkpoint_id=path)
    _flushed(path)


def _contestants(model: nn.Module) -> dict[str, Callable[[Path], Any]]:
    from fabric_core import Fabric

    fabric = Fabric(accelerator="cpu", devices=1)
    wrapped = fabric.setup(model)
    state = {"model": wrapped}
    found: dict[str, Callable[[Path], Any]] = {
        "torch.save + flush": lambda path: _plain(model, path),
        "DCP + flush": lambda path: _dcp(model, path),
        "ours, single_file": lambda path: fabric.save(path, state),
        "ours, distributed": lambda path: fabric.save(path, state, format="distributed"),
        "ours, safetensors": lambda path: fabric.save(path, state, format="safetensors"),
        "ours, single_file, asynchronous": lambda path: fabric.save(path, state, asynchronous=True),
        "ours, distributed, asynchronous": lambda path: fabric.save(
            path, state, format="distributed", asynchronous=True
        ),
    }
    try:
        from lightning.fabric import Fabric as Lightning
    except ImportError:
        return found
    other = Lightning(accelerator="cpu", devices=1)
    theirs = {"model": other.setup(nn.ModuleList([model]))}

    def lightning(path: Path) -> None:
        other.save(path, theirs)
        _flushed(path)

    return {**found, "Lightning + flush": lightning}


def _bytes(path: Path) -> int:
    return sum(one.stat().st_size for one in path.rglob("*")) if path.is_dir() else path.stat().st_size


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def saving(rounds: int, megabytes: int) -> None:
    """Print a table of savers."""
    model = _Model(megabytes)
    contestants = _contestants(model)
    blocked: dict[str, list[float]] = {name: [] for name in contestants}
    sizes: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(rounds + 1):
            for name, act in contestants.items():
                path = Path(folder) / "state"
                os.sync()
                begun = time.perf_counter()
                handle = act(path)
                took = time.perf_counter() - begun
                if handle is not None:
                    handle.result()
                if number:  # the first round warms up
                    blocked[name].append(took)
                sizes[name] = _bytes(path)
                _remove(path)
                os.sync()
    first = statistics.median(blocked["torch.save + flush"])
    print(f"| saving {megabytes} MB, {rounds} rounds | blocked, median s | times torch.save | MB on disk |")
    print("|---|---|---|---|")
    for name, times in blocked.items():
        middle = statistics.median(times)
        print(f"| {name} | {middle:.3f} | {middle / first:.2f} | {sizes[name] / 1e6:.1f} |")


_LOADER = """
import resource, sys, time, torch
from fabric_core import Fabric
from torch import nn
class Model(nn.Module):
    def __init__(self, count):
        super().__init__()
        self.layers = nn.ParameterList(torch.empty(1000, 1000) for _ in range(count))
fabric = Fabric(accelerator="cpu", devices=1)
import torch.distributed.checkpoint.default_planner
model = Model(int(sys.argv[2]))
for one in model.parameters():
    torch.nn.init.zeros_(one)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
begun = time.perf_counter()
fabric.load(sys.argv[1], {"model": model})
print(time.perf_counter() - begun, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def loading(megabytes: int) -> None:
    """Print how long a sharded checkpoint takes to load, and what memory it takes beyond the model."""
    from fabric_core import Fabric

    with tempfile.TemporaryDirectory() as folder:
        with Fabric(accelerator="cpu", devices=1) as fabric:
            fabric.save(Path(folder) / "state", {"model": _Model(megabytes)}, format="distributed")
        done = subprocess.run(
            [sys.executable, "-c", _LOADER, f"{folder}/state", str(megabytes // 4)],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    seconds, memory = map(float, done.stdout.split())
    print(f"\nloading {megabytes} MB, distributed: {seconds:.2f} s, {memory:.0f} MB beyond the model")
    print(f"peak memory of saving, with the model: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024} MB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--megabytes", type=int, default=400)
    parser.add_argument("--load-megabytes", type=int, default=2000)
    given = parser.parse_args()
    saving(given.rounds, given.megabytes)
    loading(given.load_megabytes)
