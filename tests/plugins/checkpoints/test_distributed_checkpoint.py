"""The distributed checkpoint is there whole or not at all, runs no code, and says what does not fit."""

import errno
import pickle
import warnings
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict_loader import load

from fabric_core import Fabric
from fabric_core.conformance.pool import RankPool, RankRaised
from fabric_core.errors import CheckpointError
from fabric_plugins.checkpoints import DistributedCheckpoint
from tests.plugins.checkpoints.forging import forge


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


def test_much_is_written_to_several_files(tmp_path: Path) -> None:
    """They are of about one size, all of it comes back, and one that can't be written fails the whole."""
    path, tree = (
        tmp_path / "checkpoint",
        {f"t{number}": torch.full((100 + number,), float(number)) for number in range(9)},
    )
    with patch("fabric_plugins.checkpoints._records._SHARE", 1000), patch("torch.get_num_threads", lambda: 3):
        DistributedCheckpoint().write(path, tree)
        sizes = [(path / f"__0_{number}.distcp").stat().st_size for number in range(3)]
        assert not (path / "__0_3.distcp").exists()
        assert max(sizes) < 1.1 * min(sizes)
        _equal(DistributedCheckpoint().read(path, None), tree)
        writes = torch.save

        def fails(value: Any, file: Any) -> None:
            if isinstance(value, torch.Tensor) and value.numel() == 104:
                raise OSError(errno.ENOSPC, "No space left on device")
            writes(value, file)

        with patch("torch.save", fails), pytest.raises(CheckpointError, match="No space left"):
            DistributedCheckpoint().write(path, {name: one + 1 for name, one in tree.items()})
    _equal(DistributedCheckpoint().read(path, None), tree)
    assert [one.name for one in tmp_path.iterdir()] == ["checkpoint"]


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


def test_pytorchs_own_metadata_is_never_read(tmp_path: Path) -> None:
    """A pickle that would run code in the place of ``.metadata`` is passed over, and has not run."""
    path = tmp_path / "checkpoint"
    DistributedCheckpoint().write(path, _tree(1.0))
    (path / ".metadata").write_bytes(pickle.dumps(_Evil(tmp_path / "ran")))
    _equal(DistributedCheckpoint().read(path, None), _tree(1.0))
    (path / ".metadata").unlink()
    _equal(DistributedCheckpoint().read(path, None), _tree(1.0))
    assert not (tmp_path / "ran").exists()


def test_an_outline_that_would_run_code_is_refused(tmp_path: Path) -> None:
    """The outline is read as data, also where its checksum was forged to fit."""
    path = tmp_path / "checkpoint"
    DistributedCheckpoint().write(path, {"a": 1})
    torch.save({"a": _Evil(tmp_path / "ran")}, path / "fabric.pt")
    forge(path)
    with pytest.raises(CheckpointError, match="need code"):
        DistributedCheckpoint().read(path, None)
    assert not (tmp_path / "ran").exists()


def test_pytorchs_tools_read_it(tmp_path: Path) -> None:
    """``torch.distributed.checkpoint`` loads the tensors by the keys of their names joined by dots."""
    path = tmp_path / "checkpoint"
    DistributedCheckpoint().write(path, {"model": {"a.b": torch.full((2, 3), 4.0), "step": torch.tensor(7)}})
    into = {"model.a.b": torch.zeros(2, 3), "model.step": torch.tensor(0)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that it reads alone
        load(into, checkpoint_id=path)
        dcp_to_torch_save(path, tmp_path / "plain.pt")
    assert into["model.a.b"].eq(4).all()
    assert into["model.step"] == 7
    assert torch.load(tmp_path / "plain.pt")["model"]["a.b"].eq(4).all()


def test_a_part_of_a_checkpoint_is_none(tmp_path: Path) -> None:
    """A folder that lacks a file is refused by the file's name; without a manifest it is no checkpoint."""
    path = tmp_path / "checkpoint"
    DistributedCheckpoint().write(path, _tree(1.0))
    next(path.glob("*.distcp")).unlink()
    with pytest.raises(CheckpointError, match=r"only a part of one[\s\S]*__0_0.distcp"):
        DistributedCheckpoint().read(path, None)
    (path / "fabric.json").unlink()
    assert not DistributedCheckpoint().recognises(path)
    with pytest.raises(CheckpointError, match="no checkpoint"):
        DistributedCheckpoint().read(path, None)


def _save(path: Path, blocked: bool) -> None:
    with Fabric(accelerator="cpu", strategy="fsdp:state_dict_type=sharded", devices=2) as fabric:
        fabric.launch()
        model = fabric.setup(nn.Linear(4, 4))
        fabric.save(path, {"model": model, "value": 1})
        if blocked:
            with patch("fabric_plugins.checkpoints._files._exchange", _full_disk):
                fabric.save(path, {"model": model, "value": 2})


def _full_disk(*_: Path) -> bool:
    raise OSError(errno.ENOSPC, "No space left on device")


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
    assert all(error is not None and "No space left" in error for error in caught.value.errors)
    assert [one.name for one in tmp_path.iterdir()] == ["checkpoint"]
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
