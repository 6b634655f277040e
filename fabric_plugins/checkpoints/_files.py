"""Local files: written aside, flushed, and put in place in one step that no kill can cut in two.

[Note: replacing] What is to be replaced and what replaces it exchange their names in one step where the system can do
that (Linux), and the old one is deleted after. Elsewhere, or on a file system that can't, the old one gets a name of
its own for a moment; a process that is killed just then leaves nothing at the path, so whoever loads or saves next
looks for that name too.

[Note: names aside] Beside ``step-100`` lies ``.fabric-<digest of the name>-<host>-<process>-<number>.part`` while it is
written: of one length, whatever the name's, and telling who writes it, so that the next save to the same path can
delete what a killed process left, and nothing that a living one still writes.
"""

import ctypes
import errno
import hashlib
import itertools
import os
import re
import shutil
import stat
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final
from uuid import getnode

from fabric_core.errors import CheckpointError

__all__ = [
    "MANIFEST",
    "START",
    "Aside",
    "begin",
    "begins_as_checkpoint",
    "flush",
    "found",
    "is_regular",
    "is_torch_file",
    "open_regular",
    "reported",
]

_EXCHANGE: Final = 2
"""``RENAME_EXCHANGE`` of Linux's ``renameat2``."""
_HERE: Final = -100
"""``AT_FDCWD``: paths are relative to the working directory."""
_FOREIGN_AGE: Final = 24 * 60 * 60
"""Seconds after which what another machine left is taken for abandoned: nobody here can ask whether it is alive."""
_HOST: Final = f"{getnode() & 0xFFFFFFFF:08x}"
_ASIDE: Final = re.compile(r"\.fabric-([0-9a-f]{16})-([0-9a-f]{8})-(\d+)-(\d+)\.(part|old)")
_OURS: Final = re.compile(r"__\d+_\d+\.distcp|model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json")

MANIFEST: Final = "fabric.json"
"""The file that makes a folder a checkpoint; it is written last."""
START: Final = 512
"""How many bytes of a file tell what it is: ``torch.save`` puts its name there, which may have 255."""

_numbers = itertools.count()
_active: set[str] = set()
"""The names aside that this process writes to right now."""


@contextmanager
def reported(what: str, path: object, instead: str | None = None) -> Iterator[None]:
    """Turn whatever is raised into a ``CheckpointError`` that names the path."""
    try:
        yield
    except CheckpointError:
        raise
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{what}: there is no checkpoint, or only a part of one",
            where=str(path),
            got=_first_line(error),
            instead=instead,
        ) from error
    except (Exception, RecursionError) as error:
        raise CheckpointError(f"{what}: {_first_line(error)}", where=str(path), instead=instead) from error


def _first_line(error: BaseException) -> str:
    line = next(iter(str(error).strip().splitlines()), "")
    return line if isinstance(error, OSError) and line else f"{type(error).__name__}: {line}".rstrip(": ")


def is_regular(path: Path) -> bool:
    """Say whether a regular file lies there; a pipe or a device, which could keep a reader waiting, is none."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except (OSError, ValueError):
        return False


def open_regular(path: Path, *, follow: bool = True) -> IO[bytes]:
    """Open a regular file for reading.

    Raises:
        CheckpointError: It is a pipe, a device or a folder, or a link where ``follow`` is false.
        OSError: It is absent, or can't be read.
    """
    mode = (path.stat() if follow else path.lstat()).st_mode
    if not stat.S_ISREG(mode):
        kind = next((name for name, test in _KINDS if test(mode)), "no file")
        raise CheckpointError("a checkpoint holds regular files alone", where=str(path), got=kind)
    return path.open("rb")


_KINDS: Final[tuple[tuple[str, Callable[[int], bool]], ...]] = (
    ("a folder", stat.S_ISDIR),
    ("a link", stat.S_ISLNK),
    ("a pipe", stat.S_ISFIFO),
    ("a socket", stat.S_ISSOCK),
    ("a device", lambda mode: stat.S_ISCHR(mode) or stat.S_ISBLK(mode)),
)


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some file systems don't flush folders; their names are as safe as they get.
        if not (path.is_dir() and error.errno in {errno.EINVAL, errno.ENOTSUP, errno.EBADF}):
            raise
    finally:
        os.close(handle)


@dataclass(frozen=True)
class Aside:
    """A place to write at, beside the path that it will take the name of."""

    path: Path
    """What is to be written."""
    part: Path
    """Where it is written meanwhile: a file or a folder, which doesn't exist yet."""

    def commit(self) -> None:
        """Put what was written in place, and delete what it replaces; it must be flushed already.

        Raises:
            OSError: It can't; then what lay there before is still there.
        """
        kept = _foreign(self.path)
        for name in kept:
            _link(self.path / name, self.part / name)
        if self.part.is_dir():
            flush(self.part)
        if not os.path.lexists(self.path) or _same_kind_of_file(self.part, self.path):
            self.part.replace(self.path)
        elif _exchange(self.part, self.path):
            flush(self.path.parent)
            _delete(self.part)
        else:
            self._step_by_step()
        with suppress(OSError):
            flush(self.path.parent)
        _active.discard(self.part.name)

    def _step_by_step(self) -> None:
        old = self.part.with_suffix(".old")
        self.path.rename(old)
        try:
            self.part.rename(self.path)
        except OSError:
            old.rename(self.path)
            raise
        flush(self.path.parent)
        _delete(old)

    def abort(self) -> None:
        """Delete what was written."""
        with suppress(OSError):
            _delete(self.part)
        _active.discard(self.part.name)


