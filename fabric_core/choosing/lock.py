"""Which code may run: the distributions of plugins as they were when a lock file was written.

[Note: what a lock vouches for] Of each distribution the lock has the version, what it offers, and the digest of its
``RECORD``, in which the installer wrote the hash of every file; the files are compared with it. What ``RECORD`` doesn't
vouch for has a hash in the lock itself: the source tree of an editable install, files without a hash, and files that
lie in the distribution's packages and aren't its own. Where a module would be imported from is found as Python would
find it, without importing anything, so that one of the same name that lies earlier on the path is such a file too. Left
out is what differs between two installations of one wheel: bytecode, and what the installer adds for itself.
"""

import csv
import hashlib
import os
import sys
from base64 import urlsafe_b64encode
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from importlib.machinery import EXTENSION_SUFFIXES, SOURCE_SUFFIXES, ModuleSpec
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from fabric_core.choosing.offers import Offer, canonical, same
from fabric_core.errors import LockError

__all__ = ["Lock", "Locked", "lock_offers"]

_INSTALLERS_OWN: Final = frozenset({"RECORD", "INSTALLER", "REQUESTED", "direct_url.json", "uv_cache.json"})
_STRONG: Final = frozenset({"sha256", "sha384", "sha512"})
_IMPORTABLE: Final = (*SOURCE_SUFFIXES, *EXTENSION_SUFFIXES, ".pyc")
_SHOWN: Final = 5
"""How many differences a message names."""


