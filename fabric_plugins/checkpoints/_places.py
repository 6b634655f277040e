"""Where a checkpoint's files lie: a local folder, or a URL of a file system that ``fsspec`` knows.

[Note: generations] An object store has no names to exchange. There each save writes its files under a prefix of its
own, and the manifest last: a single object, which is there whole or not at all, names them. What the manifest before
it named is deleted after that.
"""

import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final, Protocol

from fabric_core.errors import CheckpointError, NotInstalledError
from fabric_plugins.checkpoints._files import (
    MANIFEST,
    START,
    Aside,
    begin,
    begins_as_checkpoint,
    flush,
    found,
    is_regular,
    open_regular,
    reported,
)

__all__ = [
    "Folder",
    "LocalFolder",
    "RemoteFolder",
    "Writing",
    "downloaded",
    "file_system",
    "folder_at",
    "has_manifest",
    "is_url",
    "kind_of",
    "names_beside",
    "read_small",
    "refuse_foreign",
    "remove",
    "upload",
    "writing",
]

_PART: Final = 1 << 24
"""How many bytes are copied at once."""
_LIMIT: Final = 1 << 29
"""The most bytes of a file that holds no tensors."""


class Folder(Protocol):
    """A folder of files that are read whole or in parts, and written once."""

    def open(self, name: str) -> IO[bytes]:
        """Open a file for reading."""

    def size(self, name: str) -> int:
        """Give the bytes of a file."""

    def create(self, name: str) -> Any:
        """Give a context with a new file to write, which has a name; it is flushed to the disk at the end."""

    def local(self, name: str) -> AbstractContextManager[Path]:
        """Give a context with a path to read a file from, for what takes paths alone; links are followed."""

    def where(self, name: str) -> str:
        """Show a file's place in messages."""


@dataclass(frozen=True)
class LocalFolder:
    """A folder of the local file system."""

    path: Path

    def open(self, name: str) -> IO[bytes]:
        """Open a regular file, no link."""
        return open_regular(self.path / name, follow=False)

    def size(self, name: str) -> int:
        """Give the bytes of a file."""
        return (self.path / name).lstat().st_size

    @contextmanager
    def create(self, name: str) -> Iterator[IO[bytes]]:
        """Write a new file."""
        with (self.path / name).open("xb") as file:
            yield file
        flush(self.path / name)  # by its name: a library that writes there may have put another file in its place

    @contextmanager
    def local(self, name: str) -> Iterator[Path]:
        """Give the file itself."""
        open_regular(self.path / name).close()
        yield self.path / name

    def where(self, name: str) -> str:
        """Give the path."""
        return str(self.path / name)


@dataclass(frozen=True)
class RemoteFolder:
    """A folder behind a URL."""

    url: str

    def open(self, name: str) -> IO[bytes]:
        """Open a file."""
        system, root = file_system(self.url)
        opened: IO[bytes] = system.open(f"{root}/{name}", "rb")
        return opened

    def size(self, name: str) -> int:
        """Give the bytes of a file."""
        system, root = file_system(self.url)
        return int(system.size(f"{root}/{name}"))

    @contextmanager
    def create(self, name: str) -> Iterator[IO[bytes]]:
        """Write a new file, here first, so that it comes to be there whole or not at all."""
        with tempfile.NamedTemporaryFile(prefix="fabric-") as file:
            yield file
            file.flush()
            upload(Path(file.name), self.where(name))

    @contextmanager
    def local(self, name: str) -> Iterator[Path]:
        """Fetch the file, which goes at the end."""
        with downloaded(self.where(name)) as path:
            yield path

    def where(self, name: str) -> str:
        """Give the URL."""
        return f"{self.url.rstrip('/')}/{name}"


@dataclass(frozen=True)
class Writing:
    """A checkpoint folder that is being written; it travels to the other ranks, which write their files too."""

    folder: Folder
    prefix: str
    aside: Aside | None

    def commit(self, manifest: bytes) -> None:
        """Write the manifest, and put all in place."""
        with self.folder.create(MANIFEST) as file:
            file.write(manifest)
        if self.aside is not None:
            self.aside.commit()
        else:
            self._forget(keep=self.prefix.rstrip("/"))

    def abort(self) -> None:
        """Delete what was written."""
        if self.aside is not None:
            self.aside.abort()
        elif isinstance(self.folder, RemoteFolder):
            system, root = file_system(self.folder.url)
            with suppress(Exception):
                system.rm(f"{root}/{self.prefix.rstrip('/')}", recursive=True)

    def _forget(self, keep: str) -> None:
        """Delete the generations before, once nothing names them."""
        if not isinstance(self.folder, RemoteFolder):
            return
        system, root = file_system(self.folder.url)
        with suppress(Exception):
            for one in system.ls(root, detail=False):
                name = str(one).rstrip("/").rpartition("/")[2]
                if name.startswith("g-") and name != keep:
                    system.rm(one, recursive=True)


