"""Rules for checkpoint formats."""

import os
import pickle
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import torch

from fabric_core.conformance.bench import Bench, Place, folder_of_its_own
from fabric_core.conformance.rule import Broken, Table
from fabric_core.errors import CheckpointError

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


def _refused(plugin: Any, path: Path, what: str) -> None:
    try:
        got = plugin.read(path, None)
    except CheckpointError:
        return
    except Exception as error:
        raise Broken(f"{what} raises {error!r}, and no CheckpointError") from error
    raise Broken(f"{what} is read as {got!r}")


@TABLE.rule(
    "CHK-602",
    "Reading what isn't there raises CheckpointError.",
    reason="A wrong path is the most frequent mistake.",
    advice="raise CheckpointError from what the file system raises",
)
def _absent(bench: Bench) -> None:
    with folder_of_its_own() as folder:
        _refused(bench.plugin(), folder / "state", "what isn't there")


@TABLE.rule(
    "CHK-603",
    "Reading a checkpoint that was cut off raises CheckpointError.",
    reason="Half a model must not be trained on.",
    advice="let the format have a length or a checksum, and raise CheckpointError from what reading raises",
)
def _damaged(bench: Bench) -> None:
    with folder_of_its_own() as folder:
        path = folder / "state"
        bench.plugin().write(path, _tree(bench))
        files = [path] if path.is_file() else [one for one in path.rglob("*") if one.is_file()]
        whole = {file: file.read_bytes() for file in files}
        for eighth in range(8):
            for file, data in whole.items():
                file.write_bytes(data[: len(data) * eighth // 8])
            _refused(bench.plugin(), path, f"{eighth} eighths of a checkpoint")
        for file, data in whole.items():
            file.write_bytes(data[:-1])
        _refused(bench.plugin(), path, "a checkpoint without its last byte")


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
    "A write that fails raises CheckpointError, and what was there before is still there, whole.",
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


class _Bomb:
    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


@TABLE.rule(
    "CHK-606",
    "Reading runs no code that lies in the file.",
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
            _refused(plugin, folder / name, f"a file of {name} with code in it")
            if proof.exists():
                raise Broken(f"reading a file of {name} ran the code in it")


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
        beside = sorted(one.name for one in folder.iterdir() if one.name != "state")
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
            tree["model"]["more"] = torch.ones(1)
        if what == "object" and place.rank == 0:
            tree["bad"] = _Unwritable()
        try:
            place.plugin().write_sharded(Path(path), tree, fabric.strategy.collectives)
        except CheckpointError:
            return "refused"
        except Exception as error:  # noqa: BLE001 - whatever it is, it is the wrong one
            return f"raised {error!r}"
        return "wrote it"


@TABLE.rule(
    "CHK-614",
    "Who declares sharded: keys that differ between ranks, what can't be written and a path below a file are a "
    "CheckpointError on every rank, and nothing lies there after it.",
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
