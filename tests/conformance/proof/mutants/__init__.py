"""Deliberately wrong plugins: each changes one thing of a reference, and names the rules that must catch it.

[Note: the law] For each mutant the set of rules that it fails is exactly its row in ``rows.json``, which
``python -m proof.matrix --accept`` writes anew and a review compares; and it fails each rule that is named at it, for
which it was written. The references fail none. A rule of the level MUST that no mutant fails is published as UNPROVEN.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Final, TypeVar

from fabric_core.conformance.subject import Subject
from fabric_core.contracts import Plugin

__all__ = ["ROWS", "Mutant", "Mutants", "rows"]

P = TypeVar("P", bound=type[Plugin])


@dataclass(frozen=True)
class Mutant:
    """A wrong plugin.

    Args:
        subject: Where it lies.
        what: What is wrong with it.
        named: The rules that it was written for.
    """

    subject: Subject
    what: str
    named: frozenset[str] = field(default_factory=frozenset)

    @property
    def fails(self) -> frozenset[str]:
        """The rules that it fails."""
        return frozenset(rows().get(self.subject.value, self.named))

    @property
    def name(self) -> str:
        """The name of its class."""
        return self.subject.value.partition(":")[2]


ROWS: Final = Path(__file__).parents[1] / "rows.json"
"""For each mutant's place the rules that it fails."""


@cache
def rows() -> dict[str, list[str]]:
    """Read the rows; a mutant without one fails what is named at it."""
    found: dict[str, list[str]] = json.loads(ROWS.read_text(encoding="utf-8")) if ROWS.exists() else {}
    return found


class Mutants:
    """A list of mutants of one kind of plugins."""

    def __init__(self) -> None:
        self.found: list[Mutant] = []

    def mutant(
        self,
        what: str,
        *fails: str,
        name: str | None = None,
        options: Mapping[str, Any] | None = None,
        auto: int | None = None,
    ) -> Callable[[P], P]:
        """Write a mutant into the list; decorates its class.

        Args:
            what: What is wrong with it.
            fails: The rules that it fails.
            name: The name that it is offered under; its class's by default.
            options: The options that it is made with.
            auto: Its priority in automatic choice.
        """

        def write(cls: P) -> P:
            if cls.__doc__ is None:
                cls.__doc__ = what
            value = f"{cls.__module__}:{cls.__qualname__}"
            subject = Subject(cls.kind, name or cls.__name__, value, options=dict(options or {}), auto=auto)
            self.found.append(Mutant(subject, what, frozenset(fails)))
            return cls

        return write

    def elsewhere(self, kind: str, value: str, what: str, *fails: str) -> None:
        """Write a mutant into the list whose module must not be imported before its turn."""
        self.found.append(Mutant(Subject(kind, value.partition(":")[2], value), what, frozenset(fails)))
