"""One file with the full state, which plain PyTorch reads."""

import os
import pickle
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, Final

import torch

from fabric_core.contracts import ABOUT, Checkpoint, CheckpointCapabilities
from fabric_core.errors import CheckpointError
from fabric_plugins.checkpoints import _archive
from fabric_plugins.checkpoints._files import START, begin, found, is_regular, is_torch_file, reported
from fabric_plugins.checkpoints._manifest import VERSION, decode, encode
from fabric_plugins.checkpoints._places import (
    downloaded,
    file_system,
    is_url,
    names_beside,
    refuse_foreign,
    remove,
    upload,
)
from fabric_plugins.checkpoints._plain import check_readable

__all__ = ["SingleFileCheckpoint"]

_KIND: Final = "single_file"


class SingleFileCheckpoint(Checkpoint):
    """One file, written aside and renamed; ``torch.load(path, weights_only=True)`` reads it.

    It is the archive of ``torch.save``, whose checksums are compared at each load, and a record with the manifest.
    """

    capabilities = CheckpointCapabilities(remote=True)

    def recognises(self, path: Any) -> bool:
        """A regular file that begins as those of ``torch.save`` do."""
        try:
            return is_torch_file(_start_of(path))
        except Exception:  # noqa: BLE001 - whatever a file system raises, there is none to be seen
            return False

    def write(self, path: Any, tree: Mapping[str, Any]) -> None:
        """Write aside, flush to disk, rename."""
        about = tree.get(ABOUT, {})
        kept = {name: value for name, value in tree.items() if name != ABOUT}
        with reported("the checkpoint can't be written", path, "a path that can be written to, with room"):
            if not torch.serialization.get_crc32_options():
                raise CheckpointError(
                    "a single file without checksums is not written: nothing could tell later whether it is whole",
                    where=str(path),
                    got="torch.serialization.set_crc32_options(False)",
                    instead='torch.serialization.set_crc32_options(True), or format="distributed"',
                )
            check_readable(kept, path)
            if is_url(path):
                refuse_foreign(path)
                with tempfile.NamedTemporaryFile(prefix="fabric-") as there:
                    _write(there.file, kept, about)
                    there.flush()
                    upload(Path(there.name), path)
                return
            aside = begin(Path(path))
            try:
                with aside.part.open("x+b") as file:
                    _write(file, kept, about)
                    file.flush()
                    os.fsync(file.fileno())
                aside.commit()
            except BaseException:
                aside.abort()
                raise

    def read(self, path: Any, into: Mapping[str, Any] | None) -> dict[str, Any]:
        """Compare checksums, and map the tensors into memory, so that a rank loads what it uses; no code is run."""
        return _read(path, weights_only=True, checked=True)

    def outline(self, path: Any) -> dict[str, Any]:
        """Give the tree as it is mapped into memory; checksums are compared by ``read``."""
        return _read(path, weights_only=True, checked=False)

    def check(self, path: Any, into: Mapping[str, Any] | None) -> None:
        """Compare checksums and sizes."""
        with reported("the checkpoint can't be read", path), downloaded(path) as local:
            _archive.check(local)

    def read_trusted(self, path: Any) -> dict[str, Any]:
        """Read with ``torch.load(weights_only=False)``, which runs what the file says."""
        return _read(path, weights_only=False, checked=False)

    def describe(self, path: Any) -> dict[str, Any]:
        """Give the manifest; a file that others wrote has none."""
        with reported("the checkpoint can't be read", path), downloaded(path) as local:
            data = _archive.manifest_of(local)
            return {} if data is None else decode(data, path, _KIND)

    def names_beside(self, path: Any) -> list[str]:
        """List the folder, also behind a URL."""
        return names_beside(path)

    def remove(self, path: Any) -> None:
        """Delete the file."""
        remove(path, self.recognises(path))


def _start_of(path: Any) -> bytes:
    if is_url(path):
        system, root = file_system(path)
        with system.open(root, "rb") as file:
            start: bytes = file.read(START)
        return start
    local = found(Path(path))
    if not is_regular(local):
        return b""
    with local.open("rb") as file:
        return file.read(START)


def _write(file: IO[bytes], tree: dict[str, Any], about: Any) -> None:
    _archive.Passed(file).save(tree)
    body = {"format": _KIND, "version": VERSION, ABOUT: about, "entries": sorted(map(str, tree))}
    _archive.append(file, encode(body))


def _read(path: Any, *, weights_only: bool, checked: bool) -> dict[str, Any]:
    with reported("the checkpoint can't be read", path), downloaded(path) as local:
        try:
            if checked:
                _archive.check(local)
            elif not is_regular(local):
                raise FileNotFoundError(f"{local} is no regular file")
            tree = torch.load(local, map_location="cpu", weights_only=weights_only, mmap=True)
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                "the checkpoint is damaged, or holds objects that need code to be read",
                where=str(path),
                got=str(error).splitlines()[0],
                instead="weights_only=False, if you trust whoever wrote the file",
            ) from error
    if not isinstance(tree, dict):
        raise CheckpointError("the file holds no state tree", where=str(path), got=type(tree).__name__)
    return tree
