"""Only checkpoints are replaced, in one step, and what killed processes left is swept."""

import errno
import os
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from fabric_core import Checkpoint
from fabric_core.errors import CheckpointError
from fabric_plugins.checkpoints import DistributedCheckpoint, SafetensorsCheckpoint, SingleFileCheckpoint
from fabric_plugins.checkpoints import _files as files

FORMATS: list[type[Checkpoint]] = [SingleFileCheckpoint, DistributedCheckpoint, SafetensorsCheckpoint]


def _tree(value: float) -> dict[str, Any]:
    return {"model": {"weight": torch.full((3,), value)}}


def _value(kind: type[Checkpoint], path: Path) -> float:
    return float(kind().read(path, None)["model"]["weight"][0])


@pytest.mark.parametrize("kind", FORMATS)
def test_what_is_no_checkpoint_is_not_replaced(kind: type[Checkpoint], tmp_path: Path) -> None:
    """A folder with the user's files, a text, and a pipe stay as they are, and the error says so."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").write_text("mine")
    (tmp_path / "text").write_text("mine")
    os.mkfifo(tmp_path / "pipe")
    for name in ("folder", "text", "pipe"):
        with pytest.raises(CheckpointError, match="is no checkpoint, and is not replaced"):
            kind().write(tmp_path / name, _tree(1))
    assert (tmp_path / "folder" / "notes.txt").read_text() == "mine"
    assert (tmp_path / "text").read_text() == "mine"
    assert sorted(one.name for one in tmp_path.iterdir()) == ["folder", "pipe", "text"]


@pytest.mark.parametrize("kind", FORMATS)
def test_what_is_empty_is_replaced(kind: type[Checkpoint], tmp_path: Path) -> None:
    """An empty file and an empty folder, as those of ``tempfile``, are no loss."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    for name in ("folder", "file"):
        kind().write(tmp_path / name, _tree(1))
        assert _value(kind, tmp_path / name) == 1


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("new", FORMATS)
@pytest.mark.parametrize("old", FORMATS)
def test_any_format_replaces_any(
    old: type[Checkpoint], new: type[Checkpoint], exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an exchange of names, and step by step where the system has none."""
    if not exchange:
        monkeypatch.setattr(files, "_exchange", lambda *_: False)
    old().write(tmp_path / "state", _tree(1))
    new().write(tmp_path / "state", _tree(2))
    assert _value(new, tmp_path / "state") == 2
    assert [one.name for one in tmp_path.iterdir()] == ["state"]


def test_files_that_a_user_put_into_a_checkpoint_stay(tmp_path: Path) -> None:
    """A configuration beside the weights outlives the next save, as does a folder."""
    path = tmp_path / "model"
    SafetensorsCheckpoint().write(path, _tree(1))
    (path / "config.json").write_text("{}")
    (path / "logs").mkdir()
    (path / "logs" / "a").write_text("a")
    SafetensorsCheckpoint().write(path, _tree(2))
    assert (path / "config.json").read_text() == "{}"
    assert (path / "logs" / "a").read_text() == "a"
    assert _value(SafetensorsCheckpoint, path) == 2


def test_a_link_stays_and_its_target_is_replaced(tmp_path: Path) -> None:
    """As with ``torch.save``, a path that is a link leads to what is written."""
    SingleFileCheckpoint().write(tmp_path / "real.pt", _tree(1))
    (tmp_path / "last.pt").symlink_to(tmp_path / "real.pt")
    SingleFileCheckpoint().write(tmp_path / "last.pt", _tree(2))
    assert (tmp_path / "last.pt").is_symlink()
    assert _value(SingleFileCheckpoint, tmp_path / "real.pt") == 2


@pytest.mark.parametrize("kind", FORMATS)
def test_what_was_lost_between_two_names_is_found(kind: type[Checkpoint], tmp_path: Path) -> None:
    """A process that was killed where nothing lies at the path: both the next load and the next save find it."""
    path = tmp_path / "state"
    kind().write(path, _tree(1))
    lost = tmp_path / f".fabric-{files._digest('state')}-{files._HOST}-99999999-0.old"
    path.rename(lost)
    assert kind().recognises(path)
    assert _value(kind, path) == 1
    with pytest.raises(CheckpointError):
        kind().write(path, {"bad": object()})
    assert _value(kind, path) == 1
    kind().write(path, _tree(2))
    assert _value(kind, path) == 2
    assert [one.name for one in tmp_path.iterdir()] == ["state"]


@pytest.mark.parametrize("newest", [0, 1])
def test_of_several_that_were_lost_the_newest_is_found(newest: int, tmp_path: Path) -> None:
    """By when each was written, whatever the numbers of the processes that were killed."""
    for at in range(2):
        SingleFileCheckpoint().write(tmp_path / "new", _tree(at))
        lost = tmp_path / f".fabric-{files._digest('state')}-{files._HOST}-9999999{at}-0.old"
        (tmp_path / "new").rename(lost)
        os.utime(lost, (1e9 + (at == newest), 1e9 + (at == newest)))
    assert _value(SingleFileCheckpoint, tmp_path / "state") == newest


def test_what_a_killed_process_left_is_swept_and_nothing_else(tmp_path: Path) -> None:
    """Parts of dead processes for this path go; of living ones, of other hosts and of other paths they stay."""
    digest, other = files._digest("state"), files._digest("other")
    dead = [f".fabric-{digest}-{files._HOST}-99999999-0.part", f".fabric-{digest}-{files._HOST}-{os.getpid()}-77.part"]
    kept = [
        f".fabric-{digest}-{files._HOST}-{os.getppid()}-0.part",
        f".fabric-{digest}-00000000-99999999-0.part",
        f".fabric-{other}-{files._HOST}-99999999-0.part",
        ".state.99999999.part",
    ]
    for name in dead + kept:
        (tmp_path / name).write_text("part")
    SingleFileCheckpoint().write(tmp_path / "state", _tree(1))
    assert sorted(one.name for one in tmp_path.iterdir()) == sorted([*kept, "state"])


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("where", ["flush", "rename", "link"])
def test_a_failure_at_any_point_keeps_the_old_one(kind: type[Checkpoint], where: str, tmp_path: Path) -> None:
    """Errors of the system are errors of a checkpoint, the old one is whole, and nothing is left beside it."""
    path = tmp_path / "state"
    kind().write(path, _tree(1))
    if path.is_dir():
        (path / "mine").write_text("mine")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    target = {"flush": "os.fsync", "rename": "pathlib.Path.replace", "link": "shutil.copy2"}[where]
    with (
        patch(target, full),
        patch.object(files, "_exchange", full if where == "rename" else files._exchange),
        patch("os.link", full if where == "link" else os.link),
    ):
        if where == "link" and not path.is_dir():
            return
        with pytest.raises(CheckpointError, match="No space left"):
            kind().write(path, _tree(2))
    assert _value(kind, path) == 1
    assert [one.name for one in tmp_path.iterdir()] == ["state"]


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("kind", FORMATS)
def test_all_of_it_is_on_the_disk_before_it_has_its_name(
    kind: type[Checkpoint], exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file, its folder, and then the name: a machine that loses its power loses neither the old nor the new."""
    path, flush = tmp_path / "state", os.fsync
    if not exchange:
        monkeypatch.setattr(files, "_exchange", lambda *_: False)
    kind().write(path, _tree(1))
    old, flushed = path.stat().st_ino, []

    def noted(handle: int) -> None:
        flush(handle)
        known = os.fstat(handle)
        flushed.append((known.st_ino, known.st_size, path.exists() and path.stat().st_ino != old))

    monkeypatch.setattr("os.fsync", noted)
    kind().write(path, _tree(2))
    before = {(inode, size) for inode, size, named in flushed if not named}
    assert {(one.stat().st_ino, one.stat().st_size) for one in (path, *path.rglob("*"))} <= before
    assert (flushed[-1][0], flushed[-1][2]) == (tmp_path.stat().st_ino, True)


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("new", FORMATS)
def test_what_another_machine_sweeps_first_is_no_error(
    new: type[Checkpoint], exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that saves to the same path takes a checkpoint older than a day, which has just been replaced, for a rest."""
    if not exchange:
        monkeypatch.setattr(files, "_exchange", lambda *_: False)
    DistributedCheckpoint().write(tmp_path / "state", _tree(1))
    flush = files.flush

    def swept(path: Path) -> None:
        flush(path)
        for one in tmp_path.glob(".fabric-*") if path == tmp_path else ():
            shutil.rmtree(one)

    monkeypatch.setattr(files, "flush", swept)
    new().write(tmp_path / "state", _tree(2))
    assert _value(new, tmp_path / "state") == 2


def test_a_folder_that_vanished_and_one_that_cannot_be_written(tmp_path: Path) -> None:
    """A parent that is gone is made again; a file in its place is an error that names the path."""
    SingleFileCheckpoint().write(tmp_path / "a" / "b" / "state", _tree(1))
    shutil.rmtree(tmp_path / "a")
    SingleFileCheckpoint().write(tmp_path / "a" / "b" / "state", _tree(2))
    assert _value(SingleFileCheckpoint, tmp_path / "a" / "b" / "state") == 2
    with pytest.raises(CheckpointError, match="state/below"):
        DistributedCheckpoint().write(tmp_path / "a" / "b" / "state" / "below", _tree(1))
