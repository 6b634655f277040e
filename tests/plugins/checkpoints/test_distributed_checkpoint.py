"""The distributed checkpoint is there whole or not at all, runs no code, and says what does not fit."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fabric_core import Fabric
from fabric_core.conformance.pool import RankPool, RankRaised
from fabric_core.errors import CheckpointError
from fabric_plugins.checkpoints import DistributedCheckpoint


def _tree(value: float) -> dict[str, Any]:
    return {
        "model": {"a.b": torch.full((2, 3), value), "empty": {}},
        "a": {"b": torch.tensor(value)},
        "a.b": torch.tensor(-value),
        "numbers": [1, 2.5, None, "text"],
        "state": {0: {"step": torch.tensor(3.0)}, "0": {"step": torch.tensor(4.0)}},
    }


def _equal(got: Any, expected: Any) -> None:
    if isinstance(expected, dict):
        assert (list(got) and set(got) == set(expected)) or got == expected
        for name in expected:
            _equal(got[name], expected[name])
    elif isinstance(expected, torch.Tensor):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)
    else:
        assert got == expected


def test_any_tree_comes_back(tmp_path: Path) -> None:
    """Names with dots, names that read alike, numbers as keys and empty parts are what they were."""
    path = tmp_path / "checkpoint"
    checkpoint = DistributedCheckpoint()
    checkpoint.write(path, _tree(1.0))
    assert checkpoint.recognises(path)
    _equal(checkpoint.read(path, None), _tree(1.0))
    outline = checkpoint.outline(path)
    assert outline["model"]["a.b"].is_meta
    assert outline["model"]["a.b"].shape == (2, 3)


def test_writing_again_replaces(tmp_path: Path) -> None:
    """The second checkpoint at a path takes the first one's place, and nothing is left aside."""
    path = tmp_path / "checkpoint"
    for value in (1.0, 2.0):
        DistributedCheckpoint().write(path, _tree(value))
    _equal(DistributedCheckpoint().read(path, None), _tree(2.0))
    assert list(tmp_path.iterdir()) == [path]


def test_reading_fills_in_place(tmp_path: Path) -> None:
    """A tensor of the right shape is filled where it lies; another is read whole beside it."""
    path = tmp_path / "checkpoint"
    DistributedCheckpoint().write(path, _tree(1.0))
    own, other = torch.zeros(2, 3), torch.zeros(7)
    tree = DistributedCheckpoint().read(path, {"model": {"a.b": own}, "a": {"b": other}})
    assert own.eq(1).all()
    assert tree["model"]["a.b"].data_ptr() == own.data_ptr()
    assert other.eq(0).all()
    assert tree["a"]["b"] == 1


class _Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("file", [".metadata", "fabric.pt"])
def test_reading_runs_no_code(file: str, tmp_path: Path) -> None:
    """A checkpoint whose pickles would run code is refused, and the code has not run."""
    path = tmp_path / "checkpoint"
    DistributedCheckpoint().write(path, _tree(1.0))
    if file == ".metadata":
        (path / file).write_bytes(pickle.dumps(_Evil(tmp_path / "ran")))
    else:
        torch.save({"plain": {}, "tensors": _Evil(tmp_path / "ran")}, path / file)
    with pytest.raises(CheckpointError, match="need code"):
        DistributedCheckpoint().read(path, None)
    assert not (tmp_path / "ran").exists()


def test_a_part_of_a_checkpoint_is_none(tmp_path: Path) -> None:
    """A directory that lacks a file is not recognised, and reading it says that it is damaged or absent."""
    path = tmp_path / "checkpoint"
    DistributedCheckpoint().write(path, _tree(1.0))
    next(path.glob("*.distcp")).unlink()
    with pytest.raises(CheckpointError, match="can't be read"):
        DistributedCheckpoint().read(path, None)
    (path / ".metadata").unlink()
    assert not DistributedCheckpoint().recognises(path)
    with pytest.raises(CheckpointError, match="no checkpoint"):
        DistributedCheckpoint().read(path, None)


def _save(path: Path, blocked: bool) -> None:
    with Fabric(accelerator="cpu", strategy="fsdp:state_dict_type=sharded", devices=2) as fabric:
        fabric.launch()
        model = fabric.setup(nn.Linear(4, 4))
        fabric.save(path, {"model": model, "value": 1})
        if blocked:
            # A file in the place of a folder: making the folder beside it fails, whoever one is.
            path.with_name(f".{path.name}.part").write_text("in the way")
            fabric.save(path, {"model": model, "value": 2})


def _value(path: Path) -> Any:
    with Fabric(accelerator="cpu", strategy="fsdp", devices=2) as fabric:
        fabric.launch()
        state = {"model": fabric.setup(nn.Linear(4, 4)), "value": None}
        fabric.load(path, state)
        return state["value"]


def test_failing_to_write_leaves_what_was_there(two_ranks: RankPool, tmp_path: Path) -> None:
    """Every rank raises, none waits, and the earlier checkpoint still loads."""
    path = tmp_path / "checkpoint"
    with pytest.raises(RankRaised) as caught:
        two_ranks.run(_save, path, True)
    assert all(error is not None and "can't be written" in error for error in caught.value.errors)
    assert two_ranks.run(_value, path) == [1, 1]


def _mismatch(path: Path, width: int, strict: bool) -> Any:
    with Fabric(accelerator="cpu", strategy="fsdp", devices=2) as fabric:
        fabric.launch()
        raw = nn.Sequential(nn.Linear(4, width)) if width == 5 else nn.Linear(4, 4)
        if width == 3:
            raw.register_parameter("more", nn.Parameter(torch.ones(2)))
        fabric.load(path, {"model": fabric.setup(raw)}, strict=strict)


@pytest.mark.parametrize(("width", "text"), [(5, "missing: '0.bias', '0.weight'"), (3, "more")])
def test_what_does_not_fit_is_an_error_when_strict(width: int, text: str, two_ranks: RankPool, tmp_path: Path) -> None:
    """Names that the checkpoint or the model lacks are named; without ``strict`` the rest is loaded."""
    path = tmp_path / "checkpoint"
    two_ranks.run(_save, path, False)
    with pytest.raises(RankRaised, match=text):
        two_ranks.run(_mismatch, path, width, True)
    two_ranks.run(_mismatch, path, width, False)
