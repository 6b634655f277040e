"""Damaged on purpose, or made to do harm: refused by name, without running anything, with nothing changed."""

import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fabric_core import Checkpoint, Fabric
from fabric_core.errors import CheckpointError
from fabric_plugins.checkpoints import DistributedCheckpoint, SingleFileCheckpoint
from fabric_plugins.checkpoints._manifest import encode
from tests.plugins.checkpoints.forging import forge


class _Evil:
    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.proof),))


# Folders


def manifest_of(path: Path) -> Any:
    """Give the body of a folder's manifest."""
    return json.loads((path / "fabric.json").read_bytes())["manifest"]


def _record(change: Callable[[list[Any]], None]) -> Callable[[Path], Any]:
    def damage(path: Path) -> None:
        def one(body: Any) -> None:
            change(body["tensors"]["model.weight"]["records"][0])

        forge(path, one)

    return damage


def _manifest(change: Callable[[Any], Any]) -> Callable[[Path], Any]:
    return lambda path: forge(path, change)


def _set(place: int, value: Any) -> Callable[[Path], Any]:
    return _record(lambda record: record.__setitem__(place, value))


def _write(name: str, data: bytes) -> Callable[[Path], Any]:
    def damage(path: Path) -> None:
        (path / name).write_bytes(data)

    return damage


def _outside(path: Path) -> None:
    (path.parent / "outside").write_bytes((path / "__0_0.distcp").read_bytes())
    _set(2, "../outside")(path)


def _linked(path: Path) -> None:
    (path.parent / "outside").write_bytes((path / "__0_0.distcp").read_bytes())
    (path / "__0_0.distcp").unlink()
    (path / "__0_0.distcp").symlink_to(path.parent / "outside")


def _pipe(name: str) -> Callable[[Path], Any]:
    def damage(path: Path) -> None:
        (path / name).unlink()
        os.mkfifo(path / name)

    return damage


def _folder(name: str) -> Callable[[Path], Any]:
    def damage(path: Path) -> None:
        (path / name).unlink()
        (path / name).mkdir()

    return damage


def _outline(value: Any) -> Callable[[Path], Any]:
    def damage(path: Path) -> None:
        torch.save(value, path / "fabric.pt")
        forge(path)

    return damage


def _evil_outline(path: Path) -> None:
    torch.save({"model": _Evil(path.parent / "proof")}, path / "fabric.pt")
    forge(path)


def _evil_record(path: Path) -> None:
    memory = io.BytesIO()
    torch.save(_Evil(path.parent / "proof"), memory)
    (path / "__0_0.distcp").write_bytes(memory.getvalue())

    def all_of_it(body: Any) -> None:
        for entry in body["tensors"].values():
            entry["records"][0][3:5] = [0, len(memory.getvalue())]

    forge(path, all_of_it)
    forge(path)


def _garbage(path: Path) -> None:
    (path / "__0_0.distcp").write_bytes(b"x" * (path / "__0_0.distcp").stat().st_size)
    forge(path)


def _sparse(path: Path, name: str) -> None:
    """Make a file of a terabyte that takes no room, and let the manifest say that it is so."""
    os.truncate(path / name, 1 << 40)
    body = manifest_of(path)
    body["files"][name]["bytes"] = 1 << 40
    if name.endswith(".distcp"):
        body["tensors"]["model.weight"]["records"][0][3:5] = [0, 1 << 40]
    (path / "fabric.json").write_bytes(encode(body))


