"""Folders of safetensors, damaged on purpose or made to do harm; and every hostile checkpoint on two ranks."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from fabric_core import Fabric
from fabric_core.conformance.pool import RankPool
from fabric_core.errors import CheckpointError
from fabric_plugins.checkpoints import SafetensorsCheckpoint
from fabric_plugins.checkpoints._manifest import encode
from tests.plugins.checkpoints.test_hostile_files import FILES, FOLDERS, manifest_of, model_and_optimizer


def _parts(path: Path) -> list[Path]:
    return sorted(path.glob("model-*.safetensors"))


def _index(change: Callable[[Any], Any]) -> Callable[[Path], Any]:
    def damage(path: Path) -> None:
        file = path / "model.safetensors.index.json"
        index = json.loads(file.read_bytes())
        changed = change(index)
        file.write_bytes(json.dumps(index if changed is None else changed).encode())
        _resized(path)

    return damage


def _index_of(data: bytes) -> Callable[[Path], Any]:
    def damage(path: Path) -> None:
        (path / "model.safetensors.index.json").write_bytes(data)
        _resized(path)

    return damage


def _resized(path: Path, change: Callable[[Any], Any] = lambda _: None) -> None:
    body = manifest_of(path)
    for name, about in body["files"].items():
        about["bytes"] = (path / name).stat().st_size
    change(body)
    (path / "fabric.json").write_bytes(encode(body))


def _header(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Any]:
    """Change the header of the first part, which holds the weight."""

    def damage(path: Path) -> None:
        file = next(one for one in _parts(path) if b'"weight"' in one.read_bytes())
        data = file.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        changed = change(header)
        text = changed if isinstance(changed, bytes) else json.dumps(header).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
        _resized(path)

    return damage


def _first(change: Callable[[Path], Any]) -> Callable[[Path], Any]:
    def damage(path: Path) -> None:
        change(_parts(path)[0])
        _resized(path)

    return damage


def _piped(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def _index_piped(path: Path) -> None:
    _piped(path / "model.safetensors.index.json")
    _resized(path)


def _place(name: str) -> Callable[[Path], Any]:
    return _index(lambda index: index["weight_map"].update(weight=name))


SAFE: dict[str, Callable[[Path], Any]] = {
    "no index's JSON": _index_of(b"{"),
    "a list for an index": _index(lambda _: [1]),
    "a deep index": _index_of(b"[" * 100_000),
    "no map": _index(lambda index: index.pop("weight_map") and None),
    "a list for a map": _index(lambda index: index.update(weight_map=["weight"])),
    "a number for a file": _place(7),  # type: ignore[arg-type] # as it may be
    "a file outside": _place("../outside.safetensors"),
    "an absolute file": _place("/etc/passwd"),
    "a file that is not there": _place("model-00009-of-00002.safetensors"),
    "a tensor in another file": _index(lambda index: index["weight_map"].update(weight=index["weight_map"]["bias"])),
    "a tensor more": _index(lambda index: index["weight_map"].update(more=index["weight_map"]["bias"])),
    "a tensor less": _index(lambda index: index["weight_map"].pop("bias") and None),
    "an index of another size": lambda path: (path / "model.safetensors.index.json").write_bytes(b"{}"),
    "a pipe for an index": _index_piped,
    "a pipe for a part": _first(_piped),
    "a part less": lambda path: _parts(path)[0].unlink(),
    "an empty part": _first(lambda file: file.write_bytes(b"")),
    "a part of text": _first(lambda file: file.write_text("hello, this is text")),
    "half a part": _first(lambda file: os.truncate(file, file.stat().st_size - 5)),
    "a header beyond the end": _first(lambda file: file.write_bytes(b"\xff" * 8 + file.read_bytes()[8:])),
    "no header's JSON": _header(lambda _: b"{"),
    "a list for a header": _header(lambda _: b"[]"),
    "another type": _header(lambda header: header["weight"].update(dtype="F16")),
    "an unknown type": _header(lambda header: header["weight"].update(dtype="load")),
    "a huge shape": _header(lambda header: header["weight"].update(shape=[1 << 61, 2])),
    "a negative shape": _header(lambda header: header["weight"].update(shape=[-2, -3])),
    "another shape of that size": _header(lambda header: header["weight"].update(shape=[3, 2])),
    "offsets beyond the end": _header(lambda header: header["weight"].update(data_offsets=[0, 1 << 40])),
    "offsets that overlap": _header(lambda header: header["weight"].update(data_offsets=[4, 2])),
    "another name": _header(lambda header: header.update(kernel=header.pop("weight"))),
    "no checksums": _header(lambda header: header["__metadata__"].pop("checksums") and None),
    "checksums of text": _header(lambda header: header["__metadata__"].update(checksums="text")),
    "another checksum": _header(
        lambda header: header["__metadata__"].update(checksums=json.dumps({"weight": "00000000 float32 [2, 3]"}))
    ),
    "a manifest of text in the header": _header(lambda header: header["__metadata__"].update(fabric="text")),
    "code for a manifest in the header": _header(lambda header: header["__metadata__"].update(fabric="__import__")),
    "entries of numbers": lambda path: _resized(path, lambda body: body.update(entries=[1])),
    "no entries": lambda path: _resized(path, lambda body: body.pop("entries") and None),
    "a newer version": lambda path: _resized(path, lambda body: body.update(version=2)),
    "a file outside in the manifest": lambda path: _resized(
        path, lambda body: body["files"].update({"../outside": {"bytes": 1}})
    ),
    "a negative size": lambda path: _resized(path, lambda body: body["files"].update({_INDEX: {"bytes": -1}})),
}
_INDEX = "model.safetensors.index.json"


@pytest.mark.timeout(30)
@pytest.mark.parametrize("case", SAFE)
def test_a_hostile_folder_of_safetensors(case: str, tmp_path: Path) -> None:
    """Whatever is wrong with a folder, the error names it, and nothing has happened."""
    path = tmp_path / "folder"
    with Fabric(accelerator="cpu", devices=1, plugins=[SafetensorsCheckpoint(max_shard_size=20)]) as fabric:
        fabric.save(path, {"model": model_and_optimizer()[0]})
        assert len(_parts(path)) == 2
        SAFE[case](path)
        model, _ = model_and_optimizer()
        before = repr(model.state_dict())
        with pytest.raises(CheckpointError) as caught:
            fabric.load(path, {"model": model})
        assert repr(model.state_dict()) == before
        assert str(path) in str(caught.value)


def _on_two(path: Path, strategy: str, safe: bool, proof: Path) -> str:
    with Fabric(accelerator="cpu", strategy=strategy, devices=2) as fabric:
        fabric.launch()
        bare, raw = model_and_optimizer()
        model, optimizer = fabric.setup(bare, raw)
        state = {"model": model} if safe else {"model": model, "optimizer": optimizer}
        before = [one.tolist() for one in _locals(bare)]
        with pytest.raises(CheckpointError) as caught:
            fabric.load(path, state)
        assert [one.tolist() for one in _locals(bare)] == before
        assert not proof.exists(), "code has run"
        return str(caught.value)


def _locals(model: nn.Module) -> list[Any]:
    return [one.to_local() if hasattr(one, "to_local") else one.detach() for one in model.parameters()]


@pytest.mark.sampled(0.05)
@pytest.mark.parametrize(
    ("kind", "case"),
    [(kind, case) for kind, cases in (("file", FILES), ("folder", FOLDERS), ("safe", SAFE)) for case in cases],
)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_nobody_waits_on_two_ranks(strategy: str, kind: str, case: str, two_ranks: RankPool, tmp_path: Path) -> None:
    """Both ranks refuse it by name, whatever it is, and nothing has happened."""
    path, safe = tmp_path / "state", kind == "safe"
    plugins = [SafetensorsCheckpoint(max_shard_size=20)] if safe else []
    with Fabric(accelerator="cpu", devices=1, plugins=plugins) as fabric:
        model, optimizer = model_and_optimizer()
        state = {"model": model} if safe else {"model": model, "optimizer": optimizer}
        fabric.save(path, state, format={"file": "single_file", "folder": "distributed"}.get(kind))
    {"file": FILES, "folder": FOLDERS, "safe": SAFE}[kind][case](path)
    assert all(str(path) in one for one in two_ranks.run(_on_two, path, strategy, safe, tmp_path / "proof"))