class Locked(BaseModel):
    """A distribution as a lock has it ([Note: what a lock vouches for]).

    Args:
        name: Its name.
        version: Its version.
        record: The SHA-256 of its ``RECORD``; ``None`` where the installer wrote none.
        plugins: What it offers: ``kind/name``, and where that lies.
        files: The SHA-256 of the files that ``RECORD`` doesn't vouch for.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    name: str
    version: str
    record: str | None
    plugins: dict[str, str]
    files: dict[str, str]


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    lock: Literal[1]
    distributions: list[Locked]


@dataclass
class Lock:
    """The distributions whose plugins may run; everything else is refused before it is imported.

    Args:
        path: Where it was read from.
        distributions: What it has.
    """

    path: str
    distributions: tuple[Locked, ...]
    _sound: set[str] = field(default_factory=set, repr=False)

    @classmethod
    def read(cls, path: str) -> "Lock":
        """Read a lock file.

        Raises:
            LockError: There is none, or it is damaged.
        """
        where = path.replace("\0", "\\0")
        instead = f"fabric-core plugins lock {where}"
        try:
            data = Path(path).read_bytes()
        except (OSError, ValueError) as error:  # a name with a null byte is a ValueError
            raise LockError("the lock file can't be read", where=where, got=str(error), instead=instead) from error
        try:
            found = _File.model_validate_json(data)
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False, include_input=False)[0]
            place = ".".join(map(str, first["loc"]))
            raise LockError(
                "the lock file is damaged", where=where, got=f"{place}: {first['msg']}".lstrip(": "), instead=instead
            ) from error
        names = [canonical(one.name) for one in found.distributions]
        if len(set(names)) < len(names):
            raise LockError("the lock file has a distribution twice", where=where, got=", ".join(sorted(names)))
        return cls(path, tuple(found.distributions))

    def write(self) -> None:
        """Write it to its path, whole or not at all."""
        aside = Path(f"{self.path}.new")
        text = _File(lock=1, distributions=[*self.distributions]).model_dump_json(indent=2)
        try:
            aside.write_text(f"{text}\n", "utf-8")
            aside.replace(self.path)
        finally:
            aside.unlink(missing_ok=True)

    def refuse(self, offer: Offer) -> None:
        """Refuse an offer that isn't, file for file, what the lock has; imports nothing.

        Raises:
            LockError: It differs; it says in what.
        """
        locked = next((one for one in self.distributions if same(one.name, offer.distribution)), None)
        if locked is None:
            differences = [f"the lock has no distribution {offer.distribution}"]
        else:
            differences = self._differences(locked, offer)
        if differences:
            more = len(differences) - _SHOWN
            raise LockError(
                f"the {offer.kind} {offer.name!r} of {offer.owner} may not run: {differences[0]}",
                where=self.path,
                got="; ".join(differences[:_SHOWN]) + (f"; and {more} more" if more > 0 else ""),
                instead=f"install what the lock has, uninstall {offer.distribution} or put it into "
                f"FABRIC_DISABLE_PLUGINS; or, if this is meant: fabric-core plugins lock {self.path}",
                offer=offer,
                differences=differences,
            )

    def _differences(self, locked: Locked, offer: Offer) -> list[str]:
        key = f"{offer.kind}/{offer.name}"
        if locked.version != offer.version:
            return [f"its version is {offer.version}, and the lock has {locked.version}"]
        if key not in locked.plugins:
            return [f"the lock has no {offer.kind} {offer.name!r} of it"]
        if locked.plugins[key] != offer.value:
            return [f"it lies at {offer.value}, and in the lock at {locked.plugins[key]}"]
        if locked.name in self._sound:
            return []
        differences = [*compare(locked, _look(offer.distribution, locked.plugins.values()))]
        if not differences:
            self._sound.add(locked.name)
        return differences


@dataclass
class _Look:
    """A distribution as it lies here."""

    version: str
    record: str | None = None
    files: dict[str, str] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)


def lock_offers(path: str, offers: Iterable[Offer]) -> Lock:
    """Make the lock of offers as they lie here; imports none of them.

    Raises:
        LockError: A file is not what the installer wrote.
    """
    owners: dict[str, list[Offer]] = {}
    for offer in offers:
        owners.setdefault(offer.distribution, []).append(offer)
    locked = []
    for name, own in sorted(owners.items()):
        look = _look(name, [offer.value for offer in own])
        if look.wrong:
            raise LockError(
                f"{name} {look.version} is not as its installer wrote it", where=path, got="; ".join(look.wrong),
                instead=f"pip install --force-reinstall --no-deps {name}=={look.version}", differences=look.wrong,
            )  # fmt: skip
        plugins = {f"{offer.kind}/{offer.name}": offer.value for offer in own}
        locked.append(Locked(name=name, version=look.version, record=look.record, plugins=plugins, files=look.files))
    return Lock(path, tuple(locked))


def compare(locked: Locked, look: _Look) -> Iterator[str]:
    """Say in what a distribution as it lies here differs from what the lock has."""
    if look.version != locked.version:
        yield f"its version is {look.version}, and the lock has {locked.version}"
    yield from look.wrong
    for name in sorted(look.files.keys() | locked.files.keys()):
        if name not in locked.files:
            yield f"{name} is no file of the distribution, and would be imported"
        elif name not in look.files:
            yield f"{name} is missing"
        elif look.files[name] != locked.files[name]:
            yield f"{name} was changed"
    if look.record != locked.record:
        yield "its RECORD names other files or hashes than the lock's"


def _look(name: str, values: Iterable[str]) -> _Look:
    """Look at a distribution: at ``RECORD``, at its files, and at where its plugins would be imported from."""
    try:
        found = distribution(name)
    except (PackageNotFoundError, ValueError):
        return _Look("(not installed)")
    look = _Look(found.version)
    try:
        vouched = _read_record(found, look)
    except (csv.Error, ValueError) as error:  # bytes that are no text, and null bytes in a path, are ValueErrors
        look.wrong.append(f"its RECORD is damaged: {error}")
        return look
    modules = {value.partition(":")[0].strip() for value in values}
    tops = {*(found.read_text("top_level.txt") or "").split(), *(module.partition(".")[0] for module in modules)}
    for file, shown in _importable(modules, tops):
        if file not in vouched:
            look.files[shown] = _hash(file) or "(unreadable)"
    return look


def _read_record(found: Distribution, look: _Look) -> set[str]:
    """Compare the files with ``RECORD``; gives the paths that it vouches for, or that the look has a hash of."""
    text = found.read_text("RECORD")
    if text is None:
        return set()
    kept, vouched = [], set()
    for row in csv.reader(text.splitlines()):
        name, given = [*row, "", ""][:2]
        ours = name.endswith(".pyc") or name.startswith(("..", "/"))
        if not name or ours or name.rpartition("/")[2] in _INSTALLERS_OWN:
            continue
        kept.append(f"{name},{given}")
        path = os.path.realpath(str(found.locate_file(name)))
        algorithm, _, expected = given.partition("=")
        if algorithm not in _STRONG:
            continue
        vouched.add(path)
        actual = _hash(path, algorithm)
        if actual is None:
            look.wrong.append(f"{name} is missing")
        elif urlsafe_b64encode(bytes.fromhex(actual)).rstrip(b"=").decode() != expected:
            look.wrong.append(f"{name} was changed")
    look.record = hashlib.sha256("\n".join(sorted(kept)).encode()).hexdigest()
    return vouched


def _importable(modules: Iterable[str], tops: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Give the files that an import of modules could run: each with a name for messages.

    Those are all below the regular packages that the modules lie in, and below those of ``tops``.
    """
    folders: dict[str, str] = {}
    for module in sorted({*modules, *tops}):
        for level, spec in _specs(module):
            if not spec.has_location or spec.origin is None:
                continue  # a namespace package runs nothing, and belongs to several distributions
            if spec.submodule_search_locations is None:
                yield os.path.realpath(spec.origin), level.replace(".", "/") + Path(spec.origin).suffix
            for place in map(os.path.realpath, spec.submodule_search_locations or ()):
                if not any(place.startswith(f"{folder}{os.sep}") for folder in folders):
                    folders.setdefault(place, level.replace(".", "/"))
    for folder, shown in folders.items():
        for path in _below(folder):
            yield os.path.realpath(path), f"{shown}{path.removeprefix(folder)}".replace(os.sep, "/")


def _below(folder: str) -> Iterator[str]:
    for above, below, names in os.walk(folder):
        below[:] = sorted(one for one in below if one != "__pycache__")
        yield from (f"{above}{os.sep}{name}" for name in sorted(names) if name.endswith(_IMPORTABLE))


def _specs(module: str) -> Iterator[tuple[str, ModuleSpec]]:
    """Find a module and the packages that it lies in, as an import would, but run none of them."""
    parts, path = module.split("."), None
    if not all(part.isidentifier() for part in parts):
        return
    for count in range(1, len(parts) + 1):
        name = ".".join(parts[:count])
        # What is imported already is what would be used.
        spec = getattr(sys.modules.get(name), "__spec__", None) or next(
            filter(None, (finder.find_spec(name, path) for finder in sys.meta_path)), None
        )
        if spec is None:
            return
        yield name, spec
        if spec.submodule_search_locations is None:
            return
        path = list(spec.submodule_search_locations)


def _hash(path: str, algorithm: str = "sha256") -> str | None:
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, algorithm).hexdigest()
    except OSError:
        return None
