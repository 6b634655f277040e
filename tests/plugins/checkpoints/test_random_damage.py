"""Damaged at random, any file of a checkpoint: a ``CheckpointError``, or a load that is right; nothing changes."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fabric_core import Fabric
from fabric_core.conformance.pool import RankPool
from fabric_core.errors import CheckpointError
from fabric_plugins.checkpoints import SafetensorsCheckpoint

DAMAGES = 20
"""How many for each of twenty batches of each of five formats: 2,000."""

FORMATS = {
    "distributed": 4, "distributed by two": 4, "single_file": 1, "safetensors": 2, "safetensors in parts": 4,
}  # fmt: skip
"""And of how many files each is."""


def _flip(data: bytearray, draw: random.Random) -> None:
    for _ in range(draw.choice([1, 1, 2, 8])):
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)


def _cut(data: bytearray, draw: random.Random) -> None:
    del data[draw.randrange(len(data)) :]


def _zero(data: bytearray, draw: random.Random) -> None:
    start = draw.randrange(len(data))
    length = min(draw.randrange(1, 512), len(data) - start)
    data[start : start + length] = bytes(length)


def _insert(data: bytearray, draw: random.Random) -> None:
    at = draw.randrange(len(data))
    data[at:at] = draw.randbytes(draw.randrange(1, 64))


def _swap(data: bytearray, draw: random.Random) -> None:
    length = min(64, len(data) // 2)
    one, other = draw.randrange(len(data) - length + 1), draw.randrange(len(data) - length + 1)
    data[one : one + length], data[other : other + length] = data[other : other + length], data[one : one + length]


def _noise(data: bytearray, draw: random.Random) -> None:
    start = draw.randrange(len(data))
    part = draw.randbytes(min(draw.randrange(1, 64), len(data) - start))
    data[start : start + len(part)] = part


WAYS: list[Callable[[bytearray, random.Random], None]] = [_flip, _cut, _zero, _insert, _swap, _noise]


def _objects(seed: int, form: str) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 4))
    if form == "safetensors":
        return {"model": model}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1 * seed)
    model(torch.randn(5, 8)).square().sum().backward()
    optimizer.step()
    return {"model": model, "optimizer": optimizer, "meta": {"epoch": seed, "names": ["a", (seed,)]}}


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return (str(value.dtype), value.tolist())
    return {name: _plain(one) for name, one in value.items()} if isinstance(value, dict) else value


def _shown(state: dict[str, Any]) -> str:
    return repr([_plain(one.state_dict()) if hasattr(one, "state_dict") else one for one in state.values()])


def _fabric(ranks: int, form: str) -> Fabric:
    parts = [SafetensorsCheckpoint(max_shard_size=800)] if form.endswith("in parts") else []
    return Fabric(accelerator="cpu", strategy="ddp" if ranks > 1 else "auto", devices=ranks, plugins=parts)


def _save(path: Path, form: str, ranks: int) -> None:
    with _fabric(ranks, form) as fabric:
        fabric.launch()
        name = form.partition(" ")[0]
        fabric.save(path, _objects(1, name), format=None if form.endswith("in parts") else name)


def _load(path: Path, form: str, ranks: int) -> str | None:
    """Load a damaged checkpoint; gives what the error said, once everything is as it must be then."""
    with _fabric(ranks, form) as fabric:
        fabric.launch()
        name = form.partition(" ")[0]
        right, state = _shown(_objects(1, name)), _objects(2, name)
        before, said = _shown(state), None
        try:
            fabric.load(path, state)
        except CheckpointError as error:
            said = str(error)
        assert said is None or str(path) in said, said
        assert _shown(state) == (right if said is None else before), said
        return said


def _damaged(path: Path, number: int) -> tuple[Path, bytes]:
    """Damage one file, each in turn; gives it, and what it was."""
    files = [one for one in sorted(path.rglob("*")) if one.is_file()] or [path]
    draw = random.Random(number)  # noqa: S311 - no secret
    file = files[number % len(files)]
    whole = file.read_bytes()
    data = bytearray(whole)
    draw.choice(WAYS)(data, draw)
    file.write_bytes(data)
    return file, whole


@pytest.mark.sampled(0.05)
@pytest.mark.parametrize("batch", range(20))
@pytest.mark.parametrize("form", FORMATS)
def test_damage_is_found_and_changes_nothing(form: str, batch: int, two_ranks: RankPool, tmp_path: Path) -> None:
    """Flipped, cut, zeroed, inserted, swapped and overwritten bytes of every file, by one rank or two.

    Either every rank says so and nothing has changed, or the load is right; nobody waits.
    """
    ranks = 2 if form.endswith("by two") else 1
    path, found, files = tmp_path / "good", 0, set()
    two_ranks.run(_save, path, form, ranks) if ranks > 1 else _save(path, form, ranks)
    for number in range(batch * DAMAGES, (batch + 1) * DAMAGES):
        file, whole = _damaged(path, number)
        try:
            said = two_ranks.run(_load, path, form, ranks) if ranks > 1 else [_load(path, form, ranks)]
        except Exception as error:
            error.add_note(f"{file.name}, damage {number}")
            raise
        assert len({one is None for one in said}) == 1, said
        found += said[0] is not None
        files.add(file.name)
        file.write_bytes(whole)
    assert found > DAMAGES // 4, "most damage matters"
    assert len(files) == FORMATS[form]
