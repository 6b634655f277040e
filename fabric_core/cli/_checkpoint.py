"""``fabric-core checkpoint``: shows, checks, converts and compares them, with one tensor in memory at a time."""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from fabric_core.cli._asking import find_registry
from fabric_core.cli._output import AsJson, Exit, print_json, print_text, progress
from fabric_core.contracts import ABOUT, Checkpoint, walk_tensors
from fabric_core.errors import CheckpointError
from fabric_core.running.paths import as_path
from fabric_core.running.recognising import reaches, recognise

__all__ = ["checkpoint"]

checkpoint = typer.Typer(no_args_is_help=True, help="Look into checkpoints, check, convert and compare them.")

_Path = Annotated[str, typer.Argument(help="A checkpoint: a file, a folder, or a URL.")]
_Entries = Annotated[list[str] | None, typer.Option("--entry", help="Only this entry; may be given several times.")]


@checkpoint.command(epilog="Example: fabric-core checkpoint info runs/step-100")
def info(path: _Path, as_json: AsJson = False) -> None:
    """Show the format, what the checkpoint is of, and its entries; reads no tensor."""
    name, found, where = _found(path)
    outline, about = found.outline(where), found.describe(where).get(ABOUT, {})
    entries: list[dict[str, Any]] = [
        {"entry": ".".join(map(str, at)), "shape": list(one.shape), "dtype": str(one.dtype).removeprefix("torch."),
         "bytes": one.nbytes}
        for at, one in walk_tensors(outline)
    ]  # fmt: skip
    plain = sorted(str(key) for key, value in outline.items() if not [*walk_tensors(value)] and key != ABOUT)
    total = sum(one["bytes"] for one in entries)
    if as_json:
        print_json({"path": path, "format": name, "about": about, "bytes": total, "tensors": entries, "plain": plain})
        return
    print_text(f"{path}: {name}, {len(entries)} tensors, {total} bytes")
    for key in ("world_size", "saved_at_ns", "score", "versions"):
        if key in about:
            print_text(f"  {key}: {about[key]}")
    choices = about.get("plan", {}).get("choices", []) if isinstance(about.get("plan"), Mapping) else []
    if choices:
        print_text("  plan: " + ", ".join(f"{one['kind']} {one['name']}" for one in choices))
    if plain:
        print_text(f"  plain values: {', '.join(plain)}")
    for one in entries:
        typer.echo(f"  {one['entry']}  {one['dtype']} {tuple(one['shape'])}")


@checkpoint.command(epilog="Example: fabric-core checkpoint verify runs/step-100")
def verify(path: _Path, as_json: AsJson = False) -> None:
    """Read every byte, and compare sizes and checksums; exit code 2 where something is damaged."""
    name, found, where = _found(path)
    count = total = 0
    for _, tensor in _watched(found, where, "reading"):
        count, total = count + 1, total + tensor.nbytes
    if as_json:
        print_json({"path": path, "format": name, "sound": True, "tensors": count, "bytes": total})
    else:
        typer.echo(f"{path}: sound ({name}, {count} tensors, {total} bytes)")


@checkpoint.command(epilog="Example: fabric-core checkpoint convert runs/step-100 model.safetensors --entry model")
def convert(
    source: _Path,
    target: _Path,
    to: Annotated[str | None, typer.Option("--format", help="The format to write; else by the path's ending.")] = None,
    entry: _Entries = None,
    as_json: AsJson = False,
) -> None:
    """Write a checkpoint again in another format."""
    formats = _formats()
    if to is None:
        to = next((name for name, one in formats if target.endswith(one.capabilities.suffixes or ("\0",))), "")
    writer = dict(formats).get(to)
    if writer is None:
        raise CheckpointError(
            "the format to write is needed",
            where="fabric-core checkpoint convert",
            got=repr(to) if to else None,
            instead=" or ".join(f"--format {name}" for name, _ in formats),
        )
    _copy(source, target, writer, entry, as_json)


@checkpoint.command(epilog="Example: fabric-core checkpoint consolidate runs/step-100 step-100.pt")
def consolidate(source: _Path, target: _Path, entry: _Entries = None, as_json: AsJson = False) -> None:
    """Make one file, which ``torch.load`` reads, of a checkpoint in parts."""
    writer = dict(_formats()).get("single_file")
    if writer is None:
        raise CheckpointError("the format single_file isn't installed", where="fabric-core checkpoint consolidate")
    _copy(source, target, writer, entry, as_json)


