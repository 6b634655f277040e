"""Rules for checkpoint formats."""

import datetime as dt
import enum
import hashlib
import io
import json
import os
import pickle
import random
import shutil
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Final

import torch
from torch import nn

from fabric_core.conformance.bench import Bench, Place, folder_of_its_own
from fabric_core.conformance.rule import Broken, Table
from fabric_core.contracts import ABOUT, walk_tensors
from fabric_core.errors import CheckpointError, NotInstalledError

TABLE: Final = Table("checkpoint")


def _tree(bench: Bench, factor: float = 1.0) -> dict[str, Any]:
    """Give a state tree: of a model alone for a format that holds nothing else."""
    model = _model(factor)
    return {"model": model, **_plain(factor)} if bench.declared["plain_values"] else {"model": model}


def _model(factor: float) -> dict[str, torch.Tensor]:
    return {
        "weight": factor * torch.arange(6, dtype=torch.float32).reshape(2, 3),
        "half": torch.full((2,), factor, dtype=torch.bfloat16),
        "count": torch.tensor([3, 5]),
        "empty": torch.zeros(0, 2),
        "scalar": torch.tensor(factor),
        "transposed": (factor * torch.arange(6.0)).reshape(2, 3).t(),
        "view": (factor * torch.arange(10.0))[2:8:3],
        "expanded": torch.full((1, 3), factor).expand(2, 3),
        "wild": torch.tensor([float("inf"), -float("inf"), -0.0, 3.4e38, 1e-45, 0.1, 16777217.0]),
        "wide": torch.tensor([0.1, 1e308, 9007199254740993.0], dtype=torch.float64),
        "large": torch.tensor([2**53 + 1, -(2**63)]),
        "complex": torch.tensor([1 + 2j, factor]),
        "flags": torch.tensor([True, False]),
        "bytes": torch.tensor([0, 255], dtype=torch.uint8),
    }


def _plain(factor: float) -> dict[str, Any]:
    return {
        "epoch": 7,
        "rate": 0.1,
        "huge": 2**70,
        "limits": [1e308, 5e-324, -0.0, float("inf")],
        "": "an empty key, and \u00e4\u4e2d\n text",
        "name": "text",
        "done": True,
        "nothing": None,
        "nested": {"list": [1, 2.5, "x"], "tuple": (0.9, ("a", None)), "empty": {}},
        "optimizer": {
            "state": {0: {"step": torch.tensor(3.0)}, 11: {"average": torch.full((2, 3), factor)}},
            "param_groups": [{"betas": (0.9, 0.999), "params": [0, 11]}],
        },
    }


def _bits(tensor: torch.Tensor) -> tuple[Any, ...]:
    whole = tensor.detach().cpu().contiguous().reshape(-1)
    return tuple(tensor.shape), whole.view(torch.uint8).tolist() if whole.numel() else []


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and _bits(one) == _bits(other)
    if isinstance(one, dict):
        return isinstance(other, dict) and set(one) == set(other) and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(_same, one, other))
    return type(one) is type(other) and repr(one) == repr(other)


@TABLE.rule(
    "CHK-601",
    "What is written is read: tensors with their types and shapes, empty ones too, and plain values with theirs; a key "
    "that is a number stays one, and a tuple a tuple.",
    reason="A training that continues must continue with the same numbers; an optimizer's state has numbers for keys.",
    advice="store types and shapes, nested dicts with keys of any type, lists and tuples",
)
def _round_trip(bench: Bench) -> None:
    with folder_of_its_own() as folder:
        bench.plugin().write(folder / "state", _tree(bench))
        got = bench.plugin().read(folder / "state", None)
    if not _same(_tree(bench), got):
        raise Broken(f"{_tree(bench)!r} comes back as {got!r}")


_CALLS: Final[Mapping[str, Callable[[Any, Path], Any]]] = {
    "read": lambda plugin, path: plugin.read(path, None),
    "outline": lambda plugin, path: plugin.outline(path),
    "describe": lambda plugin, path: plugin.describe(path),
    "tensors": lambda plugin, path: dict(plugin.tensors(path)),
    "read_trusted": lambda plugin, path: plugin.read_trusted(path),
}
"""What may be asked of a path."""
_READS: Final = ("read", "outline", "tensors", "read_trusted")

_REFUSED: Final = object()


def _answer(plugin: Any, call: str, path: Path, what: str) -> Any:
    """Ask, and give the answer, or ``_REFUSED``."""
    try:
        return _CALLS[call](plugin, path)
    except CheckpointError:
        return _REFUSED
    except Exception as error:
        raise Broken(f"{call} of {what} raises {error!r}, and no CheckpointError") from error


