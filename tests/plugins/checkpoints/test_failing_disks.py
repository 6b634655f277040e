"""Real disks that are full, read-only or somebody else's, in the foreground and behind it: told; the old one stays."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn

from fabric_core import Fabric
from fabric_core.conformance.pool import RankPool
from fabric_core.errors import CheckpointError

FORMATS = ["single_file", "distributed", "safetensors"]
FULL = "No space left on device"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """Give a disk of a megabyte."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(place)]
    if os.geteuid() or subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("mounting a small disk isn't allowed here")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)  # noqa: S607


def _model(value: float, width: int = 16) -> nn.Linear:
    model = nn.Linear(width, width)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    return model


def _value(fabric: Fabric, path: Path) -> float:
    model = _model(0.0)
    fabric.load(path, {"model": model})
    return float(model.bias.detach()[0])


@pytest.mark.parametrize("form", FORMATS)
def test_a_full_disk(form: str, disk: Path) -> None:
    """What doesn't fit is refused, to a new path and to an existing one, and nothing of it stays."""
    with Fabric(accelerator="cpu", devices=1) as fabric:
        fabric.save(disk / "state", {"model": _model(1.0)}, format=form)
        for name in ("state", "new"):
            with pytest.raises(CheckpointError, match=FULL) as caught:
                fabric.save(disk / name, {"model": _model(2.0, 1024)}, format=form)
            assert str(disk / name) in str(caught.value)
        assert _value(fabric, disk / "state") == 1
        assert [one.name for one in disk.iterdir()] == ["state"]


@pytest.mark.parametrize("form", FORMATS)
def test_a_read_only_disk(form: str, disk: Path) -> None:
    """It can be loaded from; a save to a new path and to an existing one says what is wrong."""
    with Fabric(accelerator="cpu", devices=1) as fabric:
        fabric.save(disk / "state", {"model": _model(1.0)}, format=form)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)  # noqa: S607
        for name in ("state", "new", "a/b"):
            with pytest.raises(CheckpointError, match="Read-only file system") as caught:
                fabric.save(disk / name, {"model": _model(2.0)}, format=form)
            assert str(disk / name) in str(caught.value)
        assert _value(fabric, disk / "state") == 1
        assert [one.name for one in disk.iterdir()] == ["state"]


