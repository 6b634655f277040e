"""Weights in the format of ``safetensors``: one file, or a folder in parts with the index that Hugging Face reads."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import torch

from fabric_core.contracts import ABOUT, Checkpoint, CheckpointCapabilities, PluginOptions
from fabric_core.errors import CheckpointError, NotInstalledError
from fabric_plugins.checkpoints._files import MANIFEST, begin, found, reported
from fabric_plugins.checkpoints._manifest import VERSION, checked_name, checksum, decode, encode, field
from fabric_plugins.checkpoints._places import (
    Folder,
    LocalFolder,
    RemoteFolder,
    file_system,
    is_url,
    kind_of,
    names_beside,
    read_small,
    refuse_foreign,
    remove,
    writing,
)

__all__ = ["SafetensorsCheckpoint", "SafetensorsOptions"]

_KIND: Final = "safetensors"
_SUFFIX: Final = ".safetensors"
_INDEX: Final = "model.safetensors.index.json"
_SINGLE: Final = "model.safetensors"
_HEADER_LIMIT: Final = 100_000_000


class SafetensorsOptions(PluginOptions):
    """The options of the format."""

    max_shard_size: int = 5_000_000_000
    """The most bytes of tensors in one file of a folder; a larger tensor has a file of its own."""


class SafetensorsCheckpoint(Checkpoint):
    """Tensors by their names, which many tools read; a path that ends in ``.safetensors`` is one file.

    One model under one name is written with the model's own names, as Hugging Face does; of several models the names
    begin with theirs. Plain values and optimizers are refused. Needs the package ``safetensors``.
    """

    capabilities = CheckpointCapabilities(suffixes=(_SUFFIX,), plain_values=False, remote=True)
    Options = SafetensorsOptions
    options: SafetensorsOptions

    def recognises(self, path: Any) -> bool:
        """A file whose header is one of this format, or a folder with such files."""
        try:
            folder, name = _place_of(path)
            if name is None:
                return kind_of(path) == _KIND or any(_has(folder, one) for one in (_INDEX, _SINGLE))
            with folder.open(name) as file:
                start = file.read(9)
            return start[8:] == b"{" and 8 + int.from_bytes(start[:8], "little") <= folder.size(name)
        except Exception:  # noqa: BLE001 - whatever a file system raises, there is none to be seen
            return False

    def write(self, path: Any, tree: Mapping[str, Any]) -> None:
        """Write aside, flush to disk, put in place."""
        with reported("the checkpoint can't be written", path, "a path that can be written to, with room"):
            _library(path)
            names, tensors = _named(tree, path)
            about = {"format": _KIND, "version": VERSION, ABOUT: tree.get(ABOUT, {}), "entries": names}
            if not str(path).endswith(_SUFFIX):
                self._write_folder(path, tensors, about)
            elif is_url(path):
                refuse_foreign(path)
                folder, _, name = path.rpartition("/")
                _write_file(RemoteFolder(folder), name, tensors, about)
            else:
                aside = begin(Path(path))
                try:
                    _write_file(LocalFolder(aside.part.parent), aside.part.name, tensors, about)
                    aside.commit()
                except BaseException:
                    aside.abort()
                    raise

    def _write_folder(self, path: Any, tensors: dict[str, torch.Tensor], about: dict[str, Any]) -> None:
        shards: list[dict[str, torch.Tensor]] = [{}]
        room = self.options.max_shard_size
        for name, tensor in tensors.items():
            if tensor.nbytes > room and shards[-1]:
                shards.append({})
                room = self.options.max_shard_size
            shards[-1][name] = tensor
            room -= tensor.nbytes
        count = len(shards)
        files = [f"model-{at:05d}-of-{count:05d}.safetensors" for at in range(1, count + 1)] if count > 1 else [_SINGLE]
        place = writing(path)
        try:
            for file, shard in zip(files, shards, strict=True):
                _write_file(place.folder, f"{place.prefix}{file}", shard, {**about, ABOUT: {}})
            if count > 1:
                index = {
                    "metadata": {"total_size": sum(one.nbytes for one in tensors.values())},
                    "weight_map": {name: file for file, shard in zip(files, shards, strict=True) for name in shard},
                }
                with place.folder.create(f"{place.prefix}{_INDEX}") as opened:
                    opened.write(json.dumps(index, indent=2).encode())
                files.append(_INDEX)
            sizes = {f"{place.prefix}{name}": {"bytes": place.folder.size(f"{place.prefix}{name}")} for name in files}
            place.commit(encode({**about, "files": sizes}))
        except BaseException:
            place.abort()
            raise

    def read(self, path: Any, into: Mapping[str, Any] | None) -> dict[str, Any]:
        """Read everything, and compare checksums where they were written."""
        tensors: dict[str, torch.Tensor] = {}
        with reported("the checkpoint can't be read", path):
            names = self._entries(path)
            for at, tensor in self.tensors(path):
                tensors[at[-1] if len(at) == 1 else _joined(at)] = tensor
        return _tree(tensors, names)

    def outline(self, path: Any) -> dict[str, Any]:
        """Give the tree with its tensors on the meta device, from the headers alone."""
        with reported("the checkpoint can't be read", path):
            names = self._entries(path)
            shown = {}
            for _, opened in _shards(path):
                for name in opened.keys():  # noqa: SIM118 - it is no mapping
                    part = opened.get_slice(name)
                    dtype = opened.get_tensor(name).dtype if part.get_shape() == [] else part[:0].dtype
                    shown[name] = torch.empty(part.get_shape(), dtype=dtype, device="meta")
        return _tree(shown, names)

    def tensors(self, path: Any) -> Iterator[tuple[tuple[Any, ...], torch.Tensor]]:
        """Read one tensor at a time."""
        with reported("the checkpoint can't be read", path):
            names = self._entries(path)
            for where, opened in _shards(path):
                sums = _sums(opened.metadata(), where)
                if sums and set(sums) != set(opened.keys()):
                    raise CheckpointError("the checkpoint is damaged: it has other tensors", where=where)
                for name in opened.keys():  # noqa: SIM118
                    tensor = opened.get_tensor(name)
                    if name in sums and sums[name] != _sum_of(tensor):
                        raise CheckpointError(
                            "the checkpoint is damaged: bytes have changed", where=f"{where}, the tensor {name!r}"
                        )
                    yield _key_path(name, names), tensor

    def describe(self, path: Any) -> dict[str, Any]:
        """Give the manifest; of what others wrote there is none."""
        with reported("the checkpoint can't be read", path):
            folder, name = _place_of(path)
            if name is None:
                body = _manifest(folder)
                if not body and not any(_has(folder, one) for one in (_INDEX, _SINGLE)):
                    raise FileNotFoundError(f"no {MANIFEST}, {_INDEX} or {_SINGLE}")
                return body
            with folder.local(name) as file, _library(path)(file, framework="pt") as opened:
                text = (opened.metadata() or {}).get("fabric")
            return {} if text is None else decode(text.encode(), path, _KIND)

    def names_beside(self, path: Any) -> list[str]:
        """List the folder, also behind a URL."""
        return names_beside(path)

    def remove(self, path: Any) -> None:
        """Delete file or folder."""
        remove(path, self.recognises(path))

    def _entries(self, path: Any) -> list[str]:
        """Give the names of the models; none where others wrote it, who know one model without a name."""
        body = self.describe(path)
        names = field(body, "entries", list, path) if body else []
        if not all(isinstance(one, str) for one in names):
            raise CheckpointError("the manifest is damaged", where=str(path))
        return names


def _library(path: Any) -> Any:
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise NotInstalledError(
            "this format needs the package safetensors", where=str(path),
            instead='pip install "fabric-registry[safetensors]"',
        ) from error  # fmt: skip
    return safe_open


def _named(tree: Mapping[str, Any], path: Any) -> tuple[list[str], dict[str, torch.Tensor]]:
    """Name all tensors, and refuse everything else."""
    entries = {name: one for name, one in tree.items() if name != ABOUT}
    if not entries:
        raise CheckpointError("there is nothing to save", where=str(path))
    for name, entry in entries.items():
        wrong = [key for key, one in entry.items() if not _plain(one)] if isinstance(entry, Mapping) else [name]
        if wrong:
            raise CheckpointError(
                "the format safetensors holds dense tensors of models alone",
                where=f"{path}, entry {name!r}",
                got=", ".join(map(str, wrong[:5])),
                instead='{"model": model}; everything else in the formats single_file or distributed',
            )
    several = len(entries) > 1
    named = {
        f"{name}.{key}" if several else str(key): tensor for name, one in entries.items() for key, tensor in one.items()
    }
    if len(named) < sum(map(len, entries.values())):
        raise CheckpointError("two tensors would have one name", where=str(path), got=", ".join(entries))
    return list(entries), named


def _plain(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.layout is torch.strided and not hasattr(value, "device_mesh")


def _write_file(folder: Folder, file: str, tensors: Mapping[str, torch.Tensor], about: Mapping[str, Any]) -> None:
    from safetensors.torch import save_file

    # A copy for each, so that tied weights don't share memory, which the library refuses.
    given = {name: tensor.detach().cpu().resolve_conj().resolve_neg().contiguous() for name, tensor in tensors.items()}
    seen: set[int] = set()
    for name, tensor in given.items():
        if tensor.untyped_storage().data_ptr() in seen or tensor.untyped_storage().nbytes() != tensor.nbytes:
            given[name] = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
    sums = {name: _sum_of(tensor) for name, tensor in given.items()}
    metadata = {"format": "pt", "fabric": encode(about).decode(), "checksums": json.dumps(sums)}
    with folder.create(file) as opened:
        save_file(given, opened.name, metadata=metadata)


def _sum_of(tensor: torch.Tensor) -> str:
    """Give the checksum of a tensor's bytes, type and shape."""
    value = checksum(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return f"{value} {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _sums(metadata: Mapping[str, str] | None, file: str) -> dict[str, Any]:
    ours = {name: text for name, text in (metadata or {}).items() if name in {"checksums", "fabric"}}
    if not ours:
        return {}
    sums = json.loads(ours.get("checksums", "null"))
    if len(ours) == 1 or not isinstance(sums, dict):
        raise CheckpointError("the checkpoint is damaged: its checksums are gone", where=file)
    decode(ours["fabric"].encode(), file, _KIND)
    return sums


def _place_of(path: Any) -> tuple[Folder, str | None]:
    """Give the folder, and the name in it where the checkpoint is one file."""
    if is_url(path):
        system, root = file_system(path)
        folder, _, name = path.rstrip("/").rpartition("/")
        return (RemoteFolder(folder), name) if system.isfile(root) else (RemoteFolder(path), None)
    local = found(Path(path))
    return (LocalFolder(local), None) if local.is_dir() else (LocalFolder(local.parent), local.name)


def _has(folder: Folder, name: str) -> bool:
    try:
        return folder.size(name) > 0
    except FileNotFoundError:
        return False


def _manifest(folder: Folder) -> dict[str, Any]:
    if not _has(folder, MANIFEST):
        return {}
    return decode(read_small(folder, MANIFEST), folder.where(MANIFEST), _KIND)


def _shards(path: Any) -> Iterator[tuple[str, Any]]:
    """Open the files with tensors one after another; those of a cache of Hugging Face may be links."""
    library = _library(path)
    folder, name = _place_of(path)
    for file, wanted in [(name, None)] if name is not None else _files(folder):
        with folder.local(file) as local, library(local, framework="pt") as opened:
            if wanted is not None and wanted != set(opened.keys()):
                raise CheckpointError(
                    "the index names other tensors than the file has", where=folder.where(file),
                    got=", ".join(sorted(wanted ^ set(opened.keys()))[:5]),
                )  # fmt: skip
            yield folder.where(file), opened


def _files(folder: Folder) -> list[tuple[str, set[str] | None]]:
    """Give the names of a folder's files with tensors, and those of the tensors in each where an index says so."""
    files = field(_manifest(folder) or {"files": {}}, "files", dict, folder.where(MANIFEST))
    for name, about in files.items():
        there = folder.size(checked_name(name, folder.where(MANIFEST)))
        if there != field(about, "bytes", int, folder.where(MANIFEST)):
            raise CheckpointError(
                "the checkpoint is damaged: a file has another size", where=folder.where(name), got=f"{there} bytes"
            )
    # Behind a URL each save has a prefix of its own.
    prefix = next((f"{name.partition('/')[0]}/" for name in files if "/" in name), "")
    if f"{prefix}{_INDEX}" not in files and not _has(folder, f"{prefix}{_INDEX}"):
        return [(f"{prefix}{_SINGLE}", None)]
    where = folder.where(f"{prefix}{_INDEX}")
    with folder.local(f"{prefix}{_INDEX}") as file:
        index = json.loads(read_small(LocalFolder(file.resolve().parent), file.resolve().name))
    shards: dict[str, set[str]] = {}
    for name, file_name in field(index, "weight_map", dict, where).items():
        shards.setdefault(f"{prefix}{checked_name(file_name, where)}", set()).add(name)
    return [*shards.items()]


def _key_path(name: str, names: list[str]) -> tuple[str, ...]:
    if len(names) == 1:
        return names[0], name
    owner = max((one for one in names if name.startswith(f"{one}.")), key=len, default=None)
    return (name,) if owner is None else (owner, name.removeprefix(f"{owner}."))


def _joined(path: tuple[Any, ...]) -> str:
    return "\0".join(path)


def _tree(tensors: Mapping[str, torch.Tensor], names: list[str]) -> dict[str, Any]:
    tree: dict[str, Any] = {name: {} for name in names}
    for name, tensor in tensors.items():
        path = tuple(name.split("\0")) if "\0" in name else _key_path(name, names)
        if len(path) == 1:
            tree[path[0]] = tensor
        else:
            tree[path[0]][path[1]] = tensor
    return tree
