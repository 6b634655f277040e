"""What a checkpoint says about itself, as JSON with a checksum of its own."""

import json
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from fabric_core.errors import CheckpointError
from fabric_plugins.checkpoints._files import MANIFEST, open_regular

__all__ = ["VERSION", "checked_name", "checksum", "decode", "encode", "field", "read_names"]

VERSION: Final = 1
"""The version of the format of checkpoints; it grows when an older reader would misread a newer one."""
_LIMIT: Final = 1 << 30
"""The largest manifest, in bytes, that is read."""
_NAME: Final = re.compile(r"(g-[0-9a-f]{16}/)?[A-Za-z0-9_.][A-Za-z0-9_.-]{0,200}")


def checksum(data: Any) -> str:
    """Give the checksum of bytes: CRC-32, the one that zip archives have too, as eight hexadecimal digits."""
    return f"{zlib.crc32(data):08x}"


def encode(body: Mapping[str, Any]) -> bytes:
    """Write a manifest."""
    text = _canonical(body)
    return json.dumps({"checksum": checksum(text), "manifest": body}, indent=1).encode()


def decode(data: bytes, where: object, kind: str) -> dict[str, Any]:
    """Read a manifest.

    Args:
        data: The bytes.
        where: The file, for messages.
        kind: The format that it must be of.

    Raises:
        CheckpointError: It is damaged, or of another format or a newer version.
    """
    try:
        outer = json.loads(data)
        body, stored = outer["manifest"], outer["checksum"]
        sound = isinstance(body, dict) and checksum(_canonical(body)) == stored
    except (ValueError, TypeError, KeyError, RecursionError, MemoryError) as error:
        raise CheckpointError("the manifest is damaged", where=str(where), got=_line(error)) from error
    if not sound:
        raise CheckpointError("the manifest is damaged: its checksum is another one", where=str(where))
    version = field(body, "version", int, where)
    if version > VERSION:
        raise CheckpointError(
            "the checkpoint was written by a newer version of this package",
            where=str(where),
            got=f"version {version} of the format; this package reads up to {VERSION}",
            instead="pip install --upgrade fabric-registry",
        )
    if field(body, "format", str, where) != kind:
        raise CheckpointError("the checkpoint is of another format", where=str(where), got=body["format"], instead=kind)
    result: dict[str, Any] = body
    return result


def field(body: Any, name: str, kind: type | tuple[type, ...], where: object) -> Any:
    """Give a field of a manifest.

    Raises:
        CheckpointError: It is absent, or of another type.
    """
    value = body.get(name) if isinstance(body, Mapping) else None
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is int):
        raise CheckpointError("the manifest is damaged", where=f"{where}, field {name!r}", got=repr(value)[:80])
    return value


def checked_name(name: Any, where: object) -> str:
    """Give the name of a file in the checkpoint's own folder.

    Raises:
        CheckpointError: It leads elsewhere.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name) or ".." in name:
        raise CheckpointError("the manifest names a file outside of its checkpoint", where=str(where), got=repr(name))
    return name


def read_names(folder: Path) -> set[str]:
    """Give the names of the files that the manifest in a folder lists; none where it can't be read."""
    try:
        with open_regular(folder / MANIFEST) as file:
            body = json.loads(file.read(_LIMIT))["manifest"]
        return {name.partition("/")[0] for name in body["files"] if isinstance(name, str)}
    except (OSError, ValueError, TypeError, KeyError, CheckpointError, RecursionError):
        return set()


def _canonical(body: Any) -> bytes:
    return json.dumps(body, sort_keys=True, separators=(",", ":")).encode()


def _line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
