"""Rules for checkpoint formats: what they make of files that others wrote, or forged."""

import hashlib
import io
import json
import os
import pickle
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any, Final

import torch

from fabric_core.conformance.bench import Bench, folder_of_its_own
from fabric_core.conformance.rule import Broken, Table
from fabric_core.conformance.rules.checkpoint.measures import CALLS, REFUSED, answer, files, outlines, refused, tree_for
from fabric_core.contracts import ABOUT
from fabric_core.errors import CheckpointError

TABLE: Final = Table("checkpoint")


@TABLE.rule(
    "CHK-604",
    "`recognises` knows its own checkpoints, and no others: nothing, an empty file, an empty folder, text.",
    reason="The format of a checkpoint is found by asking every format.",
    advice="look for what only your format has, such as its first bytes",
)
def _recognises(bench: Bench) -> None:
    plugin = bench.plugin()
    with folder_of_its_own() as folder:
        (folder / "empty").touch()
        (folder / "folder").mkdir()
        (folder / "text").write_text("text\n", encoding="utf-8")
        plugin.write(folder / "state", tree_for(bench))
        if plugin.recognises(folder / "state") is not True:
            raise Broken("it doesn't know its own")
        taken = [name for name in ("absent", "empty", "folder", "text") if plugin.recognises(folder / name)]
    if taken:
        raise Broken(f"it takes for its own: {', '.join(taken)}")


class _Bomb:
    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


@TABLE.rule(
    "CHK-606",
    "No code that lies in a file is run by `recognises`, `check`, `read`, `outline`, `tensors` or `describe`.",
    reason="Checkpoints are downloaded.",
    advice="use torch.load(weights_only=True), or a format without code",
)
def _runs_nothing(bench: Bench) -> None:
    plugin = bench.plugin()
    with folder_of_its_own() as folder:
        proof = folder / "proof"
        for name, write in (
            ("torch", lambda path: torch.save({"bomb": _Bomb(proof)}, path)),
            ("pickle", lambda path: path.write_bytes(pickle.dumps({"bomb": _Bomb(proof)}))),
        ):
            write(folder / name)
            what = f"a file of {name} with code in it"
            plugin.recognises(folder / name)
            with suppress(CheckpointError):
                plugin.check(folder / name, None)
            refused(plugin, folder / name, what, "read", "outline", "tensors")
            answer(plugin, "describe", folder / name, what)
            if proof.exists():
                raise Broken(f"a file of {name} was looked at, and the code in it ran")


@TABLE.rule(
    "CHK-620",
    "What is no state tree, of whichever file, is read as none: `read` and `outline` give a mapping or raise "
    "CheckpointError, and `recognises` says so without an error. Of a file of torch.save that it recognises, "
    "`read_trusted` gives the pickled objects too, and `describe` no entry `ABOUT`.",
    reason="Users load files of others, and of other programs.",
    advice="look at what was read before giving it; read_trusted is torch.load(weights_only=False) for such files",
)
def _of_others(bench: Bench) -> None:
    plugin = bench.plugin()
    with folder_of_its_own() as folder:
        for path in _strangers(folder):
            what = f"a file of others ({path.name})"
            _recognised(plugin, path, what)
            for call in CALLS:
                got = answer(plugin, call, path, what)
                if got is not REFUSED and not isinstance(got, dict):
                    raise Broken(f"{call} of {what} gives {got!r}")
        tree = {"model": {"weight": torch.ones(2)}, "where": PurePosixPath("a/b")}
        _saved_by_torch(plugin, folder / "objects", tree, "read_trusted")
        del tree["where"]
        _saved_by_torch(plugin, folder / "plain", tree, "read", "read_trusted", "outline")


def _recognised(plugin: Any, path: Path, what: str) -> bool:
    try:
        found: bool = plugin.recognises(path)
    except Exception as error:
        raise Broken(f"recognises of {what} raises {error!r}") from error
    return found


def _saved_by_torch(plugin: Any, path: Path, tree: Mapping[str, Any], *calls: str) -> None:
    """Ask what a file of torch.save holds, where the format takes it for its own."""
    torch.save(tree, path)
    what = f"a file of torch.save with {tree!r}"
    if not _recognised(plugin, path, what):
        return
    for call in calls:
        got = answer(plugin, call, path, what)
        if got is REFUSED or not outlines(got, tree):
            raise Broken(f"{call} of {what} {'raises CheckpointError' if got is REFUSED else f'gives {got!r}'}")
    said = answer(plugin, "describe", path, what)
    if said is not REFUSED and said.get(ABOUT):
        raise Broken(f"describe of {what} gives {said!r}")


