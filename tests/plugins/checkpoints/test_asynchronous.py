"""Saving in the background: the copy is of the moment, errors don't get lost, and the end waits."""

import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fabric_core import Fabric
from fabric_core.conformance.pool import RankPool
from fabric_core.errors import CheckpointError
from fabric_plugins.checkpoints import SingleFileCheckpoint


class _Slow(SingleFileCheckpoint):
    """Writes when it may."""

    def __init__(self) -> None:
        super().__init__()
        self.may = threading.Event()
        self.fails = False

    def write(self, path: Any, tree: Any) -> None:
        assert self.may.wait(20)
        if self.fails:
            raise ZeroDivisionError("the disk is odd")
        super().write(path, tree)


def _model(value: float) -> nn.Linear:
    model = nn.Linear(2, 2)
    with torch.no_grad():
        model.weight.fill_(value)
    return model


def test_the_copy_is_of_the_moment(tmp_path: Path) -> None:
    """What training does meanwhile is not in the checkpoint, and ``result`` waits."""
    slow = _Slow()
    with Fabric(accelerator="cpu", devices=1, plugins=[slow]) as fabric:
        model, numbers = _model(1.0), [1]
        handle = fabric.save(tmp_path / "state", {"model": model, "numbers": numbers}, asynchronous=True)
        assert handle is not None
        assert not handle.done()
        with torch.no_grad():
            model.weight.fill_(2.0)
        numbers.append(2)
        with pytest.raises(TimeoutError):
            handle.result(timeout=0.01)
        slow.may.set()
        handle.result()
        assert handle.done()
        back = fabric.load(tmp_path / "state")
    assert back["model"]["weight"].eq(1).all()
    assert back["numbers"] == [1]


def test_one_at_a_time_waits_and_queued_does_not(tmp_path: Path) -> None:
    """``asynchronous=True`` waits for the one before; ``"queued"`` stands in line, with a copy of its own."""
    slow = _Slow()
    with Fabric(accelerator="cpu", devices=1, plugins=[slow]) as fabric:
        handles = [
            fabric.save(tmp_path / f"state-{number}", {"model": _model(number)}, asynchronous="queued")
            for number in range(3)
        ]
        threading.Timer(0.2, slow.may.set).start()
        begun = time.perf_counter()
        last = fabric.save(tmp_path / "last", {"model": _model(9)}, asynchronous=True)
        assert time.perf_counter() - begun > 0.1
        assert last is not None
        assert all(handle is not None and handle.done() for handle in handles)
        last.result()
        for number in range(3):
            assert fabric.load(tmp_path / f"state-{number}")["model"]["weight"].eq(number).all()


@pytest.mark.parametrize("how", ["result", "save", "load", "end"])
def test_errors_surface(how: str, tmp_path: Path) -> None:
    """Once each: at ``result``, or else at the next save or load, or at the end of the ``Fabric``."""
    slow = _Slow()
    slow.fails = True
    slow.may.set()
    fabric = Fabric(accelerator="cpu", devices=1, plugins=[slow])
    handle = fabric.save(tmp_path / "state", {"model": _model(1)}, asynchronous=True)
    assert handle is not None
    acts = {
        "result": handle.result,
        "save": lambda: fabric.save(tmp_path / "next", {"value": 1}),
        "load": lambda: fabric.load(tmp_path / "next"),
        "end": fabric.teardown,
    }
    with pytest.raises(CheckpointError, match="ZeroDivisionError"):
        acts[how]()
    slow.fails = False
    if how != "end":
        fabric.save(tmp_path / "next", {"value": 1})
    fabric.teardown()
    assert not [one for one in threading.enumerate() if one.name.startswith("fabric-checkpoint")]


def test_the_end_of_the_process_waits_and_tells(tmp_path: Path) -> None:
    """A script that just ends has its checkpoint; one that could not be written is told of on the error output."""
    script = (
        "import sys, torch\nfrom pathlib import Path\nfrom fabric_core import Fabric\n"
        "fabric = Fabric(accelerator='cpu', devices=1)\n"
        "fabric.save(sys.argv[1], {'a': torch.ones(1000, 1000)}, asynchronous=True)\n"
        "fabric.save(sys.argv[2], {'a': torch.ones(10)}, asynchronous='queued')\n"
    )
    (tmp_path / "text").write_text("mine")
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "state"), str(tmp_path / "text")],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert SingleFileCheckpoint().read(tmp_path / "state", None)["a"].eq(1).all()
    assert f"the checkpoint {tmp_path / 'text'} was not saved" in done.stderr
    assert "is not replaced" in done.stderr


def _on_two(path: Path, form: str, strategy: str) -> Any:
    with Fabric(accelerator="cpu", strategy=strategy, devices=2) as fabric:
        fabric.launch()
        model = fabric.setup(_model(1.0))
        handles = [fabric.save(path / "state-1", {"model": model}, asynchronous=True, format=form)]
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(2.0)
        # The main thread's collectives go on meanwhile.
        total = fabric.all_reduce(torch.ones(1), reduce_op="sum").item()
        handles.append(fabric.save(path / "state-2", {"model": model}, asynchronous="queued", format=form))
        (path / "mine").mkdir(exist_ok=True)
        (path / "mine" / "notes").touch()
        handles.append(fabric.save(path / "mine", {"model": model}, asynchronous="queued", format=form))
        for handle in handles[:2]:
            assert handle is not None
            handle.result(30)
        failed = ""
        try:
            fabric.save(path / "state-3", {"model": model}, format=form)
        except CheckpointError as error:
            failed = str(error)
        fabric.save(path / "state-3", {"model": model}, format=form)
        return total, failed


@pytest.mark.parametrize(("form", "strategy"), [("distributed", "fsdp"), ("single_file", "ddp")])
def test_two_ranks(form: str, strategy: str, two_ranks: RankPool, tmp_path: Path) -> None:
    """Each rank's handle waits for both; an error of one is both ranks' at their next save."""
    got = two_ranks.run(_on_two, tmp_path, form, strategy)
    assert [total for total, _ in got] == [2, 2]
    assert all("an earlier asynchronous save failed" in failed for _, failed in got)
    with Fabric(accelerator="cpu", devices=1) as fabric:
        assert fabric.load(tmp_path / "state-1")["model"]["weight"].eq(1).all()
        assert fabric.load(tmp_path / "state-2")["model"]["weight"].eq(2).all()
        assert fabric.load(tmp_path / "state-3")["model"]["weight"].eq(2).all()
