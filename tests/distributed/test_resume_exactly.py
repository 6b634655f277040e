"""A run that was killed in the middle of an epoch goes on bit for bit as the uninterrupted one."""

import contextlib
import importlib.util
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from fabric_core.conformance.pool import RankPool

SCRIPT = Path(__file__).with_name("_resumed_run.py")
RUNS = 30
"""How often the kill by a signal is tried; a run of all tests tries one, and ``make silence`` all."""


def _script() -> ModuleType:
    """Import the script, on a rank too."""
    name = SCRIPT.stem
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, SCRIPT)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def _run(strategy: str, devices: int, precision: str, workers: int, path: Path, kill_at: int | None) -> Any:
    script = _script()
    with script.fabric_of(strategy, devices, precision) as fabric:
        fabric.launch()
        with contextlib.suppress(script.Abandoned):
            return script.train(fabric, path, workers, kill_at)
    return None


def _compare(whole: list[Any], rest: list[Any]) -> None:
    """Compare what every rank gave: its losses after the kill, what it trained, and the loss scale."""
    for (losses, trained, scale), (later, trained_later, scale_later) in zip(whole, rest, strict=True):
        assert later
        assert later == losses[-len(later) :]
        assert trained_later == trained
        assert scale_later == scale


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
@pytest.mark.parametrize(("strategy", "devices"), [("auto", 1), ("ddp", 2), ("fsdp", 2)])
def test_an_abandoned_run_goes_on(
    strategy: str, devices: int, precision: str, two_ranks: RankPool, tmp_path: Path, draw: random.Random
) -> None:
    """Twice abandoned at random steps: dropout, shuffle, items drawn at random, accumulation and loss scale go on."""
    steps = draw.choices(range(1, 5), k=2)

    def run(path: Path, kill_at: int | None) -> list[Any]:
        arguments = (strategy, devices, precision, 0, path, kill_at)
        return two_ranks.run(_run, *arguments) if devices == 2 else [_run(*arguments)]

    with torch.random.fork_rng():
        whole = run(tmp_path / "whole", None)
        for kill_at in steps:
            run(tmp_path / "killed", kill_at)
        rest = run(tmp_path / "killed", None)
    print(f"abandoned after steps {steps}")  # noqa: T201 - shown where the test fails
    _compare(whole, rest)


def _start(*arguments: object) -> int:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, check=False, capture_output=True, timeout=110).returncode


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[Any]]:
    """Give a function that runs a script to its end, once for each way to run it."""
    known: dict[tuple[Any, ...], list[Any]] = {}

    def run(*where: Any) -> list[Any]:
        if where not in known:
            folder = tmp_path_factory.mktemp("whole")
            assert _start(*where, folder / "checkpoint", folder / "result", 0) == 0
            known[where] = _results(folder / "result", where[1])
        return known[where]

    return run


def _results(path: Path, devices: int) -> list[Any]:
    return [torch.load(f"{path}.{rank}") for rank in range(devices)]


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    "attempt", [None, *(pytest.param(number, marks=pytest.mark.silence) for number in range(RUNS))]
)
def test_a_killed_run_goes_on(
    attempt: int | None, uninterrupted: Callable[..., list[Any]], tmp_path: Path, draw: random.Random
) -> None:
    """SIGKILL on rank 0 at a random step, with augmenting workers; started again, the run ends as if nothing was."""
    cell = draw.randrange(6) if attempt is None else attempt
    strategy, devices = [("ddp", 2), ("auto", 1), ("fsdp", 2)][cell % 3]
    precision, kill_at = ("32-true", "16-mixed")[cell // 3 % 2], draw.randrange(1, _script().STEPS_OF_TWO)
    where = (strategy, devices, precision, 2)
    print(f"{strategy} on {devices}, {precision}, killed after step {kill_at}")  # noqa: T201 - shown where it fails
    assert _start(*where, tmp_path / "killed", tmp_path / "result", kill_at) != 0
    assert not list(tmp_path.glob("result*"))
    assert _start(*where, tmp_path / "killed", tmp_path / "result", 0) == 0
    _compare(uninterrupted(*where), _results(tmp_path / "result", devices))


_STARTERS = {
    "run": ("-m", "fabric_core", "run", "--devices", "2"),
    "torchrun": ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
}


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.sampled(0.3)
@pytest.mark.parametrize("starter", _STARTERS)
def test_a_job_that_is_restarted_goes_on(
    starter: str, uninterrupted: Callable[..., list[Any]], tmp_path: Path, draw: random.Random
) -> None:
    """``--max-restarts``: rank 0 is killed, all ranks start again, and end as if nothing had been."""
    where = ("ddp", 2, "32-true", 2)
    # Late, so that the second attempt, which counts from its own beginning, doesn't come so far.
    kill_at = draw.randrange(_script().STEPS_OF_TWO // 2 + 1, _script().STEPS_OF_TWO)
    print(f"killed after step {kill_at}")  # noqa: T201 - shown where it fails
    job = (SCRIPT, *where, tmp_path / "killed", tmp_path / "result", kill_at)
    command = [sys.executable, *_STARTERS[starter], "--max-restarts", "1", *map(str, job)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "exitcode: -9" in done.stderr, done.stderr
    _compare(uninterrupted(*where), _results(tmp_path / "result", 2))