def _refused(plugin: Any, path: Path, what: str, *calls: str) -> None:
    for call in calls or _CALLS:
        got = _answer(plugin, call, path, what)
        if got is not _REFUSED:
            raise Broken(f"{call} of {what} gives {got!r}")


@TABLE.rule(
    "CHK-602",
    "Whatever is asked of what isn't there raises CheckpointError: `read`, `outline`, `describe`, `tensors`, "
    "`read_trusted` and `remove`; so does `check`, or it raises nothing where sharded isn't declared.",
    reason="A wrong path is the most frequent mistake.",
    advice="raise CheckpointError from what the file system raises, in every method",
)
def _absent(bench: Bench) -> None:
    with folder_of_its_own() as folder:
        _refused(bench.plugin(), folder / "state", "what isn't there")
        if _checked(bench.plugin(), folder / "state", "what isn't there") and bench.declared["sharded"]:
            raise Broken("check finds nothing wrong with what isn't there")
        try:
            bench.plugin().remove(folder / "state")
        except CheckpointError:
            return
        except Exception as error:
            raise Broken(f"remove of what isn't there raises {error!r}, and no CheckpointError") from error
    raise Broken("what isn't there is removed without an error")


def _checked(plugin: Any, path: Path, what: str) -> bool:
    try:
        plugin.check(path, None)
    except CheckpointError:
        return False
    except Exception as error:
        raise Broken(f"check of {what} raises {error!r}, and no CheckpointError") from error
    return True


def _files(path: Path) -> dict[Path, bytes]:
    """Give the files of a checkpoint, and their bytes."""
    return {file: file.read_bytes() for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file()}


