"""What was seen of changes that nobody chose: which of them something noticed, and which to judge next."""

import argparse
import json
import random
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

__all__ = ["Record", "add_choices"]


class Record:
    """What was seen so far; without changes whose place is gone from the sources.

    Args:
        path: The file that keeps it.
        keys: The keys of all changes that there are.
        equivalent: Those that make no difference that anything could notice, each with the reason.
    """

    def __init__(self, path: Path, keys: Sequence[str], equivalent: Mapping[str, str]) -> None:
        self._path, self._keys, self._reasons = path, keys, equivalent
        stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        there = set(keys)
        self.seen: dict[str, str | None] = {key: noticed for key, noticed in stored.items() if key in there}
        """For each change's key what noticed it, or ``None``."""

    def save(self) -> None:
        """Write the record."""
        self._path.write_text(json.dumps(self.seen, indent=0, sort_keys=True) + "\n", encoding="utf-8")

    @property
    def noticed(self) -> int:
        """How many changes were noticed."""
        return sum(one is not None for one in self.seen.values())

    @property
    def survivors(self) -> list[str]:
        """The changes that nothing noticed, and that something could have noticed."""
        return sorted(key for key, one in self.seen.items() if one is None and key not in self._reasons)

    @property
    def equivalent(self) -> list[str]:
        """The changes that nothing noticed, and that nothing could notice."""
        return sorted(key for key, one in self.seen.items() if one is None and key in self._reasons)

    @property
    def score(self) -> float:
        """The part of those that aren't equivalent that was noticed."""
        return self.noticed / max(1, self.noticed + len(self.survivors))

    def choose(self, given: argparse.Namespace) -> list[int]:
        """Give the places, among all changes, of those that the options of ``add_choices`` ask for."""
        indices = list(range(len(self._keys)))
        if given.only:
            indices = [index for index in indices if any(text in self._keys[index] for text in given.only)]
        if given.survivors:
            survivors = set(self.survivors)
            indices = [index for index in indices if self._keys[index] in survivors]
        if given.new:
            indices = [index for index in indices if self._keys[index] not in self.seen]
        if given.sample is not None:
            random.Random(given.seed).shuffle(indices)  # noqa: S311 - a choice of changes
            indices = indices[: given.sample]
        return indices


def add_choices(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which changes are judged, and whether what is seen is kept."""
    parser.add_argument("--sample", type=int, help="how many to judge; all by default")
    parser.add_argument(
        "--seed", type=int, default=int(time.time()), help="of the sample; another each time by default"
    )
    parser.add_argument("--only", nargs="*", help="those whose key holds one of these texts")
    parser.add_argument("--new", action="store_true", help="those that were never judged")
    parser.add_argument("--survivors", action="store_true", help="those that survived")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--record", action="store_true", help="add what is seen to the record")
