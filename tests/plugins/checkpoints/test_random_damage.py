"""Damaged at random, any file of a checkpoint: a ``CheckpointError``, or a load that is right; nothing changes."""

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fabric_core import Fabric
from fabric_core.errors import CheckpointError

DAMAGES = int(os.environ.get("CHECKPOINT_DAMAGES", "120"))
"""How many for all formats together; ``CHECKPOINT_DAMAGES=2000`` is the full number."""

FORMATS = ["distributed", "single_file", "safetensors"]


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


@pytest.mark.parametrize("form", FORMATS)
def test_damage_is_found_and_changes_nothing(form: str, tmp_path: Path) -> None:
    """Flipped, cut, zeroed, inserted, swapped and overwritten bytes of every file."""
    with Fabric(accelerator="cpu", devices=1) as fabric:
        saved = _objects(1, form)
        fabric.save(tmp_path / "good", saved, format=form)
        files = [one for one in sorted((tmp_path / "good").rglob("*")) if one.is_file()] or [tmp_path / "good"]
        right, found = _shown(saved), 0
        for number in range(DAMAGES // len(FORMATS)):
            draw = random.Random(number)  # noqa: S311 - no secret
            file = files[number % len(files)]
            whole = file.read_bytes()
            data = bytearray(whole)
            draw.choice(WAYS)(data, draw)
            file.write_bytes(data)
            state = _objects(2, form)
            before = _shown(state)
            said = None
            try:
                fabric.load(tmp_path / "good", state)
            except CheckpointError as error:
                said = str(error)
            found += said is not None
            assert said is None or str(tmp_path / "good") in said, (number, said)
            assert _shown(state) == (right if said is None else before), (number, file.name, said)
            file.write_bytes(whole)
        assert found > DAMAGES // len(FORMATS) // 3, "most damage matters"
        shutil.rmtree(tmp_path / "good", ignore_errors=True)
