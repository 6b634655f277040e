"""Weights in the format of ``safetensors``: one file, or a folder in parts with the index that Hugging Face reads."""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import torch

from fabric_core.contracts import ABOUT, Checkpoint, CheckpointCapabilities, PluginOptions
from fabric_core.errors import CheckpointError, NotInstalledError
from fabric_plugins.checkpoints._files import MANIFEST, Aside, begin, found, is_regular, open_regular, reported
from fabric_plugins.checkpoints._manifest import VERSION, checked_name, checksum, decode, encode, field
from fabric_plugins.checkpoints._places import remove

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

    capabilities = CheckpointCapabilities(suffixes=(_SUFFIX,), plain_values=False)
    Options = SafetensorsOptions
    options: SafetensorsOptions

    def recognises(self, path: Any) -> bool:
        """A file whose header is one of this format, or a folder with such files."""
        try:
            local = found(Path(path))
            if local.is_dir():
                return is_regular(local / _INDEX) or is_regular(local / _SINGLE)
            if not is_regular(local):
                return False
            with open_regular(local) as file:
                start = file.read(9)
            length = int.from_bytes(start[:8], "little")
            return start[8:] == b"{" and 8 + length <= local.stat().st_size
        except (OSError, ValueError, CheckpointError):
            return False

    def write(self, path: Any, tree: Mapping[str, Any]) -> None:
        """Write aside, flush to disk, rename."""
        with reported("the checkpoint can't be written", path, "a path that can be written to, with room"):
            _library(path)
            names, tensors = _named(tree, path)
            about = {"format": _KIND, "version": VERSION, ABOUT: tree.get(ABOUT, {}), "entries": names}
            aside = begin(Path(path))
            try:
                if str(path).endswith(_SUFFIX):
                    _write_file(aside.part, tensors, about)
                else:
                    self._write_folder(aside, tensors, about)
                aside.commit()
            except BaseException:
                aside.abort()
                raise

    def _write_folder(self, aside: Aside, tensors: dict[str, torch.Tensor], about: dict[str, Any]) -> None:
        aside.part.mkdir()
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
        for file, shard in zip(files, shards, strict=True):
            _write_file(aside.part / file, shard, {**about, ABOUT: {}})
        if count > 1:
            index = {
                "metadata": {"total_size": sum(one.nbytes for one in tensors.values())},
                "weight_map": {name: file for file, shard in zip(files, shards, strict=True) for name in shard},
            }
            _write_bytes(aside.part / _INDEX, json.dumps(index, indent=2).encode())
            files.append(_INDEX)
        sizes = {name: {"bytes": (aside.part / name).stat().st_size} for name in files}
        _write_bytes(aside.part / MANIFEST, encode({**about, "files": sizes}))

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
            for file in _files(path):
                with _library(path)(file, framework="pt") as opened:
                    for name in opened.keys():  # noqa: SIM118 - it is no mapping
                        part = opened.get_slice(name)
                        dtype = opened.get_tensor(name).dtype if part.get_shape() == [] else part[:0].dtype
                        shown[name] = torch.empty(part.get_shape(), dtype=dtype, device="meta")
        return _tree(shown, names)

    def tensors(self, path: Any) -> Iterator[tuple[tuple[Any, ...], torch.Tensor]]:
        """Read one tensor at a time."""
        with reported("the checkpoint can't be read", path):
            names, files = self._entries(path), _files(path)
        for file in files:
            with reported("the checkpoint can't be read", path), _library(path)(file, framework="pt") as opened:
                sums = _sums(opened.metadata(), file)
                if sums and set(sums) != set(opened.keys()):
                    raise CheckpointError("the checkpoint is damaged: it has other tensors", where=str(file))
                for name in opened.keys():  # noqa: SIM118
                    tensor = opened.get_tensor(name)
                    if name in sums and sums[name] != _sum_of(tensor):
                        raise CheckpointError(
                            "the checkpoint is damaged: bytes have changed", where=f"{file}, the tensor {name!r}"
                        )
                    yield _key_path(name, names), tensor

    def describe(self, path: Any) -> dict[str, Any]:
        """Give the manifest; of what others wrote there is none."""
        with reported("the checkpoint can't be read", path):
            local = found(Path(path))
            if local.is_dir():
                return _manifest(local)
            with _library(path)(local, framework="pt") as opened:
                text = (opened.metadata() or {}).get("fabric")
            return {} if text is None else decode(text.encode(), local, _KIND)

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


def _write_file(path: Path, tensors: Mapping[str, torch.Tensor], about: Mapping[str, Any]) -> None:
    from safetensors.torch import save_file

    # A copy for each, so that tied weights don't share memory, which the library refuses.
    given = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    seen: set[int] = set()
    for name, tensor in given.items():
        if tensor.untyped_storage().data_ptr() in seen or tensor.untyped_storage().nbytes() != tensor.nbytes:
            given[name] = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
    sums = {name: _sum_of(tensor) for name, tensor in given.items()}
    metadata = {"format": "pt", "fabric": encode(about).decode(), "checksums": json.dumps(sums)}
    save_file(given, path, metadata=metadata)
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _write_bytes(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sum_of(tensor: torch.Tensor) -> str:
    """Give the checksum of a tensor's bytes, type and shape."""
    value = checksum(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return f"{value} {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _sums(metadata: Mapping[str, str] | None, file: Path) -> dict[str, Any]:
    ours = {name: text for name, text in (metadata or {}).items() if name in {"checksums", "fabric"}}
    if not ours:
        return {}
    sums = json.loads(ours.get("checksums", "null"))
    if len(ours) == 1 or not isinstance(sums, dict):
        raise CheckpointError("the checkpoint is damaged: its checksums are gone", where=str(file))
    decode(ours["fabric"].encode(), file, _KIND)
    return sums


def _manifest(folder: Path) -> dict[str, Any]:
    if not is_regular(folder / MANIFEST):
        return {}
    with open_regular(folder / MANIFEST) as file:
        return decode(file.read(), folder / MANIFEST, _KIND)


def _files(path: Any) -> list[Path]:
    """Give the files with tensors; those of a cache of Hugging Face may be links."""
    local = found(Path(path))
    if not local.is_dir():
        if not is_regular(local):
            raise FileNotFoundError(f"{local} is no regular file")
        return [local]
    for name, about in field(_manifest(local) or {"files": {}}, "files", dict, local).items():
        there = (local / checked_name(name, local)).stat().st_size
        if there != field(about, "bytes", int, local):
            raise CheckpointError(
                "the checkpoint is damaged: a file has another size", where=str(local / name), got=f"{there} bytes"
            )
    if not is_regular(local / _INDEX):
        return [local / _SINGLE]
    with open_regular(local / _INDEX) as file:
        index = json.loads(file.read(_HEADER_LIMIT))
    places = field(index, "weight_map", dict, local / _INDEX)
    names = sorted({checked_name(name, local / _INDEX) for name in places.values()})
    opened = [local / name for name in names]
    for one in opened:
        open_regular(one).close()
    held: set[str] = set()
    for one in opened:
        with _library(path)(one, framework="pt") as shard:
            held.update(shard.keys())
    if held != set(places):
        raise CheckpointError(
            "the index names other tensors than the files have", where=str(local / _INDEX),
            got=", ".join(sorted(held ^ set(places))[:5]),
        )  # fmt: skip
    return opened


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