def writing(path: Any) -> Writing:
    """Begin to write a checkpoint folder.

    Raises:
        CheckpointError: Something else lies at the path.
    """
    if not is_url(path):
        aside = begin(Path(path))
        aside.part.mkdir()
        return Writing(LocalFolder(aside.part), "", aside)
    system, root = file_system(path)
    names = []
    with suppress(FileNotFoundError):
        system.invalidate_cache()
        names = [str(one).rstrip("/").rpartition("/")[2] for one in system.ls(root, detail=False)]
    if system.isfile(root) or (names and MANIFEST not in names and not all(one.startswith("g-") for one in names)):
        raise CheckpointError(
            "what lies at the path is no checkpoint, and is not replaced",
            where=str(path),
            got=", ".join(sorted(names)[:5]) or "a file",
            instead="another path, or delete it first",
        )
    prefix = f"g-{uuid.uuid4().hex[:16]}/"
    with suppress(NotImplementedError, FileExistsError):
        system.makedirs(f"{root}/{prefix}")  # a name that nobody has
    return Writing(RemoteFolder(str(path)), prefix, None)


def folder_at(path: Any) -> Folder:
    """Give the folder of a checkpoint that is to be read."""
    return RemoteFolder(str(path)) if is_url(path) else LocalFolder(found(Path(path)))


def has_manifest(path: Any) -> bool:
    """Say whether a folder has a manifest; never raises."""
    try:
        if not is_url(path):
            return is_regular(found(Path(path)) / MANIFEST)
        system, root = file_system(path)
        return bool(system.isfile(f"{root}/{MANIFEST}"))
    except Exception:  # noqa: BLE001 - whatever a file system raises, there is none to be seen
        return False


def is_url(path: Any) -> bool:
    """Say whether a path is the text of a URL."""
    return isinstance(path, str) and "://" in path


def file_system(url: str) -> tuple[Any, str]:
    """Give the file system of a URL, and the path in it.

    Raises:
        NotInstalledError: ``fsspec``, or the package for that protocol, isn't installed.
    """
    protocol = url.partition("://")[0]
    try:
        import fsspec
        from fsspec.core import url_to_fs
    except ImportError as error:
        raise NotInstalledError(
            "URLs need the package fsspec", where=url, instead='pip install "fabric-registry[remote]"'
        ) from error
    try:
        fsspec.get_filesystem_class(protocol)
    except (ImportError, ValueError) as error:
        raise NotInstalledError(
            f"nothing is installed that knows {protocol}://", where=url, got=str(error), instead="install it with pip"
        ) from error
    system, root = url_to_fs(url)
    return system, str(root).rstrip("/")


def upload(file: Path, url: str) -> None:
    """Send a whole file, which replaces what is there only once all of it has come.

    An open file of ``fsspec`` would end what was sent when it is closed, after a failure too.
    """
    system, root = file_system(url)
    system.put_file(str(file), root)


def refuse_foreign(url: str) -> None:
    """Refuse to replace what is no checkpoint in one file.

    Raises:
        CheckpointError: Something else lies there.
    """
    system, root = file_system(url)
    system.invalidate_cache()
    if not system.exists(root):
        return
    if system.isfile(root):
        with system.open(root, "rb") as file:
            start = file.read(START)
        if not start or begins_as_checkpoint(start):
            return
    raise CheckpointError(
        "what lies at the path is no checkpoint, and is not replaced",
        where=url,
        got="a file that is none" if system.isfile(root) else "a folder",
        instead="another path, or delete it first",
    )


def names_beside(path: Any) -> list[str]:
    """List the names in the folder of a path or URL; none where there is no folder.

    Raises:
        CheckpointError: It can't be listed.
    """
    with reported("the folder can't be listed", path):
        try:
            if not is_url(path):
                return sorted(os.listdir(Path(path).parent))  # noqa: PTH208 - the names alone
            system, root = file_system(path)
            system.invalidate_cache()
            listed = system.ls(root.rpartition("/")[0], detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted({str(one).rstrip("/").rpartition("/")[2] for one in listed})


def read_small(folder: Folder, name: str) -> bytes:
    """Read a file that holds no tensors.

    Raises:
        CheckpointError: It is larger than such a file can be.
    """
    with folder.open(name) as file:
        data = file.read(_LIMIT + 1)
    if len(data) > _LIMIT:
        raise CheckpointError("the file is too large for what it is", where=folder.where(name))
    return data


def kind_of(path: Any) -> str | None:
    """Give the format that the manifest in a folder says it is of; ``None`` where it can't be read. Never raises."""
    try:
        return str(json.loads(read_small(folder_at(path), MANIFEST))["manifest"]["format"])
    except Exception:  # noqa: BLE001 - a damaged manifest is for whoever reads it to refuse
        return None


@contextmanager
def downloaded(path: Any) -> Iterator[Path]:
    """Give a local path to read a single file from; what had to be fetched goes at the end."""
    if not is_url(path):
        yield found(Path(path))
        return
    system, root = file_system(path)
    with tempfile.TemporaryDirectory(prefix="fabric-") as folder:
        local = Path(folder) / "file"
        with system.open(root, "rb") as there, local.open("wb") as here:
            shutil.copyfileobj(there, here, _PART)
        yield local


def remove(path: Any, recognised: bool) -> None:
    """Delete a checkpoint: first what makes it one, so that a half-deleted one is none.

    Raises:
        CheckpointError: There is none, or it can't be deleted.
    """
    if not recognised:
        raise CheckpointError("there is no checkpoint of this format to delete", where=str(path))
    with reported("the checkpoint can't be deleted", path):
        if is_url(path):
            system, root = file_system(path)
            if system.isfile(f"{root}/{MANIFEST}"):
                system.rm_file(f"{root}/{MANIFEST}")
            system.rm(root, recursive=True)
            return
        local = found(Path(path))
        if local.is_dir():
            (local / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(local)
        else:
            local.unlink()
