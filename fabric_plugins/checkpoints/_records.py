"""Records of tensors: planned by ``torch.distributed.checkpoint``, each one file of ``torch.save`` within a larger one.

Who writes and reads which part of which tensor is that package's planners' to say. The bytes are written here, so that
every record has a checksum, and is found by an index that is data; nothing here needs a process group.
"""

import io
import math
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Final, NamedTuple

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, WriteItem

from fabric_core.errors import CheckpointError
from fabric_plugins.checkpoints._archive import HEADER, Counted
from fabric_plugins.checkpoints._manifest import checked_name, checksum, field
from fabric_plugins.checkpoints._places import Folder
from fabric_plugins.checkpoints._tree import KeyPath

__all__ = ["Index", "Record", "Writer", "read_index"]

_CHUNK: Final = 1 << 24
_SHARE: Final = 1 << 24
"""How many bytes of tensors are worth a file and a thread."""
_MOST_FILES: Final = 4
"""The most files that one rank writes; more don't make a disk faster."""
_BESIDE: Final = 1 << 16
"""The most bytes of a record beside those of its tensor; it is 1.3 KB as ``torch.save`` writes it."""


class Record(NamedTuple):
    """A part of a tensor in a file; offsets and sizes in elements of each dimension, place and length in bytes."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    place: int
    length: int
    checksum: str


class Writer:
    """Writes this rank's parts of tensors.

    Args:
        tensors: The tensors under their keys; the same keys on every rank.
        coordinator: Whether this is rank 0.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], *, coordinator: bool) -> None:
        # What several ranks have may differ: the lowest writes it, as the contract says, and it isn't shared out.
        self._planner = DefaultSavePlanner(
            flatten_state_dict=False, flatten_sharded_tensors=False, dedup_save_to_lowest_rank=True
        )
        self._planner.set_up_planner(dict(tensors), is_coordinator=coordinator)
        self._metadata = Metadata({})

    def local_plan(self) -> SavePlan:
        """Say what this rank could write."""
        return self._planner.create_local_plan()

    def write(self, plans: list[SavePlan], rank: int, folder: Folder, prefix: str) -> dict[str, list[Record]]:
        """Write what falls to this rank; much of it by several threads, each to a file of its own.

        Args:
            plans: The local plans of all ranks, in their order.
            rank: This rank.
            folder: Where to.
            prefix: What the names of files begin with.

        Returns:
            The records of each key.
        """
        global_plan, self._metadata = self._planner.create_global_plan(plans)
        shares = _shares(self._planner.finish_plan(global_plan[rank]).items)
        names = [f"{prefix}__{rank}_{number}.distcp" for number in range(len(shares))]
        records: dict[str, list[Record]] = {}
        with ThreadPoolExecutor(_MOST_FILES) as pool:
            each = pool.map if len(shares) > 1 else map
            for written in each(lambda share, name: self._write_file(share, folder, name), shares, names):
                for key, record in written:
                    records.setdefault(key, []).append(record)
        return records

    def _write_file(self, items: list[WriteItem], folder: Folder, name: str) -> list[tuple[str, Record]]:
        records: list[tuple[str, Record]] = []
        with folder.create(name) as file:
            for item in items:
                tensor = self._planner.resolve_data(item)
                if not isinstance(tensor, torch.Tensor) or item.tensor_data is None:
                    raise AssertionError("only tensors are planned")
                # Bytes alone are read again, so that what a view would do to them must be done.
                local = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
                if local.untyped_storage().nbytes() != local.nbytes:
                    local = local.clone()  # a view would take its whole storage along
                counted = Counted(file)
                place = file.tell()
                counted.save(local)
                chunk = item.tensor_data.chunk
                record = Record(tuple(chunk.offsets), tuple(chunk.sizes), name, place, counted.length, counted.checksum)
                records.append((item.index.fqn, record))
        return records

    def index(self, parts: Iterable[Mapping[str, list[Record]]]) -> dict[str, Any]:
        """Give the index as plain values, from what all ranks wrote."""
        records: dict[str, list[Record]] = {}
        for part in parts:
            for key, some in part.items():
                records.setdefault(key, []).extend(some)
        result = {}
        for key, described in self._metadata.state_dict_metadata.items():
            if not isinstance(described, TensorStorageMetadata):
                raise AssertionError("only tensors are planned")  # noqa: TRY004 - a broken invariant
            result[key] = {
                "dtype": str(described.properties.dtype).removeprefix("torch."),
                "shape": list(described.size),
                "records": [[list(part) if isinstance(part, tuple) else part for part in one] for one in records[key]],
            }
        return result


