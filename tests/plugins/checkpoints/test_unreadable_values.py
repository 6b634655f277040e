"""What could not be read again without running code is not saved in the first place."""

import collections
import datetime as dt
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fabric_core import Checkpoint, Fabric
from fabric_core.conformance.pool import RankPool, RankRaised
from fabric_core.errors import CheckpointError
from fabric_plugins.checkpoints import DistributedCheckpoint, SingleFileCheckpoint

FORMATS: list[type[Checkpoint]] = [SingleFileCheckpoint, DistributedCheckpoint]


@pytest.mark.parametrize(
    "value",
    [
        np.float64(1.5),
        np.ones(2),
        np.random.default_rng(0).bit_generator.state["state"] | {"generator": np.random.default_rng(0)},
        Path("a"),
        dt.datetime(2020, 1, 1, tzinfo=dt.UTC),
        collections.deque([1]),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("kind", FORMATS)
def test_it_is_refused_by_name(kind: type[Checkpoint], value: Any, tmp_path: Path) -> None:
    """The error names the entry and its type and says what to write; what lay there before is still there."""
    path = tmp_path / "checkpoint"
    kind().write(path, {"kept": 1})
    with pytest.raises(CheckpointError) as caught:
        kind().write(path, {"model": {"weight": torch.ones(2)}, "meta": {"all": [0, value]}})
    said = str(caught.value)
    assert "entry 'meta'['all'][1]" in said
    assert "torch.from_numpy" in said
    assert kind().read(path, None) == {"kept": 1}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("kind", FORMATS)
def test_what_can_be_read_is_saved(kind: type[Checkpoint], tmp_path: Path) -> None:
    """Numbers, text, bytes, sets, types of numbers, random states, and lists of tensors come back."""
    tree: dict[str, Any] = {
        "plain": [1, 2.5, None, "text", b"bytes", {1, 2}, True, 1 + 2j, torch.float32, (1, (2,))],
        "counter": collections.Counter("aab"),
        "ordered": collections.OrderedDict(a=1),
        "generator": torch.Generator().get_state(),
        "tensors": [torch.ones(2), nn.Parameter(torch.zeros(1))],
    }
    path = tmp_path / "checkpoint"
    kind().write(path, tree)
    back = kind().read(path, None)
    assert back["plain"] == tree["plain"]
    assert back["counter"] == tree["counter"]
    assert back["ordered"] == tree["ordered"]
    assert torch.equal(back["generator"], tree["generator"])
    assert [one.tolist() for one in back["tensors"]] == [[1.0, 1.0], [0.0]]


def _on_one_rank(path: Path, rank: int) -> None:
    with Fabric(accelerator="cpu", strategy="fsdp:state_dict_type=sharded", devices=2) as fabric:
        fabric.launch()
        model = fabric.setup(nn.Linear(2, 2))
        fabric.save(path, {"model": model, "own": Path("a") if fabric.global_rank == rank else "a"})


def test_no_rank_is_left_waiting(two_ranks: RankPool, tmp_path: Path) -> None:
    """What rank 0 can't write, every rank refuses; what another has instead is not written, and hurts nobody."""
    with pytest.raises(RankRaised) as caught:
        two_ranks.run(_on_one_rank, tmp_path / "refused", 0)
    assert all(error is not None and "the entry 'own' can't be saved" in error for error in caught.value.errors)
    two_ranks.run(_on_one_rank, tmp_path / "written", 1)