@TABLE.rule(
    "CHK-603",
    "Reading a checkpoint that was cut off raises CheckpointError, by `read`, `outline`, `tensors` or `read_trusted`. "
    "One of which a single file is cut off or gone does so too, or gives all tensors as they were written.",
    reason="Half a model must not be trained on.",
    advice="let the format have a length or a checksum, and raise CheckpointError from what reading raises",
)
def _damaged(bench: Bench) -> None:
    plugin = bench.plugin()
    with folder_of_its_own() as folder:
        path = folder / "state"
        plugin.write(path, _tree(bench))
        whole = _files(path)
        for eighth in range(8):
            for file, data in whole.items():
                file.write_bytes(data[: len(data) * eighth // 8])
            _refused(plugin, path, f"{eighth} eighths of a checkpoint", *_READS)
        for file, data in whole.items():
            file.write_bytes(data[:-1])
        _refused(plugin, path, "a checkpoint without its last byte", *_READS)
        for file, data in whole.items():
            for other, all_of_it in whole.items():
                other.write_bytes(all_of_it)
            for what, act in (
                ("half of", lambda file=file, data=data: file.write_bytes(data[: len(data) // 2])),
                ("nothing in", lambda file=file: file.write_bytes(b"")),
                ("no", lambda file=file: file.unlink()),
            ):
                act()
                seen = f"a checkpoint with {what} {file.name}"
                got = _answer(plugin, "read", path, seen)
                if got is _REFUSED:
                    _refused(plugin, path, seen, *_READS)
                    _answer(plugin, "describe", path, seen)
                elif not _same(_by_name(_tree(bench)), _by_name(got)):
                    raise Broken(f"{seen} is read as {got!r}")


def _by_name(tree: Mapping[str, Any]) -> dict[Any, torch.Tensor]:
    """Give tensors by the last of their keys: what is above them may lie in a file that is gone."""
    return {at[-1]: one for at, one in walk_tensors(tree)}


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
        plugin.write(folder / "state", _tree(bench))
        if plugin.recognises(folder / "state") is not True:
            raise Broken("it doesn't know its own")
        taken = [name for name in ("absent", "empty", "folder", "text") if plugin.recognises(folder / name)]
    if taken:
        raise Broken(f"it takes for its own: {', '.join(taken)}")


class _Unwritable:
    def __reduce__(self) -> Any:
        raise RuntimeError("the kit's own: this can't be written")


@TABLE.rule(
    "CHK-605",
    "A write that fails raises CheckpointError, as below a file, and what was there before is still there, whole.",
    reason="A full disk must not cost the last good checkpoint.",
    advice="write aside, and rename at the end",
)
def _fails_whole(bench: Bench) -> None:
    plugin = bench.plugin()
    with folder_of_its_own() as folder:
        path = folder / "state"
        plugin.write(path, _tree(bench))
        try:
            plugin.write(path, {**_tree(bench, 2.0), "bad": _Unwritable()})
        except CheckpointError:
            pass
        except Exception as error:
            raise Broken(f"a failed write raises {error!r}, and no CheckpointError") from error
        else:
            raise Broken("an object that can't be written is written")
        try:
            got = plugin.read(path, None)
        except CheckpointError as error:
            raise Broken(f"after a failed write the old checkpoint can't be read: {error}") from error
        if not _same(_tree(bench), got):
            raise Broken("after a failed write something else is there")
        (folder / "file").write_text("text", encoding="utf-8")
        try:
            plugin.write(folder / "file" / "state", _tree(bench))
        except CheckpointError:
            pass
        except Exception as error:
            raise Broken(f"writing below a file raises {error!r}, and no CheckpointError") from error
        if not (folder / "file").is_file():
            raise Broken("a file went where a folder was to be")


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
            _refused(plugin, folder / name, what, "read", "outline", "tensors")
            _answer(plugin, "describe", folder / name, what)
            if proof.exists():
                raise Broken(f"a file of {name} was looked at, and the code in it ran")


@TABLE.rule(
    "CHK-607",
    "Writing where a checkpoint lies replaces it.",
    reason="`last.pt` is written again and again.",
    advice="rename over the old one",
)
def _replaces(bench: Bench) -> None:
    with folder_of_its_own() as folder:
        for factor in (1.0, 2.0):
            bench.plugin().write(folder / "state", _tree(bench, factor))
        got = bench.plugin().read(folder / "state", None)
    if not _same(_tree(bench, 2.0), got):
        raise Broken("the old values are still there, or a mixture")


@TABLE.rule(
    "CHK-608",
    "Beside the checkpoint nothing is left, after a failure too.",
    reason="Folders of checkpoints are listed, and copied.",
    advice="remove what was written aside in `finally`",
)
def _leaves_nothing(bench: Bench) -> None:
    with folder_of_its_own() as folder:
        bench.plugin().write(folder / "state", _tree(bench))
        with suppress(Exception):  # which one is another rule
            bench.plugin().write(folder / "state", {"bad": _Unwritable()})
        (folder / "taken").mkdir()
        (folder / "taken" / "text").write_text("text", encoding="utf-8")
        with suppress(Exception):
            bench.plugin().write(folder / "taken", _tree(bench))
        beside = sorted({one.name for one in folder.iterdir()} - {"state", "taken"})
    if beside:
        raise Broken(f"there is {', '.join(beside)}")


@TABLE.rule(
    "CHK-611",
    "Writing leaves the tree that is given as it was, and reading again gives objects of its own.",
    reason="A training goes on with the very tensors that it saves.",
    advice="copy what is changed; cache nothing that was read",
)
def _keeps_tree(bench: Bench) -> None:
    plugin = bench.plugin()
    with folder_of_its_own() as folder:
        given = _tree(bench)
        held = list(given["model"].values())
        plugin.write(folder / "state", given)
        if not _same(_tree(bench), given) or any(
            one is not other for one, other in zip(held, given["model"].values(), strict=True)
        ):
            raise Broken("the tree is another after it was written")
        first, second = (plugin.read(folder / "state", None) for _ in range(2))
        first["model"]["weight"].zero_()
        first.get("nested", {}).get("list", []).append(4)
        if not _same(_tree(bench), second):
            raise Broken("what is changed in one reading is changed in the other")


@TABLE.rule(
    "CHK-612",
    "Tensors that are equal and shared no memory share none after reading; tensors that shared it come back equal.",
    reason="Two layers that start alike must not be tied for ever.",
    advice="tell tensors apart by their memory, not by their values",
)
def _ties(bench: Bench) -> None:
    shared = torch.ones(3)
    model = {"one": torch.ones(3), "other": torch.ones(3), "tied": shared, "again": shared}
    with folder_of_its_own() as folder:
        bench.plugin().write(folder / "state", {"model": model})
        got = bench.plugin().read(folder / "state", None)["model"]
    got["one"].zero_()
    if got["other"].sum() != 3 or got["tied"].sum() != 3:
        raise Broken("equal tensors came back as one")
    if not torch.equal(got["tied"], got["again"]):
        raise Broken("one tensor came back as two that differ")


def _write_parts(place: Place, path: str) -> tuple[bool, Any]:
    """Write a tensor of which each rank has a part; say whether the parts come back, and read it whole and alone."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    with place.fabric() as fabric:
        mesh = init_device_mesh(fabric.device.type, (place.world_size,))
        parts = distribute_tensor(_spread().to(fabric.device), mesh, [Shard(0)])
        plugin = place.plugin()
        plugin.write_sharded(Path(path), {"model": {"weight": parts}, "epoch": 7}, fabric.strategy.collectives)
        fabric.barrier()
        room: Any = torch.zeros_like(parts)
        plugin.read(Path(path), {"model": {"weight": room}})
        same = torch.equal(room.to_local(), parts.to_local())
    return same, place.plugin().read(Path(path), None)


def _spread() -> torch.Tensor:
    return torch.arange(12, dtype=torch.float32).reshape(4, 3)


@TABLE.rule(
    "CHK-609",
    "Who declares sharded: what all ranks write in parts is read in parts, and whole by one process.",
    reason="A model that is never whole on any rank is saved and loaded so.",
    advice="let every rank write its own part of a DTensor, and fill those in `into`; or don't declare sharded",
    needs=("sharded",),
    world_sizes=(2,),
)
def _parts(bench: Bench) -> None:
    with folder_of_its_own() as folder:
        for rank, (same, got) in enumerate(bench.run(_write_parts, str(folder / "state"))):
            if not same:
                raise Broken(f"rank {rank} reads another part than it wrote")
            if not _same({"model": {"weight": _spread()}, "epoch": 7}, got):
                raise Broken(f"rank {rank}, alone, reads {got!r}")


def _outlines(outlined: Any, whole: Any) -> bool:
    if isinstance(whole, torch.Tensor):
        return isinstance(outlined, torch.Tensor) and (outlined.shape, outlined.dtype) == (whole.shape, whole.dtype)
    if isinstance(whole, dict):
        return (
            isinstance(outlined, dict)
            and set(outlined) == set(whole)
            and all(_outlines(outlined[key], whole[key]) for key in whole)
        )
    return _same(outlined, whole)


@TABLE.rule(
    "CHK-610",
    "`outline` says what `read` gives: the same tree, its tensors with their types and shapes.",
    reason="Room is made by it before anything is read.",
    advice="leave outline as the contract has it, or describe every entry",
)
def _outline(bench: Bench) -> None:
    with folder_of_its_own() as folder:
        bench.plugin().write(folder / "state", _tree(bench))
        got = bench.plugin().outline(folder / "state")
    if not _outlines(got, _tree(bench)):
        raise Broken(f"it says {got!r}")


@TABLE.rule(
    "CHK-613",
    "`names_beside` lists what lies in the folder now; `remove` deletes its own checkpoint whole, or raises "
    "CheckpointError, and nothing else.",
    reason="`keep=3` deletes what lies beside; a user's file must not go with it.",
    advice="leave names_beside as the contract has it, and let remove ask recognises first",
)
def _lists_and_removes(bench: Bench) -> None:
    plugin = bench.plugin()
    with folder_of_its_own() as folder:
        if plugin.names_beside(folder / "state") != []:
            raise Broken(f"in an empty folder it lists {plugin.names_beside(folder / 'state')!r}")
        for name in ("state", "other"):
            plugin.write(folder / name, {"model": {"weight": torch.ones(2)}})
        (folder / "text").write_text("text\n", encoding="utf-8")
        if sorted(plugin.names_beside(folder / "state")) != ["other", "state", "text"]:
            raise Broken(f"beside other and text it lists {plugin.names_beside(folder / 'state')!r}")
        removed = {}
        for name in ("state", "text"):
            try:
                plugin.remove(folder / name)
            except CheckpointError:
                removed[name] = False
            except Exception as error:
                raise Broken(f"remove raises {error!r}, and no CheckpointError") from error
            else:
                removed[name] = True
        left = sorted(one.name for one in folder.iterdir())
    if removed["text"] or "text" not in left:
        raise Broken("it removes what it doesn't recognise, without an error")
    if left != sorted({"other", "state", "text"} - {name for name, gone in removed.items() if gone}):
        raise Broken(f"after removing {'state' if removed['state'] else 'nothing'} there is {', '.join(left)}")


def _write_unlike(place: Place, path: str, what: str) -> str:
    """Write where it must fail on every rank; give what was raised."""
    with place.fabric() as fabric:
        tree: dict[str, Any] = {"model": {"weight": torch.ones(2)}}
        if what == "keys" and place.rank:
            tree["model"]["odd_tensor"] = torch.ones(1)
        if what == "object" and place.rank == 0:
            tree["bad"] = _Unwritable()
        try:
            place.plugin().write_sharded(Path(path), tree, fabric.strategy.collectives)
        except CheckpointError as error:
            named = what != "keys" or "odd_tensor" in str(error)
            return "refused" if named else f"raised an error that doesn't name the tensor: {error}"
        except Exception as error:  # noqa: BLE001 - whatever it is, it is the wrong one
            return f"raised {error!r}"
        return "wrote it"


@TABLE.rule(
    "CHK-614",
    "Who declares sharded: keys that differ between ranks, which are named, what can't be written and a path below a "
    "file are a CheckpointError on every rank, and nothing lies there after it.",
    reason="A rank that goes on alone waits for the others in the next call.",
    advice="compare keys over the collectives, and let all ranks know whether one failed",
    needs=("sharded",),
    world_sizes=(2,),
)
def _fails_together(bench: Bench) -> None:
    with folder_of_its_own() as folder:
        (folder / "file").write_text("text\n", encoding="utf-8")
        for what, path in (("keys", "state"), ("object", "state"), ("path", "file/state")):
            for rank, outcome in enumerate(bench.run(_write_unlike, str(folder / path), what)):
                if outcome != "refused":
                    raise Broken(f"{_UNLIKE[what]}, and rank {rank} {outcome}")
        left = sorted(one.name for one in folder.iterdir())
    if left != ["file"]:
        raise Broken(f"beside the file there is {', '.join(one for one in left if one != 'file')}")


_UNLIKE: Final = {
    "keys": "rank 1 has a tensor more",
    "object": "rank 0 has an object that can't be written",
    "path": "the path is below a file",
}


_SAID: Final = b"the kit's own"
"""What a checkpoint says about itself."""
_FLIPPED: Final = 32
"""In how many places of each file a bit is turned round."""


@TABLE.rule(
    "CHK-615",
    "A checkpoint of which a bit has changed, or a byte was added, is read as what was written, or raises "
    "CheckpointError; so are its tensors one by one. Where it is read, it says of itself what was written, or raises "
    "CheckpointError. Who declares sharded: where `check` raises nothing, neither does `read`.",
    reason="Disks and networks change bits; a weight that is another by a power of two ruins a model without an error.",
    advice="keep a checksum of everything, compare it whenever something is read, and let check do all that read does",
)
def _changed(bench: Bench) -> None:
    plugin = bench.plugin()
    tree = _tree(bench)
    tensors = dict(walk_tensors(tree))
    with folder_of_its_own() as folder:
        path = folder / "state"
        plugin.write(path, {**tree, ABOUT: _about(1.0)})
        for file, data in _files(path).items():
            places = random.Random(len(data)).sample(range(len(data)), min(_FLIPPED, len(data)))  # noqa: S311 - no secret
            said = [at for at in (data.find(_SAID), data.rfind(_SAID)) if at >= 0]
            for number, place in enumerate([*said, *places, len(data)]):
                bit = bytes([data[place] ^ 1 << number % 8]) if place < len(data) else b"x"
                file.write_bytes(data[:place] + bit + data[place + 1 :])
                what = f"a checkpoint with another byte {place} of {file.name}"
                _compare_all(bench, plugin, path, what, tree)
                if number % 4 == 0:
                    got = _answer(plugin, "tensors", path, what)
                    if got is not _REFUSED and not _same(tensors, got):
                        raise Broken(f"the tensors of {what} are {got!r}")
            file.write_bytes(data)


def _compare_all(bench: Bench, plugin: Any, path: Path, what: str, tree: Mapping[str, Any]) -> None:
    sound = _checked(plugin, path, what) and bench.declared["sharded"]
    got = _answer(plugin, "read", path, what)
    if got is _REFUSED and sound:
        raise Broken(f"check finds nothing wrong with {what}, and read raises CheckpointError")
    if got is not _REFUSED and not _same(tree, _without_about(got)):
        raise Broken(f"{what} is read as {got!r}")
    said = _answer(plugin, "describe", path, what)
    if said is not _REFUSED and got is not _REFUSED and not _same(_about(1.0), said.get(ABOUT)):
        raise Broken(f"{what} says {said!r} about itself")


def _about(factor: float) -> dict[str, Any]:
    return {"step": factor, "plan": {"strategy": _SAID.decode(), "devices": [0, 1]}, "more": [None, True, "text"]}


class _Colour(enum.Enum):
    RED = 1


class _OwnTensor(torch.Tensor):
    pass


class _Count(int):
    pass


def _odd() -> dict[str, Any]:
    """Give values that a format may keep or refuse."""
    return {
        "a path": PurePosixPath("a/b"),
        "a date": dt.date(2024, 2, 29),
        "a set": {1, 2},
        "bytes": b"\x00\xff",
        "a complex number": 1 + 2j,
        "a range": range(3),
        "a slice": slice(1, 2),
        "an OrderedDict": OrderedDict(b=1, a=2),
        "a member of an enumeration": _Colour.RED,
        "a class": _Colour,
        "a function": _odd,
        "an object": object(),
        "a number of a class of its own": _Count(3),
        "a tensor of a class of its own": torch.ones(2).as_subclass(_OwnTensor),
        "a sparse tensor": torch.eye(2).to_sparse(),
        "a parameter": nn.Parameter(torch.ones(2)),
        "a torch.dtype": torch.float16,
        "a torch.Size": torch.Size([2, 3]),
        "a module": nn.Linear(1, 1),
        "an iterator": iter([1, 2]),
    }


def _alike(value: Any, got: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return isinstance(got, torch.Tensor) and torch.equal(value.detach().to_dense(), got.detach().to_dense())
    return bool(got == value)


@TABLE.rule(
    "CHK-616",
    "What `write` takes, `read` gives: a value of any other class comes back equal, or `write` raises CheckpointError, "
    "with the name of the entry, leaves the value as it was, and writes nothing.",
    reason="A checkpoint that can't be read is found when it is too late; of hundreds of entries one must be found.",
    advice="read in memory, entry by entry, what will need code to be read, before anything is written",
)
def _takes_what_it_gives(bench: Bench) -> None:
    plugin = bench.plugin()
    with folder_of_its_own() as folder:
        for number, (what, value) in enumerate(_odd().items()):
            path = folder / what.replace(" ", "-")
            model: dict[str, Any] = {"weight": torch.ones(64)}  # longer than what is shown of a value
            plain = bench.declared["plain_values"]
            try:
                if plain:
                    plugin.write(path, {"model": model, "odd_entry": {"value": value} if number % 2 else [value]})
                else:
                    plugin.write(path, {"model": {**model, "odd_entry": value}})
            except CheckpointError as error:
                if "odd_entry" not in str(error):
                    raise Broken(f"{what} is refused, and the error doesn't say which entry: {error}") from error
                if os.path.lexists(path):
                    raise Broken(f"{what} is refused, and something is written") from error
                if what == "an iterator" and list(value) != [1, 2]:
                    raise Broken(f"{what} is refused, and used up") from error
                continue
            except Exception as error:
                raise Broken(f"{what} raises {error!r}, and no CheckpointError") from error
            got = _answer(plugin, "read", path, what)
            if got is _REFUSED:
                raise Broken(f"{what} is written, and can't be read")
            got = got["odd_entry"]["value" if number % 2 else 0] if plain else got["model"]["odd_entry"]
            if not _alike(value, got):
                raise Broken(f"{what}, {value!r}, comes back as {got!r}")


@TABLE.rule(
    "CHK-617",
    "Answers are about what lies there now, also from a plugin that was asked before: `outline` and `read_trusted` "
    "give what `read` does, `tensors` the tensors by their key paths, `describe` the entry `ABOUT` that was written, "
    "and none where none was.",
    reason="Tools show and convert checkpoints so, and the best and the newest of many are found by what each says.",
    advice="leave these methods as the contract has them, or let them tell the same as read; keep no answer for later",
)
def _agrees(bench: Bench) -> None:
    plugin = bench.plugin()
    with folder_of_its_own() as folder:
        path = folder / "state"
        if plugin.recognises(path) is not False:
            raise Broken("it recognises what isn't there")
        for factor in (1.0, 2.0):
            tree, about = _tree(bench, factor), _about(factor)
            tree["model"]["later"] = torch.ones(int(factor))
            plugin.write(path, {**tree, ABOUT: about} if factor < 2 else {ABOUT: about, **tree})
            if plugin.recognises(path) is not True:
                raise Broken("it doesn't recognise what it wrote where nothing was")
            said = plugin.describe(path).get(ABOUT)
            if not _same(about, said):
                raise Broken(f"of {about!r} describe gives {said!r}")
            for call in ("read", "read_trusted", "outline"):
                got = _without_about(_CALLS[call](plugin, path))
                if not (_outlines(got, tree) if call == "outline" else _same(tree, got)):
                    raise Broken(f"{call} gives {got!r}")
            if not _same(dict(walk_tensors(tree)), dict(plugin.tensors(path))):
                raise Broken(f"tensors gives {dict(plugin.tensors(path))!r}")
        plugin.write(path, tree)
        said = plugin.describe(path).get(ABOUT)
        if said:
            raise Broken(f"without the entry {ABOUT!r} describe gives {said!r}")
        _goes_away(plugin, path, tree)


def _goes_away(plugin: Any, path: Path, tree: Mapping[str, Any]) -> None:
    """Let a checkpoint vanish while its tensors are read one after another."""
    remaining = plugin.tensors(path)
    found = dict([next(remaining)])
    for file in _files(path):
        file.unlink()
    try:
        found.update(remaining)
    except CheckpointError:
        return
    except Exception as error:
        raise Broken(f"tensors of what goes away raises {error!r}, and no CheckpointError") from error
    if not _same(dict(walk_tensors(tree)), found):
        raise Broken(f"tensors of what goes away gives {found!r}")


@TABLE.rule(
    "CHK-618",
    "Who declares sharded: `read` fills the tensors of `into` in place, parameters and views too, and nothing beside "
    "them; leaves those on the meta device; and gives whole what `into` lacks. `check` fills nothing.",
    reason="A model is loaded where it lies, without room for a second one.",
    advice="copy into each tensor of into, detached, and read what it lacks",
    needs=("sharded",),
)
def _into(bench: Bench) -> None:
    plugin = bench.plugin()
    model = {"view": _spread(), "bias": torch.arange(3.0), "skipped": torch.ones(2), "more": torch.tensor([1.5, 2.5])}
    tree = {"model": model, "epoch": 7, "optimizer": {0: {"step": torch.tensor(3.0)}}}
    room, bias = torch.full((4, 6), -1.0), nn.Parameter(torch.zeros(3))
    own = {"view": room[:, ::2], "bias": bias, "skipped": torch.empty(2, device="meta"), "more": None}
    into: dict[str, Any] = {"model": own, "epoch": 1, "strange": torch.zeros(1)}
    with folder_of_its_own() as folder:
        plugin.write(folder / "state", tree)
        plugin.check(folder / "state", into)
        if bias.any() or not room.eq(-1).all():
            raise Broken("check fills the tensors")
        got = plugin.read(folder / "state", into)
        whole = plugin.read(folder / "state", {})
    if not _same(model["view"], room[:, ::2]) or not _same(model["bias"], bias.detach()):
        raise Broken(f"the tensors of into are {own!r}")
    if not room[:, 1::2].eq(-1).all():
        raise Broken("what lies between the places of a view is written over")
    if not got["model"]["skipped"].is_meta:
        raise Broken(f"what is on the meta device comes back as {got['model']['skipped']!r}")
    got["model"] = {**got["model"], "skipped": model["skipped"]}
    for read, what in ((got, "with the tensors of a model"), (whole, "with nothing")):
        if not _same(tree, read):
            raise Broken(f"read {what} in into gives {read!r}")


def _write_own(place: Place, path: str) -> None:
    """Write what is another on every rank."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    with place.fabric() as fabric:
        mesh = init_device_mesh(fabric.device.type, (place.world_size,))
        model = {f"tensor {size}": torch.full((size,), float(place.rank)) for size in (1, 5, 2, 9)}
        tree: dict[str, Any] = {
            "model": {**model, "parts": distribute_tensor(_spread().to(fabric.device), mesh, [Shard(0)])},
            "epoch": place.rank,
            "nested": {"list": [place.rank, torch.tensor(place.rank)]},
            ABOUT: {"rank": place.rank},
        }
        if place.rank:
            tree = dict(reversed(tree.items()))
            tree["model"] = dict(reversed(tree["model"].items()))
        place.plugin().write_sharded(Path(path), tree, fabric.strategy.collectives)
        fabric.barrier()


@TABLE.rule(
    "CHK-619",
    "Who declares sharded: whatever is no DTensor is written as rank 0 has it, tensors and plain values alike, in "
    "whichever order the ranks have their keys.",
    reason="Ranks differ where nothing synchronizes them, as in running averages; a mixture is of no rank.",
    advice="let rank 0 write all that isn't spread over the ranks",
    needs=("sharded",),
    world_sizes=(2,),
)
def _of_rank_zero(bench: Bench) -> None:
    with folder_of_its_own() as folder:
        bench.run(_write_own, str(folder / "state"))
        got, said = bench.run(_read_again, str(folder / "state"))[0]
    model = {f"tensor {size}": torch.zeros(size) for size in (1, 5, 2, 9)}
    wanted = {"model": {**model, "parts": _spread()}, "epoch": 0, "nested": {"list": [0, torch.tensor(0)]}}
    if not _same(wanted, _without_about(got)):
        raise Broken(f"what each rank has of its own is read as {got!r}")
    if said != {"rank": 0}:
        raise Broken(f"of what each rank says of its own, describe gives {said!r}")


def _read_again(place: Place, path: str) -> tuple[Any, Any]:
    plugin = place.plugin()
    return plugin.read(Path(path), None), plugin.describe(Path(path)).get(ABOUT)


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
            for call in _CALLS:
                got = _answer(plugin, call, path, what)
                if got is not _REFUSED and not isinstance(got, dict):
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
        got = _answer(plugin, call, path, what)
        if got is _REFUSED or not _outlines(got, tree):
            raise Broken(f"{call} of {what} {'raises CheckpointError' if got is _REFUSED else f'gives {got!r}'}")
    said = _answer(plugin, "describe", path, what)
    if said is not _REFUSED and said.get(ABOUT):
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
    "CHK-621",
    "Who declares remote: at a URL (`file://`, where it knows that) everything goes as at a path: what is written, "
    "read, listed, refused, replaced and removed, and what lies there after it; copied from there to a path too.",
    reason="A training is moved to a machine whose disk is a bucket, and nothing else in the script changes.",
    advice="put one layer, such as fsspec, under every method; raise NotInstalledError for schemes it doesn't know",
    needs=("remote",),
)
def _remote(bench: Bench) -> None:
    found = []
    for remote in (False, True):
        with folder_of_its_own() as folder:
            try:
                found.append(dict(_tour(bench, folder, remote=remote)))
            except NotInstalledError:
                return
    for what, at_path in found[0].items():
        if found[1].get(what) != at_path:
            raise Broken(f"{what}: {at_path} at a path, and {found[1].get(what)} at a URL")


def _tour(bench: Bench, folder: Path, *, remote: bool) -> Iterator[tuple[str, str]]:
    """Use a folder in every way, and say what came of it."""
    plugin = bench.plugin()
    tree = _tree(bench)
    state: Any = f"file://{folder}/state" if remote else folder / "state"
    text: Any = f"file://{folder}/text" if remote else folder / "text"

    def answers(when: str) -> Iterator[tuple[str, str]]:
        yield f"recognises {when}", _outcome(lambda: plugin.recognises(state), True)
        for call in ("read", "read_trusted"):
            yield f"{call} {when}", _outcome(partial(_without_about_of, call, plugin, state), tree)
        yield f"tensors {when}", _outcome(lambda: dict(plugin.tensors(state)), dict(walk_tensors(tree)))
        yield f"outline {when}", _outcome(lambda: _outlines(_without_about(plugin.outline(state)), tree), True)
        yield f"check {when}", _outcome(lambda: plugin.check(state, None), None)
        yield f"describe {when}", _outcome(lambda: plugin.describe(state).get(ABOUT), _about(1.0))
        yield (
            f"names_beside {when}",
            _outcome(lambda: plugin.names_beside(state), sorted(one.name for one in folder.iterdir())),
        )

    yield from answers("where nothing is")
    for factor in (2.0, 1.0):
        plugin.write(state, {**_tree(bench, factor), ABOUT: _about(factor)})
    yield from answers("what was written twice")
    bad = {**tree, "bad": _Unwritable()}
    yield "writing what can't be", _outcome(lambda: plugin.write(state, bad), None)
    yield from answers("after a failed write")
    (folder / "text").write_text("text", encoding="utf-8")
    yield "removing another file", _outcome(lambda: plugin.remove(text), None)
    yield "replacing another file", _outcome(lambda: plugin.write(text, tree), None)
    yield "what lies there", str(sorted((one.name, one.is_dir()) for one in folder.iterdir()))
    kept = (folder / "text").is_file() and (folder / "text").read_bytes() == b"text"
    yield "the other file", "as it was" if kept else "another"
    whole = _files(folder / "state")
    for file, data in whole.items():
        file.write_bytes(data[: len(data) // 2])
    yield from [one for one in answers("after it was cut off") if not one[0].startswith("recognises")]
    for file, data in whole.items():
        file.write_bytes(data)
    copied = folder / "copied"
    (shutil.copytree if (folder / "state").is_dir() else shutil.copy)(folder / "state", copied)
    yield "reading a copy", _outcome(partial(_without_about_of, "read", plugin, copied), tree)
    yield "replacing a copy", _outcome(lambda: plugin.write(copied, tree), None)
    yield "what is left of a copy", str(sorted(str(one.relative_to(copied)) for one in copied.rglob("*")))
    yield "removing", _outcome(lambda: plugin.remove(state), None)
    yield "what is left", str(sorted(one.name for one in folder.iterdir()))


def _without_about_of(call: str, plugin: Any, place: Any) -> dict[str, Any]:
    return _without_about(_CALLS[call](plugin, place))


def _without_about(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {name: one for name, one in tree.items() if name != ABOUT}


def _outcome(act: Callable[[], Any], wanted: Any) -> str:
    try:
        got = act()
    except CheckpointError:
        return "CheckpointError"
    except NotInstalledError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever it is, it is compared
        return type(error).__name__
    return "as it should be" if _same(wanted, got) else f"something else, {got!r:.80}"


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
        plugin.write(path, _tree(bench))
        torch.save({"bomb": _Bomb(proof)}, code)
        torch.save([1], some)
        whole = _files(path)
        for file, data in whole.items() if path.is_dir() else ():
            for what, new in (("code", code.getvalue()), ("a list", some.getvalue())):
                _write_forged(whole, _told_of(data, new))
                file.write_bytes(new)
                for call in ("read", "outline", "tensors"):
                    got = _answer(plugin, call, path, f"a forged checkpoint with {what} in {file.name}")
                    if proof.exists():
                        raise Broken(f"{call} runs the code in a forged {file.name}")
                    if got is not _REFUSED and not isinstance(got, dict):
                        raise Broken(f"{call} of a forged checkpoint with {what} in {file.name} gives {got!r}")
            (folder / file.name).write_bytes(data)
            for names in ({}, {file.name: f"../{file.name}"}):
                _write_forged(whole, names)
                file.unlink()
                got = _answer(plugin, "read", path, f"a forged checkpoint that names ../{file.name}")
                if not names and got is not _REFUSED:
                    break  # it is of no use, wherever it lies
                if got is not _REFUSED:
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