def _strangers(folder: Path) -> Iterator[Path]:
    """Write files that hold no state tree, one after another."""
    for name, value in (("list", [torch.ones(2)]), ("tensor", torch.ones(2)), ("number", 3), ("nothing", None)):
        torch.save(value, folder / f"torch-{name}")
        yield folder / f"torch-{name}"
    (folder / "pickle").write_bytes(pickle.dumps([1]))
    yield folder / "pickle"
    (folder / "json").write_text(json.dumps({"model": [1]}), encoding="utf-8")
    yield folder / "json"
    with zipfile.ZipFile(folder / "zip", "w") as archive:
        archive.writestr("text", "text")
    yield folder / "zip"
    (folder / "folder").mkdir()
    (folder / "folder" / "text").write_text("text", encoding="utf-8")
    yield folder / "folder"


@TABLE.rule(
    "CHK-622",
    "A checkpoint that somebody forged, its JSON and checksums made anew, leads to no file outside of it, runs no "
    "code, and is read as a mapping, or raises CheckpointError.",
    reason="Checkpoints are downloaded, and whoever makes one knows how its checksums are made.",
    advice="take names without folders alone, torch.load(weights_only=True) for every file, and look at what it gave",
)
def _forged(bench: Bench) -> None:
    plugin = bench.plugin()
    with folder_of_its_own() as folder:
        path, proof, code, some = folder / "state", folder / "proof", io.BytesIO(), io.BytesIO()
        plugin.write(path, tree_for(bench))
        torch.save({"bomb": _Bomb(proof)}, code)
        torch.save([1], some)
        whole = files(path)
        for file, data in whole.items() if path.is_dir() else ():
            for what, new in (("code", code.getvalue()), ("a list", some.getvalue())):
                _write_forged(whole, _told_of(data, new))
                file.write_bytes(new)
                for call in ("read", "outline", "tensors"):
                    got = answer(plugin, call, path, f"a forged checkpoint with {what} in {file.name}")
                    if proof.exists():
                        raise Broken(f"{call} runs the code in a forged {file.name}")
                    if got is not REFUSED and not isinstance(got, dict):
                        raise Broken(f"{call} of a forged checkpoint with {what} in {file.name} gives {got!r}")
            (folder / file.name).write_bytes(data)
            for names in ({}, {file.name: f"../{file.name}"}):
                _write_forged(whole, names)
                file.unlink()
                got = answer(plugin, "read", path, f"a forged checkpoint that names ../{file.name}")
                if not names and got is not REFUSED:
                    break  # it is of no use, wherever it lies
                if got is not REFUSED:
                    raise Broken(f"read follows the name ../{file.name} out of the checkpoint")


def _digests(data: bytes) -> dict[Any, Any]:
    """Give what files say of others: checksums and lengths, each under its name."""
    made = {name: hashlib.new(name, data).hexdigest() for name in ("md5", "sha1", "sha256")}  # as others do
    return {"crc32": zlib.crc32(data), "hex": f"{zlib.crc32(data):08x}", "length": len(data), **made}


def _told_of(old: bytes, new: bytes) -> dict[Any, Any]:
    """Give what is said of the old bytes, and what would be said of the new ones."""
    said = _digests(new)
    return {value: said[name] for name, value in _digests(old).items()}


def _write_forged(whole: Mapping[Path, bytes], replaced: Mapping[Any, Any]) -> None:
    """Write the files of a checkpoint, and in those of JSON other names, lengths and checksums, their own too."""
    for file, data in whole.items():
        file.write_bytes(data)
        with suppress(ValueError):
            file.write_text(json.dumps(_forge(json.loads(data), replaced)), encoding="utf-8")


def _forge(value: Any, replaced: Mapping[Any, Any]) -> Any:
    if isinstance(value, list):
        return [_forge(one, replaced) for one in value]
    if not isinstance(value, dict):
        return replaced.get(value, value) if type(value) in {str, int} else value
    made = {replaced.get(name, name): _forge(one, replaced) for name, one in value.items()}
    parts = [name for name, one in value.items() if isinstance(one, dict | list) and name not in replaced]
    sums: dict[Any, Any] = {}
    for name in parts:
        for form in _FORMS:
            sums.update(_told_of(form(value[name]), form(made[name])))
    return {name: sums.get(one, one) if type(one) in {str, int} else one for name, one in made.items()}


_FORMS: Final[tuple[Callable[[Any], bytes], ...]] = (
    lambda value: json.dumps(value).encode(),
    lambda value: json.dumps(value, sort_keys=True).encode(),
    lambda value: json.dumps(value, sort_keys=True, separators=(",", ":")).encode(),
)
"""How a part of JSON may be written for its checksum."""
