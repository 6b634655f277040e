"""The archive that ``torch.save`` writes, looked at before it is read: nothing in it is run.

``torch.load`` trusts an archive's index: with ``mmap=True`` it takes a tensor's bytes from wherever a record begins, as
many as the pickle says, and compares no checksum. So the sizes that the pickle asks for are compared with those of the
records, and the checksums that every record has with its bytes.
"""

import io
import pickle
import zipfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, Final, Self

import torch

from fabric_core.errors import CheckpointError
from fabric_plugins.checkpoints._files import open_regular

__all__ = ["ABOUT_RECORD", "HEADER", "Counted", "Passed", "append", "check", "manifest_of"]

ABOUT_RECORD: Final = "fabric.json"
"""The record with our manifest, which ``torch.load`` passes over."""
HEADER: Final = 30
"""The bytes of a record's own header in a zip archive, before its name."""
_LIMIT: Final = 1 << 28
"""The largest pickle or manifest in an archive, in bytes; tensors lie outside of it."""
_BLOCK: Final = 1 << 22
_STORAGES: Final = {
    "UntypedStorage": torch.uint8,
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexDoubleStorage": torch.complex128,
    "ComplexFloatStorage": torch.complex64,
    "QInt8Storage": torch.qint8,
    "QUInt8Storage": torch.quint8,
    "QInt32Storage": torch.qint32,
}
"""The classes of storages that ``torch.save`` names; types that came later are untyped."""
_PARALLEL: Final = 1 << 24
"""From how many bytes on checksums are computed by several threads."""


class Passed(io.RawIOBase):
    """Passes what ``torch.save`` writes on to a file, and keeps the error that it would hide."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__()
        self._file = file
        self._error: OSError | None = None

    def save(self, value: Any) -> None:
        """Write a value as ``torch.save`` does.

        Raises:
            OSError: The file can't take it.
        """
        try:
            torch.save(value, self)  # type: ignore[arg-type] # it asks for write alone
        except RuntimeError:
            if self._error is not None:
                raise self._error from None
            raise

    def writable(self) -> bool:
        """It is."""
        return True

    def write(self, data: Any) -> int:
        """Write all of it."""
        try:
            self._file.write(data)
        except OSError as error:
            self._error = error
            raise
        return memoryview(data).nbytes


class Counted(Passed):
    """Keeps the length and the checksum of what is written too."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file)
        self._value = 0
        self.length = 0

    @property
    def checksum(self) -> str:
        """The checksum of everything that was written."""
        return f"{self._value:08x}"

    def write(self, data: Any) -> int:
        """Write all of it."""
        self._value = zlib.crc32(data, self._value)
        length = super().write(data)
        self.length += length
        return length


def append(file: IO[bytes], manifest: bytes) -> None:
    """Add our manifest to an archive that was just written."""
    file.flush()
    with zipfile.ZipFile(file, "a") as archive:
        root = archive.namelist()[0].partition("/")[0]
        archive.writestr(f"{root}/{ABOUT_RECORD}", manifest)


def manifest_of(path: Path) -> bytes | None:
    """Give our manifest, if the archive has one."""
    with open_regular(path) as file, zipfile.ZipFile(file) as archive:
        for one in archive.infolist():
            if one.filename.partition("/")[2] == ABOUT_RECORD and one.file_size <= _LIMIT:
                return archive.read(one)
    return None


def check(path: Path) -> None:
    """Make sure that an archive is whole.

    Raises:
        CheckpointError: It isn't.
        zipfile.BadZipFile, OSError, ...: Likewise, from the libraries.
    """
    with open_regular(path) as file, zipfile.ZipFile(file) as archive:
        records = archive.infolist()
        length = path.stat().st_size
        names = [one.filename.casefold() for one in records]
        if len(set(names)) != len(names):
            raise CheckpointError("the archive has two records of one name", where=str(path))
        for one in records:
            if one.compress_type != zipfile.ZIP_STORED or not 0 <= one.file_size <= length or one.flag_bits & 1:
                raise CheckpointError("a record of the archive is damaged", where=f"{path}, {one.filename}")
        if _has_sums(records):
            _check_sums(archive, records, path)
        sizes = {one.filename: one.file_size for one in records}
        pickled = [name for name in sizes if name.endswith("/data.pkl")]
        if len(pickled) != 1 or sizes[pickled[0]] > _LIMIT:
            raise CheckpointError("the file is no archive of torch.save", where=str(path), got=", ".join(sizes)[:80])
        root = pickled[0].removesuffix("data.pkl")
        for key, wanted in _storages(_pickled(file, archive.getinfo(pickled[0]))):
            if sizes.get(f"{root}data/{key}") != wanted:
                raise CheckpointError(
                    "a record of the archive has another size than the tensor in it",
                    where=f"{path}, {root}data/{key}",
                    got=f"{sizes.get(f'{root}data/{key}')} bytes, of {wanted}",
                )


