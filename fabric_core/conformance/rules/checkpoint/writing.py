"""Rules for checkpoint formats: what lies in a folder after writing, done or failed, and removing."""

from contextlib import suppress
from typing import Final

import torch

from fabric_core.conformance.bench import Bench, folder_of_its_own
from fabric_core.conformance.rule import Broken, Table
from fabric_core.conformance.rules.checkpoint.measures import Unwritable, is_same, tree_for
from fabric_core.errors import CheckpointError

TABLE: Final = Table("checkpoint")


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
        plugin.write(path, tree_for(bench))
        try:
            plugin.write(path, {**tree_for(bench, 2.0), "bad": Unwritable()})
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
        if not is_same(tree_for(bench), got):
            raise Broken("after a failed write something else is there")
        (folder / "file").write_text("text", encoding="utf-8")
        try:
            plugin.write(folder / "file" / "state", tree_for(bench))
        except CheckpointError:
            pass
        except Exception as error:
            raise Broken(f"writing below a file raises {error!r}, and no CheckpointError") from error
        if not (folder / "file").is_file():
            raise Broken("a file went where a folder was to be")


@TABLE.rule(
    "CHK-607",
    "Writing where a checkpoint lies replaces it.",
    reason="`last.pt` is written again and again.",
    advice="rename over the old one",
)
def _replaces(bench: Bench) -> None:
    with folder_of_its_own() as folder:
        for factor in (1.0, 2.0):
            bench.plugin().write(folder / "state", tree_for(bench, factor))
        got = bench.plugin().read(folder / "state", None)
    if not is_same(tree_for(bench, 2.0), got):
        raise Broken("the old values are still there, or a mixture")


@TABLE.rule(
    "CHK-608",
    "Beside the checkpoint nothing is left, after a failure too.",
    reason="Folders of checkpoints are listed, and copied.",
    advice="remove what was written aside in `finally`",
)
def _leaves_nothing(bench: Bench) -> None:
    with folder_of_its_own() as folder:
        bench.plugin().write(folder / "state", tree_for(bench))
        with suppress(Exception):  # which one is another rule
            bench.plugin().write(folder / "state", {"bad": Unwritable()})
        (folder / "taken").mkdir()
        (folder / "taken" / "text").write_text("text", encoding="utf-8")
        with suppress(Exception):
            bench.plugin().write(folder / "taken", tree_for(bench))
        beside = sorted({one.name for one in folder.iterdir()} - {"state", "taken"})
    if beside:
        raise Broken(f"there is {', '.join(beside)}")


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
