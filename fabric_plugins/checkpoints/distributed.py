"""A folder to which all ranks write their parts at once, as ``torch.distributed.checkpoint`` plans it."""

import io
import pickle
from collections.abc import Iterator, Mapping
from mmap import mmap
from typing import Any, Final

import torch

from fabric_core.contracts import ABOUT, Agreement, Checkpoint, CheckpointCapabilities, Collectives, SingleProcess
from fabric_core.errors import CheckpointError
from fabric_plugins.checkpoints._files import MANIFEST, reported
from fabric_plugins.checkpoints._manifest import VERSION, checked_name, checksum, decode, encode, field
from fabric_plugins.checkpoints._places import (
    Folder,
    Writing,
    folder_at,
    has_manifest,
    kind_of,
    names_beside,
    read_small,
    remove,
    writing,
)
from fabric_plugins.checkpoints._plain import check_readable
from fabric_plugins.checkpoints._tree import KeyPath, fill, find, keys_of, split

__all__ = ["DistributedCheckpoint"]

_OUTLINE: Final = "fabric.pt"
_METADATA: Final = ".metadata"
_KIND: Final = "distributed"


class DistributedCheckpoint(Checkpoint):
    """A folder with every rank's parts; any number of ranks, under any strategy, reads it again.

    ``fabric.json`` is the manifest: sizes, checksums, and the index of the tensors' records. ``fabric.pt`` is the tree,
    its tensors on the meta device, and all plain values. Both are data. ``.metadata`` is what the tools of
    ``torch.distributed.checkpoint`` need; it is a pickle, and never read here.
    """

    capabilities = CheckpointCapabilities(sharded=True, remote=True)

    def recognises(self, path: Any) -> bool:
        """A folder with a manifest and an outline."""
        return has_manifest(path) and kind_of(path) in {_KIND, None}

    def write(self, path: Any, tree: Mapping[str, Any]) -> None:
        """Write alone."""
        self.write_sharded(path, tree, SingleProcess())

    def write_sharded(self, path: Any, tree: Mapping[str, Any], collectives: Collectives) -> None:
        """Write into a folder aside; once all ranks have, rank 0 puts it in place."""
        agree = Agreement(collectives)
        with reported("the checkpoint can't be written", path, "a path that every rank can write to, with room"):
            place: Writing | None = None
            try:
                writer, keys, outline = agree.each(lambda: _prepared(path, tree, agree.rank), where=path)
                _check_same(agree, keys, tree, path)
                # What rank 0 has is written, so what it has is asked; its refusal is every rank's.
                agree.on_zero(lambda: check_readable(outline, path), where=path)
                plans = agree.gather(writer.local_plan, where=path)
                place = agree.on_zero(lambda: writing(path), where=path)
                parts = agree.gather(lambda: writer.write(plans, agree.rank, place.folder, place.prefix), where=path)
                agree.on_zero(lambda: _finish(place, writer.index(parts), keys, outline), where=path)
            except BaseException:
                if place is not None and agree.rank == 0:
                    place.abort()
                raise

    def outline(self, path: Any) -> dict[str, Any]:
        """Give the tree with its tensors on the meta device."""
        with reported("the checkpoint can't be read", path):
            return _Opened(path).outline

    def check(self, path: Any, into: Mapping[str, Any] | None) -> None:
        """Read every byte that is needed and compare checksums."""
        with reported("the checkpoint can't be read", path):
            opened = _Opened(path)
            opened.index.check(opened.targets(into), opened.folder)

    def read(self, path: Any, into: Mapping[str, Any] | None) -> dict[str, Any]:
        """Read in parallel, in place where ``into`` has a tensor of that shape, and whole tensors elsewhere."""
        with reported("the checkpoint can't be read", path):
            opened = _Opened(path)
            targets = opened.targets(into)
            opened.index.read(targets, opened.folder)
            read = {at: targets[key] for at, key in opened.keys.items() if key in targets}
            filled: dict[str, Any] = fill(opened.outline, read)
            return filled

    def read_trusted(self, path: Any) -> dict[str, Any]:
        """As ``read``: nothing in this format needs code."""
        return self.read(path, None)

    def tensors(self, path: Any) -> Iterator[tuple[KeyPath, torch.Tensor]]:
        """Read one tensor at a time."""
        with reported("the checkpoint can't be read", path):
            opened = _Opened(path)
        for at, key in opened.keys.items():
            with reported("the checkpoint can't be read", path):
                whole = _room_for(find(opened.outline, at))
                opened.index.read({key: whole}, opened.folder)
            yield at, whole

    def describe(self, path: Any) -> dict[str, Any]:
        """Give the manifest."""
        with reported("the checkpoint can't be read", path):
            return _Opened(path).body

    def names_beside(self, path: Any) -> list[str]:
        """List the folder, also behind a URL."""
        return names_beside(path)

    def remove(self, path: Any) -> None:
        """Delete the folder."""
        remove(path, self.recognises(path))