class Index:
    """What tensors a checkpoint has, and where their records are."""

    def __init__(self, entries: Mapping[str, tuple[torch.dtype, torch.Size, list[Record]]]) -> None:
        self.entries = entries
        self._room = bytearray()
        """Where records are read to, one after another: memory that was used before is faster than new."""

    def metadata(self, key_paths: Mapping[str, KeyPath] | None = None, storage: Any = None) -> Metadata:
        """Give it as ``torch.distributed.checkpoint`` knows it; for its own tools with where the records are."""
        metadata = Metadata(
            {
                key: TensorStorageMetadata(
                    TensorProperties(dtype=dtype),
                    shape,
                    [ChunkStorageMetadata(torch.Size(one.offsets), torch.Size(one.sizes)) for one in records],
                )
                for key, (dtype, shape, records) in self.entries.items()
            }
        )
        if storage is None:
            return metadata
        places = {
            MetadataIndex(key, one.offsets): storage(one.file, one.place, one.length)
            for key, (_, _, records) in self.entries.items()
            for one in records
        }
        return replace(metadata, planner_data=key_paths, storage_data=places)

    def check(self, targets: Mapping[str, torch.Tensor], folder: Folder) -> None:
        """Make sure that what these tensors need is there and whole; reads all bytes, keeps none.

        Raises:
            CheckpointError: It isn't.
        """
        seen = set()
        for _, key, record, _ in self._needed(targets):
            if record not in seen:
                seen.add(record)
                self._tensor(folder, record, key)

    def read(self, targets: Mapping[str, torch.Tensor], folder: Folder) -> None:
        """Fill tensors in place, each rank its own parts.

        Raises:
            CheckpointError: Something is damaged; then some are filled, and some are not.
        """
        last: tuple[Record, torch.Tensor] | None = None
        for planner, key, record, item in self._needed(targets):
            if last is None or last[0] != record:
                last = record, self._tensor(folder, record, key)
            part = last[1]
            for dim, (start, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                part = part.narrow(dim, start, length)
            target = planner.resolve_tensor(item).detach()
            target.copy_(part)
            planner.commit_tensor(item, target)

    def _tensor(self, folder: Folder, record: Record, key: str) -> torch.Tensor:
        """Read a record: the bytes of its only storage, as its index says; the pickle beside them isn't needed.

        The tensor is good until the next record is read.
        """
        where = f"{folder.where(record.file)}, the tensor {key!r}"
        dtype = self.entries[key][0]
        count = math.prod(record.sizes)
        if record.length > dtype.itemsize * count + _BESIDE:
            raise CheckpointError("a record holds more than its index says", where=where, got=f"{record.length} bytes")
        try:
            data = self._bytes(folder, record, where)
            start = _start_of_storage(data, dtype.itemsize * count)
        except (zipfile.BadZipFile, ValueError, KeyError, EOFError, RuntimeError, MemoryError, OverflowError) as error:
            line = next(iter(str(error).splitlines()), type(error).__name__)
            raise CheckpointError("the checkpoint is damaged", where=where, got=line[:200]) from error
        if start is None:
            raise CheckpointError("a record holds something else than its index says", where=where)
        if not count:
            return torch.empty(record.sizes, dtype=dtype)
        return torch.frombuffer(data, dtype=dtype, count=count, offset=start).reshape(record.sizes)

    def _bytes(self, folder: Folder, record: Record, where: str) -> memoryview:
        if record.length > folder.size(record.file):
            raise CheckpointError("the checkpoint is cut off", where=where, got=f"{record.length} bytes were written")
        if len(self._room) < record.length:
            self._room = bytearray(record.length)
        view, filled = memoryview(self._room)[: record.length], 0
        with folder.open(record.file) as file:
            file.seek(record.place)
            while filled < record.length:
                count = file.readinto(view[filled : filled + _CHUNK])  # type: ignore[attr-defined] # binary files have it
                if not count:
                    raise CheckpointError("the checkpoint is cut off", where=where, got=f"{filled} bytes are there")
                filled += count
        if checksum(view) != record.checksum:
            raise CheckpointError("the checkpoint is damaged: bytes have changed", where=where)
        return view

    def _needed(self, targets: Mapping[str, torch.Tensor]) -> Iterable[tuple[DefaultLoadPlanner, str, Record, Any]]:
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        planner.set_up_planner(dict(targets), self.metadata(), is_coordinator=False)
        places = {(key, one.offsets): one for key, (_, _, records) in self.entries.items() for one in records}
        items = planner.finish_plan(planner.create_local_plan()).items
        found = [(planner, one.storage_index.fqn, places[_place_of(one.storage_index)], one) for one in items]
        return sorted(found, key=lambda one: (one[2].file, one[2].place))


def _shares(items: Sequence[WriteItem]) -> list[list[WriteItem]]:
    """Share what is to be written out among threads: what is large first, to the one that has least so far."""
    sizes = {id(item): item.tensor_storage_size() or 0 for item in items}
    count = min(torch.get_num_threads(), _MOST_FILES, sum(sizes.values()) // _SHARE)
    shares: list[list[WriteItem]] = [[] for _ in range(max(1, count))]
    filled = [0] * len(shares)
    for item in sorted(items, key=lambda one: -sizes[id(one)]):
        least = filled.index(min(filled))
        shares[least].append(item)
        filled[least] += sizes[id(item)]
    return shares if items else []


def _place_of(index: MetadataIndex) -> tuple[str, tuple[int, ...]]:
    return index.fqn, tuple(index.offset or ())


class _View(io.RawIOBase):
    """Bytes as a file, which are not copied."""

    def __init__(self, data: memoryview) -> None:
        super().__init__()
        self._data = data
        self._at = 0

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a place."""
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: len(self._data)}[whence]
        if start + offset < 0:
            raise ValueError("a place before the beginning")
        self._at = start + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Read what is there."""
        part = self._data[self._at : self._at + len(buffer)]
        buffer[: len(part)] = part
        self._at += len(part)
        return len(part)


def _start_of_storage(data: memoryview, size: int) -> int | None:
    """Give where the bytes of the one storage begin; ``None`` where there isn't one of that size."""
    with zipfile.ZipFile(_View(data)) as archive:
        records = archive.infolist()
    storages = [one for one in records if "/data/" in one.filename]
    stored = all(one.compress_type == zipfile.ZIP_STORED for one in records)
    if len(storages) != 1 or storages[0].file_size != size or not stored:
        return None
    at = storages[0].header_offset
    lengths = [int.from_bytes(data[at + here : at + here + 2], "little") for here in (26, 28)]
    start = at + HEADER + sum(lengths)
    return start if start + size <= len(data) else None


def read_index(body: Any, where: object) -> Index:
    """Read the index of a manifest.

    Raises:
        CheckpointError: It is no index, or names what lies outside of the checkpoint.
    """
    entries = {}
    for key, entry in field(body, "tensors", dict, where).items():
        at = f"{where}, the tensor {key!r}"
        dtype = getattr(torch, field(entry, "dtype", str, at), None)
        shape = _numbers(field(entry, "shape", list, at), at)
        records = [_record(one, shape, at) for one in field(entry, "records", list, at)]
        covered = sum(math.prod(one.sizes) for one in records)
        distinct = len({one.offsets for one in records}) == len(records)
        if not isinstance(dtype, torch.dtype) or covered != math.prod(shape) or not records or not distinct:
            raise CheckpointError("the manifest is damaged", where=at, got=f"{entry['dtype']}, {shape}"[:200])
        entries[key] = dtype, torch.Size(shape), records
    return Index(entries)


def _record(value: Any, shape: tuple[int, ...], where: str) -> Record:
    if not isinstance(value, list) or len(value) != len(Record._fields):
        raise CheckpointError("the manifest is damaged", where=where, got=repr(value)[:80])
    offsets, sizes, file, place, length, stored = value
    record = Record(_numbers(offsets, where), _numbers(sizes, where), checked_name(file, where), place, length, stored)
    fits = len(record.offsets) == len(record.sizes) == len(shape) and all(
        at + size <= whole for at, size, whole in zip(record.offsets, record.sizes, shape, strict=False)
    )
    if not fits or not isinstance(stored, str) or not all(type(one) is int and one >= 0 for one in (place, length)):
        raise CheckpointError("the manifest is damaged", where=where, got=repr(value)[:80])
    return record


def _numbers(value: Any, where: str) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(one) is int and 0 <= one < 1 << 62 for one in value):
        raise CheckpointError("the manifest is damaged", where=where, got=repr(value)[:80])
    return tuple(value)
