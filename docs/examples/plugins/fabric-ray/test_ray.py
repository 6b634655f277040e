"""The launcher ``ray``: actors as ranks, on a Ray of this machine."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

ray: Any = pytest.importorskip("ray")

from fabric_core import Fabric  # noqa: E402
from fabric_core.conformance import suite  # noqa: E402
from fabric_core.errors import LaunchError, RankFailedError  # noqa: E402

test_rules = suite(
    "launcher",
    "ray",
    xfail={
        "LAU-516": "ranks are Ray's actors: Ray starts them, and handles SIGTERM in them",
        "LAU-517": "ray.kill ends an actor at once: temporary folders and semaphores of multiprocessing stay",
    },
)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Give a Ray that stays up for all launches."""
    here = str(Path(__file__).parent)
    ray.init(num_cpus=2, include_dashboard=False, logging_level="error", runtime_env={"env_vars": {"PYTHONPATH": here}})
    yield
    ray.shutdown()


def _train(fabric: Fabric, scale: float) -> tuple[int, float, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Linear(2, 1)
    wrapped, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    x = torch.full((1, 2), scale * (fabric.global_rank + 1))
    fabric.backward(wrapped(x).sum())
    optimizer.step()
    return (
        fabric.world_size,
        fabric.all_reduce(torch.tensor(float(fabric.global_rank)), reduce_op="sum").item(),
        model.weight.detach(),
    )


def _fabric(**parts: Any) -> Fabric:
    return Fabric(**{"accelerator": "cpu", "devices": 2, "strategy": "ddp", "plugins": ["launcher=ray"], **parts})


def test_actors_train_together(cluster: None) -> None:
    """The result of rank 0 comes back, and gradients were averaged over both."""
    size, summed, weight = _fabric().launch(_train, 1.0)
    assert (size, summed) == (2, 1.0)
    torch.manual_seed(0)
    torch.testing.assert_close(weight, nn.Linear(2, 1).weight.detach() - 0.1 * 1.5)


def _fail(fabric: Fabric) -> None:
    if fabric.global_rank == 1:
        raise ZeroDivisionError("planted")
    fabric.barrier()


def test_a_rank_that_raises_is_reported_with_its_cause(cluster: None) -> None:
    """The other rank, which waits, is ended."""
    with pytest.raises(RankFailedError, match="rank 1 failed first, with ZeroDivisionError: planted") as caught:
        _fabric().launch(_fail)
    assert caught.value.fields["rank"] == 1


def _die(fabric: Fabric) -> None:
    if fabric.global_rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    fabric.barrier()


def test_a_rank_that_is_lost_is_reported_with_its_cause(cluster: None) -> None:
    """A process that was killed reports nothing; Ray says what became of it."""
    with pytest.raises(RankFailedError, match=r"rank 1 was lost: .*died") as caught:
        _fabric().launch(_die)
    assert caught.value.fields["rank"] == 1


def test_ranks_that_find_no_room_are_refused(cluster: None) -> None:
    """Nothing waits for ever."""
    with pytest.raises(LaunchError, match="Ray found no room for 2 ranks"):
        _fabric(plugins=["launcher=ray:cpus_per_rank=8,start_timeout=1"]).launch(_train, 1.0)


SCRIPT = """
import torch
from fabric_core import Fabric

with Fabric(accelerator="cpu", devices=2, strategy="ddp", plugins=["launcher=ray"]) as fabric:
    fabric.launch()
    total = fabric.all_reduce(torch.ones(1), reduce_op="sum").item()
    print("rank", fabric.global_rank, "of", fabric.world_size, "has", total, flush=True)
    if {fails} and fabric.global_rank == 1:
        raise SystemExit(3)
"""


@pytest.mark.parametrize("fails", [False, True])
def test_a_plain_script_becomes_its_own_launcher(tmp_path: Path, fails: bool) -> None:
    """Each actor re-runs the command; its exit code comes back."""
    script = tmp_path / "train.py"
    script.write_text(SCRIPT.format(fails=fails))
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, check=False, timeout=100, cwd=tmp_path
    )
    assert done.returncode == (3 if fails else 0), done.stdout + done.stderr
    for rank in (0, 1):
        assert f"rank {rank} of 2 has 2.0" in done.stdout
