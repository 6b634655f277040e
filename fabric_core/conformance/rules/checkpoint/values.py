"""Rules for checkpoint formats: what comes back of what is written."""

import datetime as dt
import enum
import os
from collections import OrderedDict
from pathlib import PurePosixPath
from typing import Any, Final

import torch
from torch import nn

from fabric_core.conformance.bench import Bench, folder_of_its_own
from fabric_core.conformance.rule import Broken, Table
from fabric_core.conformance.rules.checkpoint.measures import REFUSED, answer, is_same, tree_for
from fabric_core.errors import CheckpointError

TABLE: Final = Table("checkpoint")


@TABLE.rule(
    "CHK-601",
    "What is written is read: tensors with their types and shapes, empty ones too, and plain values with theirs; a key "
    "that is a number stays one, and a tuple a tuple.",
    reason="A training that continues must continue with the same numbers; an optimizer's state has numbers for keys.",
    advice="store types and shapes, nested dicts with keys of any type, lists and tuples",
)
def _round_trip(bench: Bench) -> None:
    with folder_of_its_own() as folder:
        bench.plugin().write(folder / "state", tree_for(bench))
        got = bench.plugin().read(folder / "state", None)
    if not is_same(tree_for(bench), got):
        raise Broken(f"{tree_for(bench)!r} comes back as {got!r}")


@TABLE.rule(
    "CHK-611",
    "Writing leaves the tree that is given as it was, and reading again gives objects of its own.",
    reason="A training goes on with the very tensors that it saves.",
    advice="copy what is changed; cache nothing that was read",
)
def _keeps_tree(bench: Bench) -> None:
    plugin = bench.plugin()
    with folder_of_its_own() as folder:
        given = tree_for(bench)
        held = list(given["model"].values())
        plugin.write(folder / "state", given)
        if not is_same(tree_for(bench), given) or any(
            one is not other for one, other in zip(held, given["model"].values(), strict=True)
        ):
            raise Broken("the tree is another after it was written")
        first, second = (plugin.read(folder / "state", None) for _ in range(2))
        first["model"]["weight"].zero_()
        first.get("nested", {}).get("list", []).append(4)
        if not is_same(tree_for(bench), second):
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
            got = answer(plugin, "read", path, what)
            if got is REFUSED:
                raise Broken(f"{what} is written, and can't be read")
            got = got["odd_entry"]["value" if number % 2 else 0] if plain else got["model"]["odd_entry"]
            if not _alike(value, got):
                raise Broken(f"{what}, {value!r}, comes back as {got!r}")
