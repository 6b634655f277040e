"""Time that training is blocked by saving 400 MB, memory, bytes on disk; ours beside plain PyTorch, DCP and Lightning.

Each contestant is alone, in turn, over several rounds; the disk is flushed before and within each. Run it with
``python tests/benchmarks/bench_checkpoint.py [--rounds N] [--megabytes N]``; Lightning joins where it is installed. It
ends with exit code 1 where a bound is missed: 1.1 times ``torch.save`` and flush for a save, a quarter of that for one
in the background, and for a sharded load less than half of the checkpoint on any rank.
"""

import argparse
import ctypes
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn


class _Model(nn.Module):
    def __init__(self, megabytes: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(1000, 1000, bias=False) for _ in range(megabytes // 4))


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


def _memory(name: str) -> float:
    """Give a line of this process's memory in MB: ``VmRSS`` now, ``VmHWM`` at most since it was forgotten."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def saving(rounds: int, megabytes: int) -> list[str]:
    """Print a table of savers, and give the bounds that were missed."""
    model = _Model(megabytes)
    contestants = _contestants(model)
    blocked: dict[str, list[float]] = {name: [] for name in contestants}
    sizes: dict[str, int] = {}
    peaks: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(rounds + 1):
            for name, act in contestants.items():
                path = Path(folder) / "state"
                os.sync()
                _forget_peak()
                before = _memory("VmRSS")
                begun = time.perf_counter()
                handle = act(path)
                took = time.perf_counter() - begun
                if handle is not None:
                    handle.result()
                peaks[name] = max(peaks.get(name, 0.0), _memory("VmHWM") - before)
                if number:  # the first round warms up
                    blocked[name].append(took)
                sizes[name] = _bytes(path)
                _remove(path)
                os.sync()
    middle = {name: statistics.median(times) for name, times in blocked.items()}
    first = middle["torch.save + flush"]
    print(
        f"| saving {megabytes} MB, {rounds} rounds | blocked, median s | times torch.save | MB of memory | MB on disk |"
    )
    print("|---|---|---|---|---|")
    for name, value in middle.items():
        print(f"| {name} | {value:.3f} | {value / first:.2f} | {peaks[name]:.0f} | {sizes[name] / 1e6:.1f} |")
    missed = [
        f"{name}: {middle[name] / first:.2f} times torch.save and flush, of 1.1"
        for name in ("ours, single_file", "ours, distributed", "ours, safetensors")
        if middle[name] > 1.1 * first
    ]
    for name in ("ours, single_file", "ours, distributed"):
        share = middle[f"{name}, asynchronous"] / middle[name]
        missed += [f"{name}, asynchronous: {share:.0%} of the synchronous save, of 25 %"] if share > 0.25 else []
    return missed


def _loaded(path: str, megabytes: int) -> dict[str, float]:
    """Load by all ranks, each its part; gives the seconds, and the most that any rank held and had before."""
    from fabric_core import Fabric

    fabric = Fabric(accelerator="cpu", strategy="fsdp", devices=RANKS)
    fabric.launch()
    with fabric.init_module(empty_init=True):
        model = _Model(megabytes)
    wrapped = fabric.setup(model)
    ctypes.CDLL(None).malloc_trim(0)  # else what is read could hide in what the initialisation left
    _forget_peak()
    before = _memory("VmRSS")
    begun = time.perf_counter()
    fabric.load(path, {"model": wrapped})
    took = time.perf_counter() - begun
    numbers = torch.tensor([took, before, _memory("VmHWM")])
    most = fabric.all_gather(numbers).reshape(RANKS, 3).amax(0).tolist()
    return dict(zip(("seconds", "before", "peak"), most, strict=True))


RANKS: Final = 4


def loading(megabytes: int) -> list[str]:
    """Print what a sharded load takes on four ranks, and give the bound that was missed."""
    from fabric_core import Fabric

    with tempfile.TemporaryDirectory() as folder:
        with Fabric(accelerator="cpu", devices=1) as fabric:
            fabric.save(Path(folder) / "state", {"model": _Model(megabytes)}, format="distributed")
        script = f"import bench_checkpoint as b, json; print(json.dumps(b._loaded({folder + '/state'!r}, {megabytes})))"
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}", "--no-python",
             sys.executable, "-c", script],
            capture_output=True, text=True, check=False, cwd=Path(__file__).parent,
        )  # fmt: skip
    if done.returncode:
        raise SystemExit(done.stderr)
    found = json.loads(done.stdout.splitlines()[0])
    print(
        f"\nloading {megabytes} MB, distributed, by {RANKS} ranks: {found['seconds']:.2f} s; the largest rank had"
        f" {found['before']:.0f} MB before, with its part of the model, and {found['peak']:.0f} MB at most"
    )
    more = found["peak"] - found["before"] + megabytes / RANKS
    return [f"a rank held {more:.0f} MB of a checkpoint of {megabytes}"] if more > megabytes / 2 else []


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--megabytes", type=int, default=400)
    parser.add_argument("--load-megabytes", type=int, default=2000)
    given = parser.parse_args()
    missed = saving(given.rounds, given.megabytes) + loading(given.load_megabytes)
    for one in missed:
        print(f"missed: {one}")
    sys.exit(bool(missed))