FOLDERS: dict[str, Callable[[Path], Any]] = {
    "no manifest's JSON": _write("fabric.json", b"{"),
    "an empty manifest": _write("fabric.json", b""),
    "a list for a manifest": _write("fabric.json", b"[]"),
    "a deep manifest": _write("fabric.json", b"[" * 100_000),
    "a number for a manifest": _write("fabric.json", b'{"manifest": 1, "checksum": "x"}'),
    "a manifest without a checksum": _write("fabric.json", b'{"manifest": {}}'),
    "another checksum": _write("fabric.json", b'{"manifest": {"version": 1}, "checksum": "00000000"}'),
    "no fields": lambda path: (path / "fabric.json").write_bytes(encode({})),
    "a newer version": _manifest(lambda body: body.update(version=2)),
    "text for a version": _manifest(lambda body: body.update(version="1")),
    "files as a list": lambda path: _write("fabric.json", encode({**manifest_of(path), "files": []}))(path),
    "a negative size": _manifest(lambda body: body["files"]["__0_0.distcp"].update(bytes=-1)),
    "another size": _manifest(lambda body: body["files"]["__0_0.distcp"].update(bytes=1)),
    "a file outside": _outside,
    "an absolute file": _set(2, "/etc/passwd"),
    "a hidden way up": _set(2, "g-0000000000000000/../../outside"),
    "a file with a NUL": _set(2, "a\0b"),
    "a number for a file": _set(2, 7),
    "a link to outside": _linked,
    "a pipe for records": _pipe("__0_0.distcp"),
    "a pipe for the outline": _pipe("fabric.pt"),
    "a place beyond the end": _set(3, 1 << 40),
    "a negative place": _set(3, -1),
    "a length beyond the end": _set(4, 1 << 40),
    "a length beyond numbers": _set(4, 1 << 80),
    "a checksum of no text": _set(5, 5),
    "a record of three": _record(lambda record: record.__delitem__(slice(3, None))),
    "an offset beyond the shape": _set(0, [100, 0]),
    "negative offsets": _set(0, [-1, 0]),
    "other sizes": _set(1, [1, 1]),
    "sizes of text": _set(1, "ab"),
    "a huge shape": _manifest(lambda body: body["tensors"]["model.weight"].update(shape=[1 << 61, 2])),
    "an unknown type": _manifest(lambda body: body["tensors"]["model.weight"].update(dtype="load")),
    "another type": _manifest(lambda body: body["tensors"]["model.weight"].update(dtype="float64")),
    "no records": _manifest(lambda body: body["tensors"]["model.weight"].update(records=[])),
    "a tensor less": _manifest(lambda body: body["tensors"].pop("model.weight")),
    "an outline that is a list": _outline([1]),
    "an outline of another model": _outline({"model": {"weight": torch.empty(9, 9, device="meta")}}),
    "text where the model belongs": _outline({"model": "text"}),
    "text where a tensor belongs": _outline({"model": {"weight": "text", "bias": "text"}}),
    "an outline with code": _evil_outline,
    "a record with code": _evil_record,
    "a record that is no archive": _garbage,
    "a manifest beyond reason": lambda path: os.truncate(path / "fabric.json", 1 << 40),
    "an outline beyond reason": lambda path: _sparse(path, "fabric.pt"),
    "a record beyond reason": lambda path: _sparse(path, "__0_0.distcp"),
    "a folder for the manifest": _folder("fabric.json"),
    "a folder for the records": _folder("__0_0.distcp"),
    "no outline": lambda path: (path / "fabric.pt").unlink(),
}


def model_and_optimizer() -> tuple[Any, Any]:
    """Give what the hostile checkpoints are of, after a step."""
    torch.manual_seed(3)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return model, optimizer


def _refused(fabric: Fabric, path: Path, proof: Path) -> str:
    model, optimizer = model_and_optimizer()
    before = repr([model.state_dict(), optimizer.state_dict()])
    with pytest.raises(CheckpointError) as caught:
        fabric.load(path, {"model": model, "optimizer": optimizer})
    assert repr([model.state_dict(), optimizer.state_dict()]) == before
    assert not proof.exists(), "code has run"
    return str(caught.value)


@pytest.mark.timeout(30)
@pytest.mark.parametrize("case", FOLDERS)
def test_a_hostile_folder(case: str, tmp_path: Path) -> None:
    """Whatever is wrong with a folder, the error names it, and nothing has happened."""
    path = tmp_path / "folder"
    with Fabric(accelerator="cpu", devices=1) as fabric:
        model, optimizer = model_and_optimizer()
        fabric.save(path, {"model": model, "optimizer": optimizer}, format="distributed")
        FOLDERS[case](path)
        assert str(path) in _refused(fabric, path, tmp_path / "proof")


# Single files


