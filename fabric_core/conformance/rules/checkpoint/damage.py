"""Rules for checkpoint formats: what is read of a checkpoint that is no longer whole."""

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch

from fabric_core.conformance.bench import Bench, folder_of_its_own
from fabric_core.conformance.rule import Broken, Table
from fabric_core.conformance.rules.checkpoint.measures import (
    REFUSED,
    SAID,
    about_for,
    answer,
    checked,
    files,
    is_same,
    refused,
    tree_for,
    without_about,
)
from fabric_core.contracts import ABOUT, walk_tensors

TABLE: Final = Table("checkpoint")

_READS: Final = ("read", "outline", "tensors", "read_trusted")


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
        plugin.write(path, tree_for(bench))
        whole = files(path)
        for eighth in range(8):
            for file, data in whole.items():
                file.write_bytes(data[: len(data) * eighth // 8])
            refused(plugin, path, f"{eighth} eighths of a checkpoint", *_READS)
        for file, data in whole.items():
            file.write_bytes(data[:-1])
        refused(plugin, path, "a checkpoint without its last byte", *_READS)
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
                got = answer(plugin, "read", path, seen)
                if got is REFUSED:
                    refused(plugin, path, seen, *_READS)
                    answer(plugin, "describe", path, seen)
                elif not is_same(_by_name(tree_for(bench)), _by_name(got)):
                    raise Broken(f"{seen} is read as {got!r}")


def _by_name(tree: Mapping[str, Any]) -> dict[Any, torch.Tensor]:
    """Give tensors by the last of their keys: what is above them may lie in a file that is gone."""
    return {at[-1]: one for at, one in walk_tensors(tree)}


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
    tree = tree_for(bench)
    tensors = dict(walk_tensors(tree))
    with folder_of_its_own() as folder:
        path = folder / "state"
        plugin.write(path, {**tree, ABOUT: about_for(1.0)})
        for file, data in files(path).items():
            places = random.Random(len(data)).sample(range(len(data)), min(_FLIPPED, len(data)))  # noqa: S311 - no secret
            said = [at for at in (data.find(SAID), data.rfind(SAID)) if at >= 0]
            for number, place in enumerate([*said, *places, len(data)]):
                bit = bytes([data[place] ^ 1 << number % 8]) if place < len(data) else b"x"
                file.write_bytes(data[:place] + bit + data[place + 1 :])
                what = f"a checkpoint with another byte {place} of {file.name}"
                _compare_all(bench, plugin, path, what, tree)
                if number % 4 == 0:
                    got = answer(plugin, "tensors", path, what)
                    if got is not REFUSED and not is_same(tensors, got):
                        raise Broken(f"the tensors of {what} are {got!r}")
            file.write_bytes(data)


def _compare_all(bench: Bench, plugin: Any, path: Path, what: str, tree: Mapping[str, Any]) -> None:
    sound = checked(plugin, path, what) and bench.declared["sharded"]
    got = answer(plugin, "read", path, what)
    if got is REFUSED and sound:
        raise Broken(f"check finds nothing wrong with {what}, and read raises CheckpointError")
    if got is not REFUSED and not is_same(tree, without_about(got)):
        raise Broken(f"{what} is read as {got!r}")
    said = answer(plugin, "describe", path, what)
    if said is not REFUSED and got is not REFUSED and not is_same(about_for(1.0), said.get(ABOUT)):
        raise Broken(f"{what} says {said!r} about itself")