class _Opened:
    """The manifest and the outline of a checkpoint, read and compared."""

    def __init__(self, path: Any) -> None:
        from fabric_plugins.checkpoints._records import read_index

        self.folder: Folder = folder_at(path)
        where = self.folder.where(MANIFEST)
        self.body = decode(read_small(self.folder, MANIFEST), where, _KIND)
        self.index = read_index(self.body, where)
        files = field(self.body, "files", dict, where)
        for name, about in files.items():
            size, there = field(about, "bytes", int, where), self.folder.size(checked_name(name, where))
            if there != size:
                raise CheckpointError(
                    "the checkpoint is damaged: a file has another size",
                    where=self.folder.where(name),
                    got=f"{there} bytes, of {size}",
                )
        name = checked_name(field(self.body, "outline", str, where), where)
        data = read_small(self.folder, name)
        if name not in files or checksum(data) != files[name].get("checksum"):
            raise CheckpointError("the checkpoint is damaged: bytes have changed", where=self.folder.where(name))
        self.outline = _load_outline(data, self.folder.where(name))
        _, tensors = split(self.outline, path)
        self.keys = keys_of(tensors)
        for at, key in self.keys.items():
            known = self.index.entries.get(key)
            if known is None or known[:2] != (tensors[at].dtype, tensors[at].shape):
                raise CheckpointError("the index and the outline of the checkpoint differ", where=where, got=key)

    def targets(self, into: Mapping[str, Any] | None) -> dict[str, torch.Tensor]:
        """Give the tensors to fill under their keys: the own ones where shapes agree, and whole ones elsewhere."""
        result = {}
        for at, key in self.keys.items():
            own, shown = find(into or {}, at), find(self.outline, at)
            fits = isinstance(own, torch.Tensor) and own.shape == shown.shape
            if fits and own.is_meta:
                continue
            result[key] = own.detach() if fits else torch.empty_like(shown, device="cpu")
        return result


def _room_for(shown: torch.Tensor) -> torch.Tensor:
    """Make room for one tensor of many, that goes back to the system at its end.

    Of large blocks that come and go one after another, ``malloc`` may keep every one, as a hole too small for the next.
    """
    if not shown.nbytes:
        return torch.empty_like(shown, device="cpu")
    return torch.frombuffer(mmap(-1, shown.nbytes), dtype=shown.dtype).view(shown.shape)


def _load_outline(data: bytes, where: str) -> dict[str, Any]:
    try:
        outline = torch.load(io.BytesIO(data), weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            "the checkpoint is damaged, or holds objects that need code to be read",
            where=where,
            got=str(error).splitlines()[0],
        ) from error
    if not isinstance(outline, dict):
        raise CheckpointError("the checkpoint is damaged", where=where, got=type(outline).__name__)
    return outline


def _prepared(path: Any, tree: Mapping[str, Any], rank: int) -> tuple[Any, dict[KeyPath, str], dict[str, Any]]:
    from fabric_plugins.checkpoints._records import Writer

    outline, tensors = split(tree, path)
    keys = keys_of(tensors)
    return Writer({keys[at]: tensor for at, tensor in tensors.items()}, coordinator=rank == 0), keys, outline


def _check_same(agree: Agreement, keys: Mapping[KeyPath, str], tree: Mapping[str, Any], path: Any) -> None:
    """Refuse ranks that hold different tensors: what only one of them has would be lost, or never come.

    Raises:
        CheckpointError: They do; on every rank.
    """
    own = {key: tuple(find(tree, at).shape) for at, key in keys.items()}
    digests = agree.gather(lambda: checksum(repr(sorted(own.items())).encode()), where=path)
    if len(set(digests)) == 1:
        return
    every = agree.gather(lambda: own, where=path)
    names = sorted({key for one in every for key in one if any(other.get(key) != one[key] for other in every)})
    raise CheckpointError(
        "the ranks hold different tensors, so that no one of them can be saved for all",
        where=str(path),
        got=", ".join(names[:5]),
        instead="the same names and shapes on every rank",
    )


def _finish(place: Writing, index: dict[str, Any], keys: Mapping[KeyPath, str], outline: dict[str, Any]) -> None:
    """Write what rank 0 alone writes, and put all in place."""
    from fabric_plugins._torch import storage_info
    from fabric_plugins.checkpoints._records import read_index

    plain = {name: value for name, value in outline.items() if name != ABOUT}
    with place.folder.create(f"{place.prefix}{_OUTLINE}") as file:
        torch.save(plain, file)
    # PyTorch's converter builds nested dicts from these, and takes a number for an index into a list.
    key_paths = {key: at if all(isinstance(one, str) for one in at) else (key,) for at, key in keys.items()}
    metadata = read_index({"tensors": index}, "the new index").metadata(key_paths, storage_info())
    with place.folder.create(_METADATA) as file:
        pickle.dump(metadata, file)
    names = [f"{place.prefix}{_OUTLINE}", *sorted({one[2] for entry in index.values() for one in entry["records"]})]
    files: dict[str, Any] = {name: {"bytes": place.folder.size(name)} for name in names}
    with place.folder.open(names[0]) as file:
        files[names[0]]["checksum"] = checksum(file.read())
    body = {
        "format": _KIND,
        "version": VERSION,
        ABOUT: outline.get(ABOUT, {}),
        "outline": names[0],
        "files": files,
        "tensors": index,
    }
    place.commit(encode(body))
