"""Rules for checkpoint formats: what they say of a path."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch

from fabric_core.conformance.bench import Bench, folder_of_its_own
from fabric_core.conformance.rule import Broken, Table
from fabric_core.conformance.rules.checkpoint.measures import (
    CALLS,
    about_for,
    checked,
    files,
    is_same,
    outlines,
    refused,
    tree_for,
    without_about,
)
from fabric_core.contracts import ABOUT, walk_tensors
from fabric_core.errors import CheckpointError

TABLE: Final = Table("checkpoint")


@TABLE.rule(
    "CHK-602",
    "Whatever is asked of what isn't there raises CheckpointError: `read`, `outline`, `describe`, `tensors`, "
    "`read_trusted` and `remove`; so does `check`, or it raises nothing where sharded isn't declared.",
    reason="A wrong path is the most frequent mistake.",
    advice="raise CheckpointError from what the file system raises, in every method",
)
def _absent(bench: Bench) -> None:
    with folder_of_its_own() as folder:
        refused(bench.plugin(), folder / "state", "what isn't there")
        if checked(bench.plugin(), folder / "state", "what isn't there") and bench.declared["sharded"]:
            raise Broken("check finds nothing wrong with what isn't there")
        try:
            bench.plugin().remove(folder / "state")
        except CheckpointError:
            return
        except Exception as error:
            raise Broken(f"remove of what isn't there raises {error!r}, and no CheckpointError") from error
    raise Broken("what isn't there is removed without an error")


@TABLE.rule(
    "CHK-610",
    "`outline` says what `read` gives: the same tree, its tensors with their types and shapes.",
    reason="Room is made by it before anything is read.",
    advice="leave outline as the contract has it, or describe every entry",
)
def _outline(bench: Bench) -> None:
    with folder_of_its_own() as folder:
        bench.plugin().write(folder / "state", tree_for(bench))
        got = bench.plugin().outline(folder / "state")
    if not outlines(got, tree_for(bench)):
        raise Broken(f"it says {got!r}")


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
            tree, about = tree_for(bench, factor), about_for(factor)
            tree["model"]["later"] = torch.ones(int(factor))
            plugin.write(path, {**tree, ABOUT: about} if factor < 2 else {ABOUT: about, **tree})
            if plugin.recognises(path) is not True:
                raise Broken("it doesn't recognise what it wrote where nothing was")
            said = plugin.describe(path).get(ABOUT)
            if not is_same(about, said):
                raise Broken(f"of {about!r} describe gives {said!r}")
            for call in ("read", "read_trusted", "outline"):
                got = without_about(CALLS[call](plugin, path))
                if not (outlines(got, tree) if call == "outline" else is_same(tree, got)):
                    raise Broken(f"{call} gives {got!r}")
            if not is_same(dict(walk_tensors(tree)), dict(plugin.tensors(path))):
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
    for file in files(path):
        file.unlink()
    try:
        found.update(remaining)
    except CheckpointError:
        return
    except Exception as error:
        raise Broken(f"tensors of what goes away raises {error!r}, and no CheckpointError") from error
    if not is_same(dict(walk_tensors(tree)), found):
        raise Broken(f"tensors of what goes away gives {found!r}")
