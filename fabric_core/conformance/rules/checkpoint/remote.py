"""Rules for checkpoint formats: whether a URL is as good as a path."""

import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final

from fabric_core.conformance.bench import Bench, folder_of_its_own
from fabric_core.conformance.rule import Broken, Table
from fabric_core.conformance.rules.checkpoint.measures import (
    CALLS,
    Unwritable,
    about_for,
    files,
    is_same,
    outlines,
    tree_for,
    without_about,
)
from fabric_core.contracts import ABOUT, walk_tensors
from fabric_core.errors import CheckpointError, NotInstalledError

TABLE: Final = Table("checkpoint")


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
    tree = tree_for(bench)
    state: Any = f"file://{folder}/state" if remote else folder / "state"
    text: Any = f"file://{folder}/text" if remote else folder / "text"

    def answers(when: str) -> Iterator[tuple[str, str]]:
        yield f"recognises {when}", _outcome(lambda: plugin.recognises(state), True)
        for call in ("read", "read_trusted"):
            yield f"{call} {when}", _outcome(partial(_without_about_of, call, plugin, state), tree)
        yield f"tensors {when}", _outcome(lambda: dict(plugin.tensors(state)), dict(walk_tensors(tree)))
        yield f"outline {when}", _outcome(lambda: outlines(without_about(plugin.outline(state)), tree), True)
        yield f"check {when}", _outcome(lambda: plugin.check(state, None), None)
        yield f"describe {when}", _outcome(lambda: plugin.describe(state).get(ABOUT), about_for(1.0))
        yield (
            f"names_beside {when}",
            _outcome(lambda: plugin.names_beside(state), sorted(one.name for one in folder.iterdir())),
        )

    yield from answers("where nothing is")
    for factor in (2.0, 1.0):
        plugin.write(state, {**tree_for(bench, factor), ABOUT: about_for(factor)})
    yield from answers("what was written twice")
    bad = {**tree, "bad": Unwritable()}
    yield "writing what can't be", _outcome(lambda: plugin.write(state, bad), None)
    yield from answers("after a failed write")
    (folder / "text").write_text("text", encoding="utf-8")
    yield "removing another file", _outcome(lambda: plugin.remove(text), None)
    yield "replacing another file", _outcome(lambda: plugin.write(text, tree), None)
    yield "what lies there", str(sorted((one.name, one.is_dir()) for one in folder.iterdir()))
    kept = (folder / "text").is_file() and (folder / "text").read_bytes() == b"text"
    yield "the other file", "as it was" if kept else "another"
    whole = files(folder / "state")
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
    return without_about(CALLS[call](plugin, place))


def _outcome(act: Callable[[], Any], wanted: Any) -> str:
    try:
        got = act()
    except CheckpointError:
        return "CheckpointError"
    except NotInstalledError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever it is, it is compared
        return type(error).__name__
    return "as it should be" if is_same(wanted, got) else f"something else, {got!r:.80}"