def _has_sums(records: list[zipfile.ZipInfo]) -> bool:
    """Say whether checksums were written: of a file that others wrote, PyTorch may have been told to leave them 0."""
    return any(one.CRC for one in records)


def _pickled(file: IO[bytes], record: zipfile.ZipInfo) -> bytes:
    """Read a record past zipfile, which would compare a checksum that may not have been written."""
    _go_to(file, record)
    return file.read(record.file_size)


def _go_to(file: IO[bytes], record: zipfile.ZipInfo) -> None:
    file.seek(record.header_offset)
    header = file.read(HEADER)
    file.seek(int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little"), io.SEEK_CUR)


def _check_sums(archive: zipfile.ZipFile, records: list[zipfile.ZipInfo], path: Path) -> None:
    small = [one for one in records if one.file_size < _PARALLEL]
    for one in small:
        _check_sum(archive, one, path)
    large = [one for one in records if one.file_size >= _PARALLEL]
    if large:
        # zlib and reading let go of the interpreter's lock.
        with ThreadPoolExecutor(min(len(large), torch.get_num_threads())) as pool:
            list(pool.map(lambda one: _check_sum(archive, one, path), large))


def _check_sum(archive: zipfile.ZipFile, record: zipfile.ZipInfo, path: Path) -> None:
    # Opening compares the record's own header with the index; the bytes are then read past zipfile's buffers.
    with archive.open(record):
        pass
    with path.open("rb") as file:
        _go_to(file, record)
        value, left = 0, record.file_size
        buffer = memoryview(bytearray(min(_BLOCK, max(left, 1))))
        while left:
            count = file.readinto(buffer[: min(left, len(buffer))])
            if not count:
                break
            value, left = zlib.crc32(buffer[:count], value), left - count
    if left or value != record.CRC:
        raise CheckpointError("the checkpoint is damaged: bytes have changed", where=f"{path}, {record.filename}")


def _storages(data: bytes) -> Iterator[tuple[str, int]]:
    """Give the storages that a pickle asks for, and their bytes; makes no object of a class that it names."""
    reader = _Inert(io.BytesIO(data))
    reader.load()
    for kind, key, count in reader.storages:
        dtype = _STORAGES.get(kind)
        if dtype is None or type(count) is not int or not isinstance(key, str):
            raise CheckpointError("the checkpoint is damaged", got=f"a storage {kind!r}, {key!r}, {count!r}"[:200])
        yield key, count * dtype.itemsize


class _Anything(dict[Any, Any]):
    """Takes the place of every object, and does nothing with what it is given."""

    name: str = ""

    def __new__(cls, *_arguments: Any, **_named: Any) -> Self:
        return super().__new__(cls)

    def __init__(self, *_arguments: Any, **_named: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        """Take it."""

    def append(self, value: Any) -> None:
        """Take it."""

    def extend(self, values: Any) -> None:
        """Take them."""

    def add(self, value: Any) -> None:
        """Take it."""

    def __call__(self, *_arguments: Any) -> "_Anything":
        """Give another one."""
        return _Anything()

    def __hash__(self) -> int:  # type: ignore[override] # it may be a key
        return id(self)


class _Inert(pickle.Unpickler):
    """Reads a pickle for the storages that it names alone."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file, encoding="utf-8")
        self.storages: list[tuple[str, Any, Any]] = []

    def find_class(self, module: str, name: str) -> Any:
        """Give a stand-in, which remembers the name of a storage's class."""
        stand_in = _Anything()
        stand_in.name = name
        return stand_in

    def persistent_load(self, pid: Any) -> Any:
        """Note a storage."""
        if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage":  # noqa: PLR2004 - as torch.save writes it
            raise CheckpointError("the checkpoint is damaged", got=repr(pid)[:80])
        self.storages.append((getattr(pid[1], "name", ""), pid[2], pid[4]))
        return _Anything()