def _rewritten(path: Path, change: Callable[[str, bytes], bytes | None], **options: Any) -> None:
    """Write an archive anew, with true checksums."""
    with zipfile.ZipFile(path) as old:
        records = [(one, old.read(one)) for one in old.namelist()]
    with zipfile.ZipFile(path, "w", **options) as new:
        for name, data in records:
            changed = change(name, data)
            if changed is not None:
                new.writestr(name, changed)


def _doubled(path: Path) -> None:
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("ARCHIVE/data/0", b"x" * 24)


def _with_pickle(data: bytes) -> Callable[[Path], Any]:
    return lambda path: _rewritten(path, lambda name, old: data if name.endswith("/data.pkl") else old)


def _saved(make: Callable[[Path], Any]) -> Callable[[Path], Any]:
    return lambda path: torch.save(make(path.parent / "proof"), path)


def _optimizer(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Any]:
    def make(_: Path) -> dict[str, Any]:
        model, optimizer = model_and_optimizer()
        state = optimizer.state_dict()
        changed = change(state)
        return {"model": model.state_dict(), "optimizer": state if changed is None else changed}

    return _saved(make)


def _weights(weight: Any) -> Callable[[Path], Any]:
    return _saved(lambda _: {"model": {"weight": weight, "bias": torch.ones(2)}, "optimizer": {}})


FILES: dict[str, Callable[[Path], Any]] = {
    "an emptied record": lambda path: _rewritten(path, lambda name, old: b"" if name.endswith("data/0") else old),
    "a shortened record": lambda path: _rewritten(path, lambda name, old: old[:-4] if "/data/" in name else old),
    "a lengthened record": lambda path: _rewritten(path, lambda name, old: old + b"more" if "/data/" in name else old),
    "a record less": lambda path: _rewritten(path, lambda name, old: None if name.endswith("data/1") else old),
    "no pickle": lambda path: _rewritten(path, lambda name, old: None if name.endswith("data.pkl") else old),
    "two records of one name": _doubled,
    "compressed records": lambda path: _rewritten(path, lambda _, old: old, compression=zipfile.ZIP_DEFLATED),
    "code": _saved(lambda proof: {"model": _Evil(proof)}),
    "code in a plain pickle": lambda path: path.write_bytes(pickle.dumps(_Evil(path.parent / "proof"))),
    "a pickle of nothing": _with_pickle(b""),
    "a pickle that never ends": _with_pickle(b"\x80\x02" + b"(" * 1000),
    "a pickle of text": _with_pickle(pickle.dumps("text", 2)),
    "a huge text": _with_pickle(b"\x80\x02\x8d" + b"\xff" * 7 + b"\x7f."),
    "a list": _saved(lambda _: [1]),
    "text for a model": _saved(lambda _: {"model": "text", "optimizer": {}}),
    "a list for a model": _saved(lambda _: {"model": [1], "optimizer": {}}),
    "text for a tensor": _weights("text"),
    "complex for real": _weights(torch.ones(2, 3, dtype=torch.complex64)),
    "another shape": _weights(torch.ones(3, 2)),
    "an empty file": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("hello"),
    "the beginning alone": lambda path: path.write_bytes(path.read_bytes()[:70]),
    "text for a state": _optimizer(lambda _: "text"),
    "no groups": _optimizer(lambda state: state.pop("param_groups")),
    "text for groups": _optimizer(lambda state: state.update(param_groups="text")),
    "groups of text": _optimizer(lambda state: state.update(param_groups=["text"])),
    "a learning rate of text": _optimizer(lambda state: state["param_groups"][0].update(lr="fast")),
    "a list for states": _optimizer(lambda state: state.update(state=[1])),
    "states of nobody": _optimizer(lambda state: state["state"].update({9: {}})),
    "a state of text": _optimizer(lambda state: state["state"].update({0: "text"})),
    "a moment of another shape": _optimizer(lambda state: state["state"][0].update(momentum_buffer=torch.ones(5))),
    "a complex moment": _optimizer(
        lambda state: state["state"][0].update(momentum_buffer=torch.ones(2, 3, dtype=torch.complex64))
    ),
    "a moment of text": _optimizer(lambda state: state["state"][0].update(momentum_buffer="text")),
}


