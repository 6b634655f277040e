"""When a request can't be done: the nearest requests that can, found by trying them."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from fabric_core.choosing.request import Request
from fabric_core.choosing.resolve import Candidate, resolve
from fabric_core.errors import FabricError

__all__ = ["alternatives"]

_SHOWN: Final = 2
"""How many proposals there are at most for each argument."""

_ALL_SHOWN: Final = 4

_KINDS: Final = ("strategy", "precision", "accelerator")


@dataclass(frozen=True)
class _Change:
    """A change of a request: what to write, and what then differs."""

    text: str
    devices: Any = None
    num_nodes: int | None = None
    swap: Mapping[str, Sequence[Candidate]] = field(default_factory=dict)

    def touches(self) -> set[str]:
        given = {"devices": self.devices, "num_nodes": self.num_nodes}
        return {name for name, value in given.items() if value is not None} | self.swap.keys()

    def __and__(self, other: "_Change") -> "_Change":
        return _Change(
            f"{self.text} with {other.text}",
            self.devices or other.devices,
            self.num_nodes or other.num_nodes,
            {**self.swap, **other.swap},
        )


def alternatives(
    request: Request, candidates: Mapping[str, Sequence[Candidate]], offered: Mapping[str, Sequence[Candidate]]
) -> list[str]:
    """Find the nearest requests that work: those that change one argument, else those that change two.

    Args:
        request: What was asked for, and can't be done.
        candidates: What it was resolved from.
        offered: For each kind what could be named instead, the highest priority first.

    Returns:
        Each as the arguments to write instead, such as ``strategy="name"``; at most two for each argument, four in all.
    """
    changes = list(_changes(request, candidates, offered))
    pairs = [one & other for one, other in itertools.combinations(changes, 2) if not (one.touches() & other.touches())]
    found: dict[str, list[str]] = {}
    for tried in (changes, pairs):
        for change in tried:
            texts = found.setdefault(change.text.partition("=")[0], [])
            if len(texts) < _SHOWN and _works(request, change, candidates):
                texts.append(change.text)
        if any(found.values()):
            break
    return [text for texts in found.values() for text in texts][:_ALL_SHOWN]


def _changes(
    request: Request, candidates: Mapping[str, Sequence[Candidate]], offered: Mapping[str, Sequence[Candidate]]
) -> Iterator[_Change]:
    for kind in _KINDS:
        asked = {one.name for one in candidates[kind] if one.named}
        for one in offered.get(kind, ()) if asked else ():
            if one.name not in asked:
                yield _Change(f'{kind}="{one.name}"', swap={kind: [one]})
    for count in (1, 2):
        if count != request.devices:
            yield _Change(f"devices={count}", devices=count)
    if request.num_nodes > 1:
        yield _Change("num_nodes=1", num_nodes=1)
    wrappers = candidates.get("wrapper", ())
    for index, wrapper in enumerate(wrappers):
        rest = [one for position, one in enumerate(wrappers) if position != index]
        yield _Change(f"wrappers without {wrapper.name!r}", swap={"wrapper": rest})


def _works(request: Request, change: _Change, candidates: Mapping[str, Sequence[Candidate]]) -> bool:
    devices = request.devices if change.devices is None else change.devices
    changed = request.with_devices(devices, change.num_nodes or request.num_nodes)
    try:
        resolve(changed, {**candidates, **change.swap})
    except FabricError:
        return False
    return True
