"""What a rule is, and the table that rules are written into."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

__all__ = ["Broken", "Level", "Rule", "Table", "without_kit"]

_SINGLE = (1,)
_KIT: Final = f"{os.sep}fabric_core{os.sep}conformance{os.sep}"


class Broken(AssertionError):  # noqa: N818 - the rule is broken
    """A rule isn't kept; the text says what was seen."""


def without_kit(trace: str) -> str:
    """Leave the kit's own lines out of a traceback: what it shows is the plugin's way to the error."""
    kept: list[str] = []
    skipping = False
    for line in trace.splitlines():
        if line.startswith('  File "'):
            skipping = (
                f"{os.sep}fabric_core{os.sep}conformance{os.sep}" in line
                and "reference" not in line.rpartition(os.sep)[2]
            )
        elif not line.startswith("    "):
            skipping = False
        if not skipping:
            kept.append(line)
    return "\n".join(kept)


class Level(StrEnum):
    """How binding a rule is."""

    MUST = "MUST"
    """A plugin that breaks it is wrong."""
    SHOULD = "SHOULD"
    """A plugin may break it for a reason that its author writes down."""
    STOCHASTIC = "STOCHASTIC"
    """As ``MUST``; checked on long random examples, so that a pass is evidence and no proof."""
    UNTESTED = "UNTESTED"
    """As ``MUST``; the kit can't check it here, and says why."""


@dataclass(frozen=True)
class Rule:
    """One sentence that a plugin keeps.

    Args:
        id: Its name for ever: three letters for the kind, and a number.
        kind: The kind of plugin that it binds; ``"any"`` binds all.
        level: How binding it is.
        sentence: What holds.
        reason: Why users need it; for an untested rule also why the kit can't check it.
        advice: What an author changes who breaks it.
        check: Raises ``Broken`` where the rule isn't kept; takes the bench, and an example where there are any.
        needs: The capabilities, or properties of the policy, without which the rule does not apply.
        lacks: Those with which it does not apply.
        world_sizes: The numbers of processes that it is checked on.
        examples: Makes the generator of the examples, drawn in the driver alone.
        count: How many examples are drawn.
        inside: On one process the check runs inside the rank, because it makes the plugin itself; otherwise it runs in
            the driver, and only what it measures in ranks.
        first: Examples that are always tried before any is drawn: what chance would often leave out.
    """

    id: str
    kind: str
    level: Level
    sentence: str
    reason: str
    advice: str
    check: Callable[..., None] | None = None
    needs: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()
    world_sizes: tuple[int, ...] = _SINGLE
    examples: Callable[[], "SearchStrategy[Any]"] | None = None
    count: int = 5
    inside: bool = True
    first: tuple[Any, ...] = ()

    def broken(self, detail: str, world_size: int) -> str:
        """Write the message of a failure: the rule, what was seen, and what to change."""
        processes = f"{world_size} process{'es' if world_size > 1 else ''}"
        return (
            f"{self.id} ({self.level}): {self.sentence}\n"
            f"  seen on {processes}: {detail}\n"
            f"  instead: {self.advice}\n"
            f"  why: {self.reason}"
        )


class Table:
    """The rules of one kind, in their order.

    Args:
        kind: The kind.
        inside: Where the checks run whose rules don't say it.
    """

    def __init__(self, kind: str, *, inside: bool = True) -> None:
        self._kind = kind
        self._inside = inside
        self._rules: list[Rule] = []

    def __iter__(self) -> Iterator[Rule]:
        """Give the rules."""
        return iter(self._rules)

    def rule(
        self,
        id: str,  # noqa: A002 - the field's name
        sentence: str,
        *,
        reason: str,
        advice: str,
        level: Level = Level.MUST,
        needs: tuple[str, ...] = (),
        lacks: tuple[str, ...] = (),
        world_sizes: tuple[int, ...] = _SINGLE,
        examples: Callable[[], "SearchStrategy[Any]"] | None = None,
        count: int = 5,
        inside: bool | None = None,
        first: tuple[Any, ...] = (),
    ) -> Callable[[Callable[..., None]], Callable[..., None]]:
        """Write a rule into the table; decorates its check."""

        def write(check: Callable[..., None]) -> Callable[..., None]:
            here = self._inside if inside is None else inside
            conditions = (needs, lacks, world_sizes, examples, count, here, first)
            self._rules.append(Rule(id, self._kind, level, sentence, reason, advice, check, *conditions))
            return check

        return write

    def untested(self, id: str, sentence: str, *, reason: str, advice: str) -> None:  # noqa: A002 - as above
        """Write a rule that the kit can't check."""
        self._rules.append(Rule(id, self._kind, Level.UNTESTED, sentence, reason, advice))