def begin(path: Path) -> Aside:
    """Look whether a checkpoint may be written to a path, and give a place aside.

    Raises:
        CheckpointError: The path is none, or something lies there that is no checkpoint.
        OSError: The folder can't be made.
    """
    path = _checked(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not os.path.lexists(path):
        lost = _lost(path)
        if lost is not None:
            lost.rename(path)
    _refuse_foreign(path)
    _sweep(path)
    name = f".fabric-{_digest(path.name)}-{_HOST}-{os.getpid()}-{next(_numbers)}.part"
    _active.add(name)
    return Aside(path, path.with_name(name))


def found(path: Path) -> Path:
    """Give where a checkpoint lies: at its path, or at the name that a killed process left it ([Note: replacing])."""
    try:
        if os.path.lexists(path):
            return path
        return _lost(_checked(path)) or path
    except (OSError, ValueError, CheckpointError):
        return path


def _checked(path: Path) -> Path:
    """Follow links, and refuse what is no name of a file."""
    text = str(path)
    if "\0" in text or path.name in {"", ".."} or text == ".":
        raise CheckpointError("the path names no file or folder to write", where=repr(text), instead='"checkpoint.pt"')
    limit = 255
    if len(os.fsencode(path.name)) > limit:
        raise CheckpointError(
            f"the name is longer than the {limit} bytes that file systems take",
            where=str(path),
            got=f"{len(os.fsencode(path.name))} bytes",
            instead="a shorter name",
        )
    return Path(os.path.realpath(path))


def _refuse_foreign(path: Path) -> None:
    """Refuse to replace what is no checkpoint; an empty file or folder may be."""
    if not os.path.lexists(path):
        return
    if path.is_dir():
        names = [one.name for one in path.iterdir()]
        good = not names or is_regular(path / MANIFEST)
        got = f"a folder with {', '.join(sorted(names)[:5])}"
    else:
        good = is_regular(path) and (path.stat().st_size == 0 or _is_checkpoint_file(path))
        got = "a file that is none" if is_regular(path) else "no regular file"
    if not good:
        raise CheckpointError(
            "what lies at the path is no checkpoint, and is not replaced",
            where=str(path),
            got=got,
            instead="another path, or delete it first",
        )


def _is_checkpoint_file(path: Path) -> bool:
    with open_regular(path) as file:
        return begins_as_checkpoint(file.read(START))


def begins_as_checkpoint(start: bytes) -> bool:
    """Know a file of ``torch.save`` or of safetensors by its first bytes, damaged or not."""
    return is_torch_file(start) or start[8:9] == b"{" or start[:2] == b"\x80\x02"


def is_torch_file(start: bytes) -> bool:
    """Know a file of ``torch.save`` by its first bytes."""
    return start[:4] == b"PK\x03\x04" and b"/data.pkl" in start


def _foreign(path: Path) -> list[str]:
    """Give the names in a folder that the checkpoint there did not write, which outlive it."""
    if not path.is_dir():
        return []
    from fabric_plugins.checkpoints._manifest import read_names

    own = {MANIFEST, ".metadata", "fabric.pt", *read_names(path)}
    return [one.name for one in path.iterdir() if one.name not in own and not _OURS.fullmatch(one.name)]


def _link(there: Path, here: Path) -> None:
    """Let a file, or all files of a folder, be found under a second name."""
    if there.is_dir() and not there.is_symlink():
        here.mkdir()
        for one in there.iterdir():
            _link(one, here / one.name)
        return
    try:
        os.link(there, here, follow_symlinks=False)
    except OSError:
        shutil.copy2(there, here, follow_symlinks=False)
        flush(here)


def _same_kind_of_file(one: Path, other: Path) -> bool:
    """Say whether one may take the other's name by ``rename`` alone: a file a file's, a folder an empty folder's."""
    if one.is_dir() and other.is_dir() and not other.is_symlink():
        return not any(other.iterdir())
    return not one.is_dir() and not other.is_dir()


def _exchange(one: Path, other: Path) -> bool:
    """Let two paths exchange their names in one step; false where the system or the file system can't."""
    if sys.platform != "linux":
        return False
    try:
        rename: Any = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    if rename(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP}:
        return False
    raise OSError(code, os.strerror(code), str(one), None, str(other))


def _digest(name: str) -> str:
    return hashlib.sha256(os.fsencode(name)).hexdigest()[:16]


def _beside(path: Path) -> Iterator[tuple[Path, re.Match[str]]]:
    """Give what was written aside for a path, whoever did."""
    digest = _digest(path.name)
    if not path.parent.is_dir():
        return
    for one in path.parent.iterdir():
        match = _ASIDE.fullmatch(one.name)
        if match is not None and match[1] == digest:
            yield one, match


def _lost(path: Path) -> Path | None:
    """Give what was at the path when its writer was killed between two names; the newest, if there are several."""
    olds = [one for one, match in _beside(path) if match[5] == "old"]
    return max(olds, key=lambda one: one.stat().st_mtime, default=None)


def _sweep(path: Path) -> None:
    """Delete what killed processes left aside for a path."""
    for one, match in list(_beside(path)):
        if one.name not in _active and not _writes_still(one, match[2], int(match[3])):
            with suppress(OSError):
                _delete(one)


def _writes_still(one: Path, host: str, process: int) -> bool:
    if host != _HOST:
        with suppress(OSError):
            return time.time() - one.lstat().st_mtime < _FOREIGN_AGE
        return True
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