@checkpoint.command(epilog="Example: fabric-core checkpoint diff runs/step-100 runs/step-200")
def diff(one: _Path, other: _Path, as_json: AsJson = False) -> None:
    """Compare two checkpoints entry by entry; exit code 1 where they differ."""
    import torch

    differences: list[dict[str, Any]] = []
    with _spilled(*_found(one)[1:]) as left, _spilled(*_found(other)[1:]) as right:
        sides = [{".".join(map(str, at)): value for at, value in _leaves(tree)} for tree in (left, right)]
        for name in sorted(sides[0].keys() | sides[1].keys()):
            if name not in sides[0] or name not in sides[1]:
                differences.append({"entry": name, "only_in": one if name in sides[0] else other})
                continue
            here, there = sides[0][name], sides[1][name]
            if not (isinstance(here, torch.Tensor) and isinstance(there, torch.Tensor)):
                if type(here) is not type(there) or not bool(here == there):
                    differences.append({"entry": name, "here": repr(here)[:80], "there": repr(there)[:80]})
            elif (here.shape, here.dtype) != (there.shape, there.dtype):
                shown = [f"{str(part.dtype).removeprefix('torch.')} {tuple(part.shape)}" for part in (here, there)]
                differences.append({"entry": name, "here": shown[0], "there": shown[1]})
            elif not torch.equal(here, there):
                largest = (here.to(torch.complex128) - there.to(torch.complex128)).abs().max().item()
                differences.append({"entry": name, "largest_difference": largest})
    if as_json:
        print_json({"equal": not differences, "differences": differences})
    else:
        for difference in differences:
            typer.echo("  ".join(f"{key}: {value}" for key, value in difference.items()))
        typer.echo("equal" if not differences else f"{len(differences)} entries differ")
    if differences:
        raise typer.Exit(Exit.NO)


def _formats() -> list[tuple[str, Checkpoint]]:
    """Make every format that is installed and not broken."""
    registry = find_registry()
    priority = {offer.name: offer.auto or 0 for offer in registry.automatic("checkpoint")}
    made = []
    for offer in registry.offers("checkpoint"):
        preset = offer.load()
        plugin = preset.plugin(preset.plugin.parse_options(preset.options))
        if isinstance(plugin, Checkpoint):
            made.append((offer.name, plugin))
    return sorted(made, key=lambda one: -priority.get(one[0], 0))


def _found(path: str) -> tuple[str, Checkpoint, Any]:
    where = as_path(path)
    return *recognise(where, _formats()), where


def _watched(found: Checkpoint, where: Any, what: str) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Read tensors one by one, and show how far it is."""
    total = sum(one.nbytes for _, one in walk_tensors(found.outline(where)))
    with progress(what, total, in_bytes=True) as advance:
        for at, tensor in found.tensors(where):
            advance(tensor.nbytes, "")
            yield at, tensor


@contextmanager
def _spilled(found: Checkpoint, where: Any, entries: list[str] | None = None, near: Any = None) -> Iterator[Any]:
    """Give the tree with its tensors in files that are mapped into memory, so that none of them need fit there."""
    import torch

    folder = near.parent if isinstance(near, Path) and near.parent.is_dir() else None
    with tempfile.TemporaryDirectory(prefix=".fabric-convert-", dir=folder) as room:
        tensors: dict[tuple[Any, ...], Any] = {}
        for number, (at, tensor) in enumerate(_watched(found, where, "reading")):
            if entries is not None and str(at[0]) not in entries:
                continue
            if tensor.numel():
                name = f"{room}/{number}"
                kept = torch.from_file(name, shared=True, size=tensor.numel(), dtype=tensor.dtype)
                tensors[at] = kept.view(tensor.shape).copy_(tensor)
            else:
                tensors[at] = tensor.clone()
        tree = _filled(found.outline(where), tensors)
        unknown = sorted(set(entries or ()) - set(map(str, tree)))
        if unknown:
            raise CheckpointError(f"the checkpoint has no {', '.join(map(repr, unknown))}", where=str(where))
        yield {key: one for key, one in tree.items() if entries is None or str(key) in entries}


def _filled(value: Any, tensors: Mapping[tuple[Any, ...], Any], above: tuple[Any, ...] = ()) -> Any:
    if above in tensors:
        return tensors[above]
    if not any(at[: len(above)] == above for at in tensors):
        return value
    if isinstance(value, Mapping):
        return {key: _filled(one, tensors, (*above, key)) for key, one in value.items()}
    if isinstance(value, list | tuple):
        new = [_filled(one, tensors, (*above, index)) for index, one in enumerate(value)]
        return new if isinstance(value, list) else tuple(new)
    return value


def _leaves(value: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    if isinstance(value, Mapping) and value:
        for key, one in value.items():
            yield from _leaves(one, (*above, key))
    elif isinstance(value, list | tuple) and value:
        for index, one in enumerate(value):
            yield from _leaves(one, (*above, index))
    else:
        yield above, value


def _copy(source: str, target: str, writer: Checkpoint, entries: list[str] | None, as_json: bool) -> None:
    _, found, where = _found(source)
    there = as_path(target)
    if not reaches(writer, there):
        raise CheckpointError("this format writes local files alone", where=target)
    about = found.describe(where).get(ABOUT, {})
    with _spilled(found, where, entries, there) as tree:
        writer.write(there, {**{key: one for key, one in tree.items() if key != ABOUT}, ABOUT: about})
    if as_json:
        print_json({"source": source, "target": target})
    else:
        typer.echo(f"{target}: written")