_AS_NOBODY = """
import os, sys
from pathlib import Path
import torch
from fabric_core import Fabric
from fabric_core.errors import CheckpointError
fabric = Fabric(accelerator="cpu", devices=1)
fabric.save(sys.argv[1] + "/warm", {"model": {"w": torch.ones(1)}}, format=sys.argv[2])  # all is imported
os.setgid(65534)
os.setuid(65534)
for act in (
    lambda: fabric.save(sys.argv[1] + "/state", {"model": {"w": torch.ones(1)}}, format=sys.argv[2]),
    lambda: fabric.save(sys.argv[1] + "/new", {"model": {"w": torch.ones(1)}}, format=sys.argv[2]),
    lambda: fabric.load(sys.argv[1] + "/secret"),
    lambda: fabric.load(sys.argv[1] + "/hidden/latest"),
    lambda: fabric.load(sys.argv[1] + "/hidden/state"),
):
    try:
        act()
        print("no error")
    except CheckpointError as error:
        print(repr(str(error)))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="another user's files need root to be made")
@pytest.mark.parametrize("form", FORMATS)
def test_a_folder_of_somebody_else(form: str, tmp_path: Path) -> None:
    """A process that may not write there, or not read, is told so by the path, and never that there is none."""
    for folder in [tmp_path, *tmp_path.parents][:-2]:
        folder.chmod(0o755)
    place = tmp_path / "place"
    place.mkdir(0o755)
    with Fabric(accelerator="cpu", devices=1) as fabric:
        for name in ("state", "secret", "hidden/state"):
            fabric.save(place / name, {"model": {"w": torch.zeros(1)}}, format=form)
        for name in ("secret", "hidden"):
            (place / name).chmod(0o700)
        done = subprocess.run(
            [sys.executable, "-c", _AS_NOBODY, str(place), form],
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        told = done.stdout.splitlines()
        for name, line in zip(("state", "new", "secret", "hidden/latest", "hidden/state"), told, strict=True):
            assert "Permission denied" in line
            assert f"{place}/{name}" in line
        assert fabric.load(place / "state")["model"]["w"] == 0
        assert sorted(one.name for one in place.iterdir()) == ["hidden", "secret", "state", "warm"]


@pytest.mark.parametrize("form", FORMATS)
def test_a_folder_that_vanishes_meanwhile(form: str, tmp_path: Path) -> None:
    """Somebody deletes it while a checkpoint is written: an error that names the path; the next save makes it anew."""
    path, flush = tmp_path / "run" / "state", os.fsync

    def vanish(handle: int) -> None:
        flush(handle)
        shutil.rmtree(tmp_path / "run", ignore_errors=True)

    with Fabric(accelerator="cpu", devices=1) as fabric:
        with patch("os.fsync", vanish), pytest.raises(CheckpointError, match=str(path)):
            fabric.save(path, {"model": _model(1.0)}, format=form)
        fabric.save(path, {"model": _model(2.0)}, format=form)
        assert _value(fabric, path) == 2
        assert [one.name for one in path.parent.iterdir()] == ["state"]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("how", ["result", "save", "queued save", "load", "end"])
def test_a_full_disk_behind_the_training(how: str, form: str, disk: Path) -> None:
    """Told once: by ``result``, or else by the next save or load, or by the end of the ``Fabric``."""
    fabric = Fabric(accelerator="cpu", devices=1)
    fabric.save(disk / "state", {"model": _model(1.0)}, format=form)
    handle = fabric.save(disk / "state", {"model": _model(2.0, 1024)}, format=form, asynchronous=True)
    assert handle is not None
    while how == "queued save" and not handle.done():
        pass
    again = {"model": _model(3.0)}
    acts: dict[str, Callable[[], Any]] = {
        "result": handle.result,
        "save": lambda: fabric.save(disk / "next", again, format=form),
        "queued save": lambda: fabric.save(disk / "next", again, format=form, asynchronous="queued"),
        "load": lambda: fabric.load(disk / "state"),
        "end": fabric.teardown,
    }
    with pytest.raises(CheckpointError, match=FULL):
        acts[how]()
    assert [one.name for one in disk.iterdir()] == ["state"]
    with Fabric(accelerator="cpu", devices=1) as other:
        assert _value(other, disk / "state") == 1
    if how != "end":
        fabric.save(disk / "next", again, format=form)
    fabric.teardown()


def test_a_full_disk_at_the_end_of_the_process(disk: Path) -> None:
    """The process waits for what is written; what could not be, it prints, and the old one stays."""
    script = (
        "import sys, torch\nfrom fabric_core import Fabric\n"
        "fabric = Fabric(accelerator='cpu', devices=1)\n"
        "fabric.save(sys.argv[1] + '/state', {'a': torch.ones(1)})\n"
        "fabric.save(sys.argv[1] + '/small', {'a': torch.ones(9)}, asynchronous=True)\n"
        "fabric.save(sys.argv[1] + '/state', {'a': torch.ones(1000, 1000)}, asynchronous='queued')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(disk)], capture_output=True, text=True, timeout=60, check=False
    )
    assert f"the checkpoint {disk / 'state'} was not saved" in done.stderr
    assert FULL in done.stderr
    with Fabric(accelerator="cpu", devices=1) as fabric:
        assert fabric.load(disk / "state")["a"].numel() == 1
        assert fabric.load(disk / "small")["a"].numel() == 9


def _by_two(disk: Path, form: str, strategy: str, asynchronous: bool) -> list[str]:
    told = []
    with Fabric(accelerator="cpu", strategy=strategy, devices=2) as fabric:
        fabric.launch()
        fabric.save(disk / "state", {"model": fabric.setup(_model(1.0))}, format=form)
        large = {"model": fabric.setup(_model(2.0, 1024))}
        for _ in range(2):
            try:
                handle = fabric.save(disk / "state", large, format=form, asynchronous=asynchronous)
                if handle is not None:
                    handle.result(60)
            except CheckpointError as error:
                told.append(str(error))
        fabric.save(disk / "next", {"model": fabric.setup(_model(3.0))}, format=form)
    return told


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize(
    ("form", "strategy"), [("distributed", "fsdp"), ("single_file", "ddp"), ("safetensors", "fsdp")]
)
def test_a_full_disk_of_two_ranks(
    form: str, strategy: str, asynchronous: bool, disk: Path, two_ranks: RankPool
) -> None:
    """Both are told, each time; nobody waits, and the one before stays."""
    for told in two_ranks.run(_by_two, disk, form, strategy, asynchronous):
        assert len(told) == 2
        assert all(FULL in one and str(disk / "state") in one for one in told)
    assert sorted(one.name for one in disk.iterdir()) == ["next", "state"]
    with Fabric(accelerator="cpu", devices=1) as fabric:
        assert _value(fabric, disk / "state") == 1
