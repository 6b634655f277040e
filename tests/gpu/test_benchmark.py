"""The benchmark of a GPU's step runs without one, on a small model, so that it will run with one."""

import subprocess
import sys
from pathlib import Path

_SCRIPT = Path(__file__).parents[1] / "benchmarks" / "bench_gpu_step.py"


def test_the_benchmark_runs_on_the_cpu() -> None:
    """Every strategy is measured by hand and here."""
    small = ("--rounds", "1", "--steps", "1", "--batch", "2", "--time", "8")
    done = subprocess.run(
        [sys.executable, str(_SCRIPT), "--device", "cpu", *small], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    measured = {tuple(row.split("|")[1:3]) for row in done.stdout.splitlines() if row.startswith("| ")}
    for strategy in ("single_device", "ddp", "fsdp"):
        assert {(f" {strategy} ", " by hand "), (f" {strategy} ", " here ")} <= measured
