"""``fabric-core checkpoint`` shows, checks, converts and compares checkpoints."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from fabric_core import Fabric
from fabric_core.cli._checkpoint import checkpoint
from fabric_core.errors import CheckpointError, FabricError


def _run(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(checkpoint, [*map(str, arguments)])
    if isinstance(result.exception, FabricError):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.output


def _save(path: Path, form: str, value: float = 1.0) -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters())
    torch.autograd.backward(model(torch.ones(1, 3)).sum())
    optimizer.step()
    with Fabric(accelerator="cpu", devices=1) as fabric:
        state = {"model": model, "optimizer": optimizer, "epoch": value, "list": [torch.ones(2), (1, "a")]}
        fabric.save(path, state, format=form)


@pytest.mark.parametrize("form", ["single_file", "distributed"])
def test_info_and_verify(form: str, tmp_path: Path) -> None:
    """Entries, plan and versions; all is read, and damage is found by the file's name."""
    _save(tmp_path / "a", form)
    shown = json.loads(_run("info", tmp_path / "a", "--json"))
    assert shown["format"] == form
    assert {"entry": "model.weight", "shape": [2, 3], "dtype": "float32", "bytes": 24} in shown["tensors"]
    assert shown["about"]["world_size"] == 1
    assert shown["plain"] == ["epoch"]
    assert "model.weight  float32 (2, 3)" in _run("info", tmp_path / "a")
    assert json.loads(_run("verify", tmp_path / "a", "--json"))["sound"] is True
    assert "sound" in _run("verify", tmp_path / "a")
    file = tmp_path / "a" if form == "single_file" else tmp_path / "a" / "__0_0.distcp"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=str(file)):
        _run("verify", tmp_path / "a")


def test_info_shows_names_as_they_are(tmp_path: Path) -> None:
    """Brackets stay, which style text elsewhere, and nothing is wrapped; of a checkpoint of Fabric's its plan too."""
    path = tmp_path / ("[bold]" + "a" * 100)
    with Fabric(accelerator="cpu", devices=1) as fabric:
        fabric.save(path, {"[red]": 1, "b" * 100: 2}, format="single_file")
    first, *rest = _run("info", path).splitlines()
    assert first == f"{path}: single_file, 0 tensors, 0 bytes"
    assert rest[0] == "  world_size: 1"
    assert rest[-1] == f"  plain values: [red], {'b' * 100}"
    assert "strategy single_device, precision 32-true" in rest[-2]


def test_convert_and_back_is_equal(tmp_path: Path) -> None:
    """Through both formats, nested lists and optimizer included; and only the weights to safetensors."""
    _save(tmp_path / "a", "distributed")
    _run("consolidate", tmp_path / "a", tmp_path / "b.pt")
    assert set(torch.load(tmp_path / "b.pt", weights_only=True)) == {"model", "optimizer", "epoch", "list"}
    _run("convert", tmp_path / "b.pt", tmp_path / "c", "--format", "distributed")
    assert "equal" in _run("diff", tmp_path / "a", tmp_path / "c")
    _run("convert", tmp_path / "c", tmp_path / "d.safetensors", "--entry", "model")
    _run("convert", tmp_path / "d.safetensors", tmp_path / "e.pt", "--format", "single_file")
    weights = torch.load(tmp_path / "e.pt", weights_only=True)["model"]
    assert torch.equal(weights["weight"], torch.load(tmp_path / "b.pt", weights_only=True)["model"]["weight"])
    with pytest.raises(CheckpointError, match="--format"):
        _run("convert", tmp_path / "a", tmp_path / "f")
    with pytest.raises(CheckpointError, match="'nothing'"):
        _run("convert", tmp_path / "a", tmp_path / "f.safetensors", "--entry", "nothing")
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        _run("info", tmp_path / "absent")
    assert sorted(one.name for one in tmp_path.iterdir()) == ["a", "b.pt", "c", "d.safetensors", "e.pt"]


def test_diff_names_what_differs(tmp_path: Path) -> None:
    """Values, shapes, what only one has, and plain values; exit code 1."""
    torch.save({"a": torch.ones(2), "b": torch.ones(2), "c": 1, "d": torch.ones(1)}, tmp_path / "one")
    torch.save({"a": torch.ones(2), "b": torch.ones(3), "c": 2, "e": torch.ones(1)}, tmp_path / "two")
    torch.save({"a": torch.tensor([1.0, 3.5])}, tmp_path / "three")
    shown: Any = json.loads(_run("diff", tmp_path / "one", tmp_path / "two", "--json", code=1))
    assert [one["entry"] for one in shown["differences"]] == ["b", "c", "d", "e"]
    assert "largest_difference: 2.5" in _run("diff", tmp_path / "one", tmp_path / "three", code=1)


_MEASURED = """
import sys, threading
import torch.distributed.checkpoint.default_planner
from fabric_core.cli._checkpoint import convert

def anonymous():
    with open("/proc/self/smaps_rollup") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("Anonymous")) // 1024

def watch():
    while not stop.wait(0.002):
        seen.append(anonymous())

stop, seen = threading.Event(), []
before = anonymous()
thread = threading.Thread(target=watch)
thread.start()
convert(*sys.argv[1:])
stop.set()
thread.join()
print(max(seen) - before)
"""
"""Prints how many megabytes a conversion has of its own at most, without what is mapped from files or reserved."""


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="the system must tell what memory is whose")
@pytest.mark.parametrize(("old", "new"), [("distributed", "single_file"), ("safetensors", "distributed")])
def test_memory_is_bounded_by_the_largest_tensor(old: str, new: str, tmp_path: Path) -> None:
    """Converting fifty tensors of 4 MB takes less than twenty of them; it is some four, and what is imported."""
    tensors = {f"w{number}": torch.full((1000, 1000), float(number)) for number in range(50)}
    with Fabric(accelerator="cpu", devices=1) as fabric:
        fabric.save(tmp_path / "a", {"model": tensors}, format=old)
    done = subprocess.run(
        [sys.executable, "-c", _MEASURED, str(tmp_path / "a"), str(tmp_path / "b"), new],
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.splitlines()[-1]) < 80
    with Fabric(accelerator="cpu", devices=1) as fabric:
        assert fabric.load(tmp_path / "b")["model"]["w49"].eq(49).all()