@pytest.mark.timeout(30)
@pytest.mark.parametrize("case", FILES)
def test_a_hostile_file(case: str, tmp_path: Path) -> None:
    """Whatever is wrong with a file, the error names it, and nothing has happened."""
    path = tmp_path / "file.pt"
    with Fabric(accelerator="cpu", devices=1) as fabric:
        model, optimizer = model_and_optimizer()
        fabric.save(path, {"model": model, "optimizer": optimizer})
        FILES[case](path)
        assert str(path) in _refused(fabric, path, tmp_path / "proof")


@pytest.mark.parametrize("ask", ["recognises", "describe", "outline", "check", "read"])
@pytest.mark.parametrize(
    ("kind", "damage"),
    [(SingleFileCheckpoint, FILES["code"]), (DistributedCheckpoint, FOLDERS["an outline with code"])],
    ids=["single_file", "distributed"],
)
def test_looking_at_a_checkpoint_runs_no_code(
    kind: type[Checkpoint], damage: Callable[[Path], Any], ask: str, tmp_path: Path
) -> None:
    """Whatever is asked of a format about it, and whatever it answers."""
    path = tmp_path / "state"
    kind().write(path, {"model": {"weight": torch.ones(2)}})
    damage(path)
    with suppress(CheckpointError):
        getattr(kind(), ask)(path, *([None] if ask in {"check", "read"} else []))
    assert not (tmp_path / "proof").exists(), "code has run"


NAMES: dict[str, Any] = {
    "nothing": "",
    "blanks": "  ",
    "the folder itself": ".",
    "the folder above": "..",
    "a NUL": "a\0b",
    "a long name": "x" * 256,
    "below a file": "file/below",
    "bytes": b"bytes",
    "a number": 7,
    "no URL of any system": "nowhere://bucket/name",
}


@pytest.mark.parametrize("case", NAMES)
def test_a_path_that_is_none(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such paths are refused by ``save`` and by ``load``, and leave nothing."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("text")
    with Fabric(accelerator="cpu", devices=1) as fabric:
        for form in ("single_file", "distributed", "safetensors"):
            with pytest.raises(CheckpointError):
                fabric.save(NAMES[case], {"model": nn.Linear(1, 1)}, format=form)
        with pytest.raises(CheckpointError):
            fabric.load(NAMES[case], {"model": nn.Linear(1, 1)})
    assert [one.name for one in tmp_path.iterdir()] == ["file"]


def test_a_name_of_255_bytes_is_saved(tmp_path: Path) -> None:
    """As long as file systems take them, names are fine."""
    with Fabric(accelerator="cpu", devices=1) as fabric:
        for form in ("single_file", "distributed"):
            fabric.save(tmp_path / (form[0] * 255), {"value": 1}, format=form)
            assert fabric.load(tmp_path / (form[0] * 255)) == {"value": 1}


@pytest.mark.parametrize("length", [1, 25, 26, 252])
def test_what_torch_save_wrote_is_loaded_and_replaced_whatever_its_name(length: int, tmp_path: Path) -> None:
    """It writes the file's own name into the beginning of the file."""
    path = tmp_path / f"{'x' * length}.pt"
    torch.save({"value": 1}, path)
    with Fabric(accelerator="cpu", devices=1) as fabric:
        assert fabric.load(path) == {"value": 1}
        fabric.save(path, {"value": 2})
        assert fabric.load(path) == {"value": 2}


def test_trusted_files_may_need_code(tmp_path: Path) -> None:
    """With ``weights_only=False`` a pickled object is made, as ``torch.load`` makes it."""
    torch.save({"value": Path("a"), "model": nn.Linear(1, 1).state_dict()}, tmp_path / "file.pt")
    torch.save({"weight": torch.ones(1, 1), "bias": torch.ones(1)}, tmp_path / "bare.pt")
    with Fabric(accelerator="cpu", devices=1) as fabric:
        for weights_only in (None, True):
            with pytest.raises(CheckpointError, match="weights_only=False"):
                fabric.load(tmp_path / "file.pt", weights_only=weights_only)
        state: dict[str, Any] = {"value": None}
        fabric.load(tmp_path / "file.pt", state, weights_only=False)
        assert state["value"] == Path("a")
        model = nn.Linear(1, 1)
        fabric.load_raw(tmp_path / "bare.pt", model, weights_only=False)
        assert model.weight.item() == 1
