"""The kit's proof of itself: every mutant against every rule of its kind.

``python -m proof.matrix`` runs it, and fails where a mutant's failing rules are not exactly those
that are written at it.
"""

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import random
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Final

from fabric_core.conformance import references
from fabric_core.conformance.rule import Level
from fabric_core.conformance.rules import RULES
from fabric_core.conformance.session import run_rules
from fabric_core.conformance.subject import Subject
from proof.mutants import (
    ROWS,
    Mutant,
    accelerator,
    launcher,
    others,
    parting,
    precision,
    registration,
    rows,
    second,
    strategy,
)

__all__ = ["MUTANTS", "REFERENCES", "failing", "unproven"]

MUTANTS: Final[tuple[Mutant, ...]] = tuple(
    mutant
    for module in (registration, accelerator, precision, strategy, others, second, launcher, parting)
    for mutant in module.MUTANTS.found
)
"""All mutants."""

REFERENCES: Final[tuple[Subject, ...]] = tuple(
    Subject.of(cls.kind, cls) for cls in (getattr(references, name) for name in references.__all__)
)
"""All references, which fail no rule."""

_TIMEOUT: Final = 15.0
"""How many seconds a measurement of a mutant may take: some hang, and shall."""


def failing(subject: Subject, seed: int | None = None) -> dict[str, str]:
    """Judge a plugin by every rule of its kind; give the rules that it fails, and the messages."""
    report = run_rules(subject, seed=seed, shrink=False, timeout=_TIMEOUT)
    return {verdict.rule: verdict.message for verdict in report.verdicts if verdict.failed}


def unproven() -> list[str]:
    """Name the rules of the level MUST that no mutant is expected to fail."""
    killed = {rule for mutant in MUTANTS for rule in mutant.fails}
    return [rule.id for rule in RULES if rule.level == Level.MUST and rule.id not in killed]


def _judge(subject: Subject) -> tuple[dict[str, str], float]:
    begin = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):  # a mutant prints
        return failing(subject), time.perf_counter() - begin


def run(subjects: Sequence[Subject], workers: int) -> Iterator[tuple[dict[str, str], float]]:
    """Judge plugins in several processes at once; gives the results in order, as they come."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        yield from pool.map(_judge, subjects)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the matrix; the exit code is 1 where it isn't exact."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", help="mutants' names, or module:Class")
    # Ranks wait for each other about half of the time.
    parser.add_argument("--workers", type=int, default=2 * (os.cpu_count() or 1))
    parser.add_argument("--out", type=Path, help="write the rules that each mutant fails, as JSON")
    parser.add_argument("--accept", action="store_true", help="write what is seen as the rows that are expected")
    parser.add_argument("--sample", type=int, help="how many mutants, drawn anew each time; all by default")
    chosen = parser.parse_args(arguments)
    begin = time.perf_counter()
    mutants = [one for one in MUTANTS if not chosen.only or {one.name, one.subject.value} & set(chosen.only)]
    if chosen.sample is not None:
        mutants = random.sample(mutants, min(chosen.sample, len(mutants)))
    right = [] if chosen.only or chosen.sample is not None else list(REFERENCES)
    named = [frozenset[str]()] * len(right) + [mutant.named for mutant in mutants]
    expected = [frozenset[str]()] * len(right) + [mutant.fails for mutant in mutants]
    subjects = [*right, *(mutant.subject for mutant in mutants)]
    seen: dict[str, Any] = {}
    inexact = 0
    judged = zip(subjects, expected, named, run(subjects, chosen.workers), strict=True)
    for subject, wanted, at_least, (got, seconds) in judged:
        seen[subject.value] = sorted(got)
        if chosen.accept:
            wanted = frozenset(got) if at_least <= set(got) else at_least  # noqa: PLW2901 - accepted
        exact = set(got) == wanted and all(message.startswith(rule) for rule, message in got.items())
        inexact += not exact
        sys.stdout.write(
            f"{'exact ' if exact else 'WRONG '} {seconds:5.1f} s  {subject.value}: {' '.join(sorted(got))}\n"
        )
        if not exact:
            for rule in sorted(set(got) - wanted):
                sys.stdout.write(f"    unexpected {got[rule][:400]}\n")
            sys.stdout.write(f"    missing {sorted(wanted - set(got))}\n")
        sys.stdout.flush()
    if chosen.accept:
        named_at = {one.subject.value: one.named for one in MUTANTS}
        known = {**rows(), **seen}
        known = {place: got for place, got in known.items() if set(got) - named_at.get(place, set(got))}
        ROWS.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    if chosen.out:
        chosen.out.write_text(json.dumps(seen, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(
        f"{len(mutants)} mutants, {len(RULES)} rules, {len(unproven())} UNPROVEN; {inexact} not exact; "
        f"{time.perf_counter() - begin:.0f} s\n"
    )
    return 1 if inexact else 0


if __name__ == "__main__":
    sys.exit(main())
